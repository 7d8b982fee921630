#!/usr/bin/env bash
# Prints the path of a Python >= 3.12, or says what to install. A pyenv version counts.
set -u
works() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }
candidates=()
for name in python3.12 python3.13 python3.14 python3 python; do
  found=$(command -v "$name" 2>/dev/null) && candidates+=("$found")
done
for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  [ -x "$path" ] && candidates+=("$path")
done
for path in "${candidates[@]}"; do
  if works "$path"; then echo "$path"; exit 0; fi
done
echo "galvatron_megatron: no Python >= 3.12 found; install one, e.g. 'pyenv install 3.12'" >&2
exit 2
