#!/usr/bin/env bash
#PBS -N megatron
#PBS -l select=2:ncpus=64:ngpus=8:mpiprocs=8
#PBS -l place=scatter
#PBS -j oe
# Starts a Megatron job under PBS, with torchrun on every node of the job:
#
#   qsub -l select=4:ncpus=64:ngpus=8 -- /path/to/launch/pbs.sh pretrain_gpt.py MEGATRON-ARGS --galvatron-auto
#
# RANKS_PER_NODE  processes per node (default: the GPUs that nvidia-smi lists, else 1)
# PYTHON          interpreter of the environment (default: python); MASTER_PORT (default: from the job's number)
# REMOTE          what starts a command on a node: "pbsdsh -o -n NUMBER" (default) or "ssh", which gets its name
# DRY_RUN=1       prints the commands instead of running them
set -euo pipefail
stop() { echo "launch/pbs.sh: $*" >&2; exit 2; }
[ $# -gt 0 ] || stop "no script; valid: qsub -- $0 pretrain_gpt.py ARGS"
[ -n "${PBS_NODEFILE:-}" ] || stop "not in a PBS job (PBS_NODEFILE is not set); valid: qsub -- $0 pretrain_gpt.py ARGS"
[ -r "$PBS_NODEFILE" ] || stop "PBS_NODEFILE: $PBS_NODEFILE cannot be read"
# The file names a node once per process; the first line of each node is its place in pbsdsh's numbering.
mapfile -t nodes < <(awk '!seen[$0]++' "$PBS_NODEFILE")
mapfile -t places < <(awk '!seen[$0]++ { print NR - 1 }' "$PBS_NODEFILE")
[ ${#nodes[@]} -gt 0 ] || stop "PBS_NODEFILE: $PBS_NODEFILE names no node"
cd "${PBS_O_WORKDIR:-$PWD}"
number=${PBS_JOBID:-0}
number=${number//[^0-9]/}
port=${MASTER_PORT:-$((20000 + 10#${number:-0} % 12000))}
torchrun=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/torchrun.sh
pids=()
for index in "${!nodes[@]}"; do
  settings=(NNODES="${#nodes[@]}" NODE_RANK="$index" MASTER_ADDR="${nodes[0]}" MASTER_PORT="$port")
  for name in RANKS_PER_NODE PYTHON CUDA_DEVICE_MAX_CONNECTIONS; do
    [ -z "${!name:-}" ] || settings+=("$name=${!name}")
  done
  printf -v line '%q ' env "${settings[@]}" bash "$torchrun" "$@"
  line="cd $(printf %q "$PWD") && $line"
  if [ ${#nodes[@]} -eq 1 ]; then
    start=(bash -c "$line")
  elif [ "${REMOTE:-pbsdsh}" = ssh ]; then
    start=(ssh -o BatchMode=yes "${nodes[$index]}" "$line")
  else
    start=(pbsdsh -o -n "${places[$index]}" -- bash -c "$line")
  fi
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${start[@]}"; echo; continue; fi
  "${start[@]}" &
  pids+=($!)
done
status=0
for pid in "${pids[@]:-}"; do [ -z "$pid" ] || wait "$pid" || status=$?; done
exit "$status"
