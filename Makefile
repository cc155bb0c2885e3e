# Each target installs what it needs: a fresh clone, make, git and Python >= 3.10 with venv are enough.
# pip chooses the build of torch, e.g. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make train

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
PYTEST_FLAGS ?= -n 2

BIN := $(VENV)/bin
PY := $(BIN)/python

# One stamp per set of extras: $(STAMP)-train, $(STAMP)-train,test, ... The checkout's path is part of the name, because
# an editable install does not survive a move.
STAMP := $(VENV)/.ready-$(shell pwd -P | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: train continued chapter check test test-gpu test-integrations lint format docs fuzz faults bench bench-mtp clean help

train: $(STAMP)-train ## train the demo model, or another with ARGS: make train ARGS="--set train.steps=200"
	$(BIN)/llmfast train $(ARGS)

continued: $(STAMP)-train ## train on prose, then on code with and without a replay of prose (six minutes)
	$(PY) examples/continued_pretraining.py $(ARGS)

chapter: $(STAMP)-train,clean ## test statements of textbooks by small runs (an hour), or one: make chapter ARGS="decay"
	$(PY) -m examples.chapter $(ARGS)

check: $(STAMP)-train,test,dev ## check a change in 90 seconds: lint, its tests, and a few of all others
	$(PY) -m tools.check $(ARGS)

test: $(STAMP)-train,test ## run the tests in ten minutes: make test ARGS="-k optim", PYTEST_FLAGS="-n 0"
	$(PY) -m pytest --machine-code -rs $(PYTEST_FLAGS) $(ARGS)

test-gpu: $(STAMP)-train,test ## run the tests of losses and optimizers on a GPU, with compiled kernels
	$(PY) -m pytest --device cuda tests/losses tests/optim -rs $(PYTEST_FLAGS) $(ARGS)

test-integrations: $(STAMP)-train,test,hf,lightning,trl ## run the tests with Hugging Face, Lightning and TRL
	$(PY) -m pytest tests/integrations 'tests/test_docs.py::test_python_of_a_page_runs[docs/integrations.md]' -rs $(PYTEST_FLAGS) $(ARGS)

lint: $(STAMP)-train,dev ## check with ruff, mypy and pyright
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -m pyright --pythonpath $(PY)

format: $(STAMP)-train,dev ## fix and format the code with ruff
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

docs: $(STAMP)-train,docs ## build the documentation into site/; fails for a broken link or an undocumented name
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

fuzz: $(STAMP)-train,test ## test the command line with invalid input for ten minutes: make fuzz ARGS="--seed 7 --minutes 1"
	$(PY) -m tools.fuzz --minutes 10 $(ARGS)

faults: $(STAMP)-train,test ## plant known faults one at a time and see that a test notices each: make faults ARGS="--area optim"
	$(PY) -m tools.faults $(ARGS)

bench: $(STAMP)-train,bench,trl ## run all benchmarks and write benchmarks/results/
	$(PY) -m pytest benchmarks/ --benchmark-only $(ARGS)

bench-mtp: $(STAMP)-train,bench,trl ## train every kind of multi-token prediction (half an hour), then run make bench
	$(PY) -m benchmarks.mtp_runs runs/bench-mtp $(ARGS)

clean: ## remove .venv, caches and builds; keep runs/
	rm -rf .venv build dist site .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(STAMP)-%: pyproject.toml $(CONSTRAINTS)
	@rm -f $(filter-out $(STAMP)-%,$(wildcard $(VENV)/.ready-*))
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --extras $* $(if $(CONSTRAINTS),--constraints $(CONSTRAINTS))
	@touch $@
