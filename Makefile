# Every target does its own set-up, and nothing where that is done.
.PHONY: setup chat serve test check check-slow bench clean
.DEFAULT_GOAL := help

export PROMPT ?= What is a tort?
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv and install the project into it

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV) (a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt pip
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

chat: setup ## answer PROMPT="...", then, on a terminal, go on talking
	@$(BIN)/collegium chat --continue "$$PROMPT"

serve: setup ## start the endpoint on 127.0.0.1:8000
	@$(BIN)/collegium serve

test: setup ## run the tests (the default models are fetched once)
	@$(BIN)/python -m pytest -m "not slow and not gpu and not browser"

check: setup ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python docs/generate.py --check
	@.ci/types $(BIN)/python

check-slow: setup ## the slow tests
	@$(BIN)/python -m pytest -m "slow"

bench: setup ## the quick benchmarks; COLLEGIUM_DATA names the data
	@$(BIN)/python benchmarks/router.py --quick
	@$(BIN)/python benchmarks/experts.py --quick

clean: ## remove the environment and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info build
