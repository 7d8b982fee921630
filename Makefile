# The commands of the README. Each sets up what it needs; a second run starts at once.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
export OMP_NUM_THREADS ?= 1
export TORCHDYNAMO_DISABLE ?= 1

.PHONY: demo test lint bench clean setup

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt launch/find_python.sh
	@if [ ! -x $(PY) ]; then "$$(bash launch/find_python.sh)" -m venv $(VENV); fi
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,report,dev]'
	@touch $@

demo: setup
	bash launch/demo.sh

test: setup
	$(PY) tests/run.py $(PYTEST_ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: setup
	@for program in benchmarks/[a-z]*.py; do echo "== $$program"; $(PY) $$program || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info
