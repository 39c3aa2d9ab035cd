# Needs make and Python 3.11 or later with venv; everything else goes into .venv.

CONFIG ?= configs/nano.yaml
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# The backend of MLX, one of the extras in pyproject.toml: none on a Mac, CUDA by the driver's version, else the CPU.
MLX ?= $(shell [ "$$(uname -s)" = Darwin ] && exit; \
	driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d . -f 1); \
	if [ "$$driver" -ge 580 ] 2>/dev/null; then echo cuda13; \
	elif [ "$$driver" -ge 550 ] 2>/dev/null; then echo cuda12; else echo cpu; fi)

# What the oracle tests compare with, on the CPU. On Linux x86-64 pip may pick a CUDA build of several GB;
# TORCH takes whatever pip takes, so the file name of a CPU wheel will do.
TORCH ?= torch==2.13.0

# Tests are shared among processes, one a core but four at most: each takes up to 1 GB. WORKERS=0 runs them in one.
WORKERS ?= logical

BIN := .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
PYTEST = $(BIN)/python -m pytest -q --numprocesses=$(WORKERS) --maxprocesses=4 --dist=worksteal
comma := ,

.DEFAULT_GOAL := help
.PHONY: help setup demo encode train test check oracle score bench bench-gpu torture clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo; echo "  encode and train take CONFIG=FILE (now $(CONFIG))"

setup: .venv ## Create .venv with the program and its tests

demo: .venv ## Encode, train, decode and report on the model that comes with the repository
	$(BIN)/relay encode -c configs/nano.yaml
	$(BIN)/relay train -c configs/nano.yaml
	$(BIN)/relay decode runs/nano
	$(BIN)/relay report runs/nano

encode: .venv ## Stage one: captions and images into the store
	$(BIN)/relay encode -c $(CONFIG)

train: .venv ## Stage two: a LoRA from the store
	$(BIN)/relay train -c $(CONFIG)

test: .venv ## Run the tests that need neither network nor torch
	$(PYTEST)

check: .venv/check .types/flux2_relay ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

oracle: .venv/oracle ## Compare with diffusers, transformers and peft (installs torch)
	$(PYTEST) tests/oracle

score: .venv ## Judge what the miniature draws, what the demo's LoRA learned, and that a planted fault shows
	$(BIN)/python -m pytest -q tests/score -m 'not torture'

bench: .venv ## Measure speed and memory on this machine
	@for script in tests/bench/*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

bench-gpu: .venv ## Measure full-size models beside diffusers and peft on an NVIDIA card; CASE=NAME for one
	$(BIN)/python tests/bench/gpu/run.py $(if $(CASE),--case '$(CASE)')

torture: .venv ## Kill encode N times (200) and train (40), cut the power: nothing lost, same bits; train 2,000 steps; plant every fault
	$(BIN)/python tests/faults/torture.py $(or $(N),200)
	$(BIN)/python tests/faults/torture_train.py $(or $(N),40)
	$(BIN)/python tests/faults/power_cut.py
	STEPS=2000 $(BIN)/python -m pytest -q tests/unit/pipeline/test_long_run.py
	HIDDEN=1024 $(BIN)/python -m pytest -q tests/unit/stages/test_encode_memory.py
	$(BIN)/python -m pytest -q tests/score -k planted_fault

clean: ## Remove what the other targets made, .venv included; stores and runs stay
	rm -rf .venv .types build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11 or later with venv found; say make setup PYTHON=..." >&2; exit 1; }
	@echo "installing into .venv; backend of MLX: $(or $(MLX),Metal)"
	@rm -f .venv/installed .venv/check .venv/oracle
	$(PYTHON) -m venv .venv
	$(PIP) '.[test$(addprefix $(comma),$(MLX))]'
	@touch .venv/installed .venv

# An installation that failed or was interrupted has made the folder, but is not finished.
ifeq ($(wildcard .venv/installed),)
.PHONY: .venv
endif

.venv/check: pyproject.toml | .venv
	$(PIP) '.[check]'
	@touch $@

.venv/oracle: pyproject.toml | .venv
	$(PIP) '.[oracle]' '$(TORCH)'
	@touch $@

# Type checkers cannot see that setuptools maps flux2_relay.cache to cache/; these links can be seen by all.
.types/flux2_relay:
	@mkdir -p $@
	@for room in cache configs pipeline stages; do ln -sfn ../../$$room $@/$$room; done
