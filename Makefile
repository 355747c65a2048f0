# `make fit` and `make test` work from a fresh clone: they create .venv with the pinned versions, once.
# ARGS passes words on: make fit ARGS="mixer=linear trainer.max_epochs=3"; make test ARGS="-k conformance -x".

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := zoo blocks kernels pipelines conf model_cards
# Bytecode is compiled when a module is first imported: of torch's and its companions' thousands most never are.
# No build isolation: one setuptools, pinned like the rest, instead of a download for each build.
INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-compile --no-build-isolation \
	-c constraints.txt

.PHONY: help fit test lint format layers types bench docs clean

help:
	@echo "make fit     train the default forecaster on the sample weather table (ARGS: Hydra overrides)"
	@echo "make test    the default test suite (ARGS: pytest arguments)"
	@echo "make lint    ruff check and format; make format applies both"
	@echo "make layers  imports run one way: kernels <- blocks <- zoo <- pipelines"
	@echo "make types   mypy over the package"
	@echo "make bench   every benchmark, hours; one: BENCH=benchmarks/NAME.py (ARGS: its arguments)"
	@echo "make docs    the generated tables of README.md"
	@echo "make clean   remove what building and testing left; runs/ and .venv stay"

# The stamps are older than what they depend on only when an installation is due.
$(VENV)/.fit: pyproject.toml setup.py constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) -e '.[samples,plot]'
	touch $@

$(VENV)/.dev: $(VENV)/.fit
	$(INSTALL) -e '.[samples,plot,text,audio,video,dev]'
	$(INSTALL) --no-deps sports2d # for a video in it that decord does not decode, not for its code
	touch $@

fit: $(VENV)/.fit
	$(BIN)/lightning fit experiment=forecasting/weather $(ARGS)

# One thread per worker: two workers with a thread pool each would fight for the cores.
test: $(VENV)/.dev
	PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu" $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

layers:
	$(PYTHON) .ci/layers.py

# A type checker does not follow the import hook of an editable installation, so it gets the same map as links.
types: $(VENV)/.dev
	mkdir -p build/typings/seqzoo
	for path in seqzoo/*.py seqzoo/py.typed $(FOLDERS); do \
		ln -sfn ../../../$$path build/typings/seqzoo/$$(basename $$path); done
	$(BIN)/mypy -p seqzoo

BENCH ?= $(filter-out benchmarks/_% benchmarks/gpu.py,$(wildcard benchmarks/*.py))
bench: $(VENV)/.dev
	for script in $(BENCH); do $(BIN)/python $$script $(ARGS) || exit 1; done

docs: $(VENV)/.dev
	$(BIN)/python docs/tables.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
