# Everything a developer or a first-time user runs; `make` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
# No NVIDIA driver: the torch version that has a CPU wheel wherever pip is offered one (a local wheel
# sorts above the same version with CUDA). With a driver: pip's choice, which is CUDA.
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),,-c constraints-cpu.txt)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test dev build lint format types bench gpu clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: build ## whole chain on CT phantoms; on your own scans: make demo DATA=folder
	$(BIN)/medspark demo $(if $(DATA),"data=$(abspath $(DATA))")

test: build lint types ## lint, types and all tests
	$(BIN)/python -m pytest --timeout=300 $(PYTEST_ARGS)

dev: build ## an environment to work in
	@echo "ready; activate it with: source $(BIN)/activate"

# One set-up for all: an environment that is given or active is used, and its torch stays.
$(READY): pyproject.toml constraints-cpu.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "medspark needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Install one and name it, for example: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@keep=$(VENV)/torch-constraint.txt; \
	if $(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' \
	  > $$keep 2> /dev/null; then pin="-c $$keep"; else pin="$(CONSTRAINTS)"; fi; \
	set -x; MEDSPARK_NATIVE=OFF $(BIN)/python -m pip install $$pin -e '.[dev]'
	$(BIN)/python -m pip install --no-deps 'dynamic-network-architectures>=0.4,<0.5'
	touch $@

build: $(READY)
	$(BIN)/python setup.py -q build_ext --inplace

lint: $(READY) ## ruff and clang-format, check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY) ## rewrite Python and C++ in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

types: $(READY) ## mypy: strict on sparse and losses
	$(BIN)/mypy

bench: build ## all benchmarks, quick settings, one table; some ten minutes
	$(BIN)/python benchmarks/bench_all.py --out outputs/bench

# For a machine with a GPU and perhaps no network: the Python that is there, no environment.
HOST_ONLY = --ignore tests/sparse/test_properties.py --ignore tests/sparse/test_numba_oracle.py
gpu: ## build for CUDA, GPU tests, benchmarks, compute-sanitizer where found
	MEDSPARK_CUDA=ON $(PYTHON) setup.py build_ext --inplace
	PYTHONPATH=. MEDSPARK_REQUIRE_GPU=1 $(PYTHON) -m pytest -m gpu tests/sparse $(HOST_ONLY) $(PYTEST_ARGS)
	PYTHONPATH=. $(PYTHON) benchmarks/bench_conv3d.py --quick
	if command -v compute-sanitizer; then PYTHONPATH=. MEDSPARK_REQUIRE_GPU=1 \
	  compute-sanitizer --error-exitcode 1 $(PYTHON) -m pytest -m 'gpu and not slow' tests/sparse $(HOST_ONLY); fi

clean: ## remove what builds and tools left; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache medspark/_C*.so
	find medspark configs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
