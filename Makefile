# make demo | docs | models | lab | network | bench | accelerators | test | test-all | multidevice | fuzz | lint | venv | clean: all of it lives in .venv.
# PYTHON=python3.12 picks another Python for it, once `make clean` has removed it.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo docs paper models results lab network bench accelerators test test-all multidevice fuzz lint venv clean
.DELETE_ON_ERROR:

demo: .venv/installed
	@$(BIN)/python -m train.recipes.digits

# The pages whose numbers take minutes: docs/paper.md, docs/models.md and docs/results.md. `make lab` and `make bench` take half an hour each, and
# docs/accuracy-per-bit.md hours, by the commands that it names.
docs: paper models results

paper: .venv/installed
	@$(BIN)/python -m eval.reports.paper --markdown docs/paper.md

models: .venv/installed
	@$(BIN)/python -m eval.reports.models --markdown docs/models.md

results: demo
	@$(BIN)/python -m eval.reports.results --markdown docs/results.md

lab: .venv/installed
	@$(BIN)/python -m eval.reports.lab --markdown docs/lab.md

# As root, a quarter of an hour on a machine that does nothing else.
network: .venv/installed
	@$(BIN)/python -m eval.reports.network --markdown docs/network.md

# As root, half an hour on a machine that does nothing else. torch, which is timed beside us, comes with what tests need.
bench: .venv/installed-test
	@$(BIN)/python -m eval.reports.performance --markdown docs/performance.md

# The compiler of TPUs, beside .venv: there JAX would look for a TPU.
accelerators: .venv/installed
	@$(PIP) --no-deps --upgrade --target build/libtpu \
	  "$$($(BIN)/python -c 'import importlib.metadata as m; print(*(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"
	@PYTHONPATH=build/libtpu JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(BIN)/python -m train.recipes.accelerators --markdown docs/accelerators.md

# Two processes share the files; tests of the lab run one by one in one of the two (tests/conftest.py).
test: .venv/installed-test
	@$(BIN)/python -m pytest -n 2

# And of what arrays go through most, that they have the shapes that annotations say, which takes half as long again.
test-all: test
	@$(BIN)/python -m pytest -n 2 -m slow
	@$(BIN)/python -m pytest -n 2 --jaxtyping-packages=astra_jax,checkpoints,train,eval,beartype.beartype \
	  $(addprefix tests/unit/astra_jax/,codecs mesh models strategies)

# Tests of several devices with the newest releases that another Python and JAX allow, beside .venv and without torch:
# make multidevice PYTHON=python3.13 JAX=0.12.0
multidevice: ENV = build/$(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')-jax$(JAX)
multidevice:
	@$(PYTHON) -m venv $(ENV)
	@$(ENV)/bin/python -m pip install -q --disable-pip-version-check -e . 'jax==$(JAX)' beartype hypothesis pytest
	@$(ENV)/bin/python -m pytest -m '' tests/multidevice

# 100,000 mutations of everything that is read, always the same ones: hours.
fuzz: .venv/installed-test
	@ASTRA_FUZZ=100000 $(BIN)/python -m pytest -m slow tests/fuzz

lint: .venv/installed-lint
	@$(BIN)/ruff check -q
	@$(BIN)/ruff check -q --select C901 --config "lint.mccabe.max-complexity = 8" astra_jax
	@$(BIN)/ruff format --check -q
	@$(BIN)/mypy --no-error-summary

venv: .venv/installed

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp is older than the files that say what to install until that is installed.
.venv/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into .venv"
	@$(PIP) -e .
	@touch $@

.venv/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into .venv (with what $* needs)"
	@$(PIP) -e '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is not: try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv
