# make demo     tune a small real model on this machine; the study lands in results/demo
# make test-fast   the tests of the inner loop: no workers, no real models, no whole studies
# make test-lowest   the same with the lowest versions that pyproject.toml allows, in .venv-lowest
# make test     all tests: side by side, and those that run whole studies one after the other
# make test-vllm   plans run by unpatched vLLM, in .venv-vllm: 3 GB; make demo-vllm tunes one, in 10 minutes
# make bench-engines   our search over vLLM's plans beside others, and the engine beside its own defaults and ours
# make test-families   every causal-LM family that transformers knows; make models-table writes docs/models.md
# make check    all that CI runs: lint, types, import contracts, tests
# make bench-peers   our runtime beside its peers, in rounds, for up to an hour; QUICK=1 takes some minutes
# make bench-search  our search beside others on the landscapes in results/landscapes; make landscapes measures them, hours
# make bench-load    the highest rate of requests beside transformers' continuous batching, for hours; results/load
# make bench-gate    the gate's error rates, simulated and on this machine, for hours; goes on where it was left
# make gpu-check     what only a machine with an NVIDIA GPU can show, in 8 minutes; results/gpu/<machine>
# make lint     check without tests; make format rewrites; make clean removes .venv and caches, never results
PYTHON ?= python3
VENV ?= .venv
DEMO ?= results/demo
PYTEST_ARGS ?=
QUICK ?=
PEERS_ARGS ?=
GPU_CHECK_ARGS ?=
SEARCH_ARGS ?=
LANDSCAPES ?=
GATE_ARGS ?=
LOAD_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo demo-vllm bench-engines bench-peers bench-search landscapes bench-load bench-gate gpu-check gpu-rehearsal test-fast test-lowest test test-families test-hosts test-vllm models-table check lint format hooks clean

help:
	@sed -n 's/^# //p' Makefile | head -n 15

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

# A second `make demo` goes on with what the first one recorded, or shows it again.
demo: $(VENV)/.installed-run
	$(BIN)/pipetune demo -o $(DEMO)

# A second `make bench-peers` goes on with what the first one measured. PEERS_ARGS: see `python -m tests.evaluation.peers --help`.
bench-peers: $(VENV)/.installed-run
	$(BIN)/python -m tests.evaluation.peers $(if $(QUICK),--quick) $(PEERS_ARGS)

# SEARCH_ARGS: see `python -m tests.evaluation.search --help`.
bench-search: $(VENV)/.installed-run
	$(BIN)/python -m tests.evaluation.search search --docs docs/performance.md $(SEARCH_ARGS)

# A landscape that is complete is not measured again; one that is not goes on. LANDSCAPES: their names; all by default.
landscapes: $(VENV)/.installed-run
	$(BIN)/python -m tests.evaluation.search measure $(LANDSCAPES) $(SEARCH_ARGS)

# LOAD_ARGS: see `python -m tests.evaluation.load --help`; `--docs docs/performance.md` writes its table.
bench-load: $(VENV)/.installed-run
	$(BIN)/python -m tests.evaluation.load $(if $(QUICK),--quick) $(LOAD_ARGS)

# GATE_ARGS: see `python -m tests.evaluation.gate --help`.
bench-gate: $(VENV)/.installed-run
	$(BIN)/python -m tests.evaluation.gate --docs docs/performance.md $(GATE_ARGS)

# Where there is no package registry: tests/evaluation/gpu/first.sh. GPU_CHECK_ARGS: see `python -m tests.evaluation.gpu --help`.
gpu-check: $(VENV)/.installed-run
	$(BIN)/python -m tests.evaluation.gpu $(GPU_CHECK_ARGS)

# pytest says 5 where the arguments given chose no test of one half.
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)
SIDE_BY_SIDE := -n auto --dist loadfile

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m 'not e2e and not slow' $(SIDE_BY_SIDE) || [ $$? -eq 5 ]

# torch's version alone is the one in constraints.txt. Warnings fail no test here: old packages beside the newest of what
# they need warn of each other.
LOWEST := $(VENV)-lowest
$(LOWEST)/.installed: $(BIN)/python $(INPUTS) tests/lowest.py
	@$(BIN)/python -m venv --clear $(LOWEST)
	@{ $(BIN)/python -m tests.lowest; grep '^torch==' constraints.txt; } > $(LOWEST)/constraints.txt
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -c $(LOWEST)/constraints.txt -e '.[test]'
	@touch $@

# vLLM has an environment of its own, which pipetune is not installed in.
VLLM := $(VENV)-vllm
$(VLLM)/.installed: $(BIN)/python tests/bench/engines/vllm-requirements.txt
	@$(BIN)/python -m venv --clear $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check -r tests/bench/engines/vllm-requirements.txt
	@$(VLLM)/bin/python -m pip uninstall -qq --yes torchvision torchaudio torchcodec opencv-python-headless
	@touch $@

# A second `make demo-vllm` goes on with what the first one recorded, or shows it again.
demo-vllm: $(VENV)/.installed-run $(VLLM)/.installed
	$(BIN)/pipetune tune --resume auto -o $(DEMO)-vllm --model smollm2-135m --dtype bfloat16 --devices cpu:0-1 \
		--engine vllm --engine-python $(VLLM)/bin/python --enforce-eager --kv-cache-memory-bytes 512MiB \
		--num-iters 1 --n-trials 6 --finalists 1 --max-finalist-rounds 3 --baseline-batch-sizes 32
	$(BIN)/pipetune export $(DEMO)-vllm --format vllm

# The landscape is measured where it is not there yet, which takes half an hour.
bench-engines: $(VENV)/.installed-run $(VLLM)/.installed
	$(BIN)/python -m tests.evaluation.engines measure --python $(VLLM)/bin/python
	$(BIN)/python -m tests.evaluation.engines search --docs docs/performance.md
	$(BIN)/python -m tests.evaluation.engines numbers --python $(VLLM)/bin/python

test-vllm: $(VENV)/.installed-test $(VLLM)/.installed
	PIPETUNE_VLLM_PYTHON=$(abspath $(VLLM)/bin/python) $(PYTEST) tests/bench/engines/test_real_vllm.py tests/tuner/commands/test_serve.py

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(PYTEST_ARGS) -W default -m 'not e2e and not slow' $(SIDE_BY_SIDE)

test: $(VENV)/.installed-test
	$(PYTEST) -m 'not e2e' $(SIDE_BY_SIDE) || [ $$? -eq 5 ]
	$(PYTEST) -m e2e || [ $$? -eq 5 ]

test-families: $(VENV)/.installed-test
	PIPETUNE_FAMILY_SHARD=all $(PYTEST) tests/families

# What stands in for a GPU: fleets of stubbed ones, whole; make test runs a share.
gpu-rehearsal: $(VENV)/.installed-test
	PIPETUNE_REHEARSAL=all $(PYTEST) tests/rehearsal

# Network namespaces as hosts, made as root; make test runs these as well.
test-hosts: $(VENV)/.installed-test
	CI=1 $(PYTEST) tests/bench/fleet/test_hosts.py tests/bench/machine/test_wire.py tests/tuner/gate/test_hosts.py

models-table: $(VENV)/.installed-test
	$(BIN)/python -m tests.families.survey --write docs/models.md

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m tests.house
	$(BIN)/python -m tests.prose

check: lint test

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.installed-dev
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) $(LOWEST) $(VLLM) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find bench tuner tests -name __pycache__ -type d -prune -exec rm -rf {} +
