# make demo     tune a small real model on this machine; the study lands in results/demo
# make test     the tests
# make check    all that CI runs: lint, types, import contracts, tests
# make lint     check without tests; make format rewrites; make clean removes .venv and caches, never results
PYTHON ?= python3
VENV ?= .venv
DEMO ?= results/demo
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check lint format hooks clean

help:
	@sed -n 's/^# //p' Makefile | head -n 4

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "pipetune needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo 'not there');" \
			"name another, for example: make demo PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
		rm -rf $(VENV); exit 2; }

# A stamp is written when an install went through, so that the next make skips it until its inputs change.
# Setuptools comes first and builds outside of an isolated environment: its version is pinned as well then.
$(VENV)/.installed-run: $(BIN)/python $(INPUTS)
	@echo "Installing pipetune into $(VENV); torch is large, the first time takes minutes."
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-run
	@$(INSTALL) --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

# A second `make demo` goes on with what the first one recorded.
demo: $(VENV)/.installed-run
	$(BIN)/pipetune tune --config examples/demo.yaml -o $(DEMO) $(if $(wildcard $(DEMO)/study.yaml),--resume)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.installed-dev
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find bench tuner tests -name __pycache__ -type d -prune -exec rm -rf {} +
