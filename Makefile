# Every target sets up what it needs: `make demo` and `make test` work on a machine with nothing but Python 3.11.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := autopar costmodel graphs hardware_db
CODE := $(PACKAGES) tests examples benchmarks
JOBS ?= 2

# One thread per process: the tests and the demo start several ranks on the same cores.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test format lint type check bench never-worse accuracy clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## create .venv with the pinned dependencies

# torch goes first and by itself: on some machines a CPU build is offered, and only an exact request finds it.
$(READY): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "no virtual environment: on Debian, 'apt install python3-venv'" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --constraint requirements.lock torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint requirements.lock setuptools
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --no-build-isolation --editable '.[hf,dev]'
	touch $@

demo: setup  ## plan a full-size model, then run a small sibling of it on four local processes
	$(BIN)/python examples/demo.py

test: setup  ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

format: setup  ## format the code
	$(BIN)/ruff check --fix-only --quiet $(CODE)
	$(BIN)/ruff format $(CODE)

lint: setup  ## check formatting, style, package arrows and spelling
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/lint-imports
	$(BIN)/codespell

type: setup  ## check types
	$(BIN)/mypy

check: lint type  ## all that runs before the tests

bench: setup  ## what a plan costs to find: time, memory, gap, beside their limits
	$(BIN)/python -m benchmarks.bench

never-worse: setup  ## plans against the configurations of published runs
	$(BIN)/python -m benchmarks.never_worse --jobs $(JOBS)

accuracy: setup  ## predictions against published training runs
	$(BIN)/python -m benchmarks.accuracy

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
