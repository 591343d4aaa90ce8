# `make` or `make help` lists the targets. Needs Python 3.11 or newer, nothing else.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest

PIP := -m pip --disable-pip-version-check -qq install
ARGS ?=

# Tests run on the CPU, whatever the machine has, and speak to nobody.
TESTS := test test-slow test-tpu test-docs test-notebooks test-harness test-all
$(TESTS) docs: export JAX_PLATFORMS := cpu
$(TESTS) docs: export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help .venv quickstart check $(TESTS) docs format lock clean

help: ## list the targets
	@grep -E '^[.a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([.a-z-]+):.*## /\1\t/' | expand -t 14

.venv: .venv/installed ## make the virtual environment with the pinned dependencies

.venv/installed: requirements.lock setup.py
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; give one as in: make PYTHON=/usr/bin/python3.11" >&2; exit 2; }
	@echo "Installing the pinned dependencies into .venv with $(PYTHON) (about a minute)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python $(PIP) --requirement requirements.lock
	@$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# glibc gets large arrays from the system whenever they are allocated. Where the system may give them in huge pages, a
# small model's step spends less time on that.
quickstart: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
quickstart: .venv ## prepare a corpus, train, evaluate and sample a small model (about ten minutes on two cores)
	@$(BIN)/python experiments/quickstart.py $(ARGS)

check: .venv ## formatting, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## check, then the test suite without the slow tests
	$(PYTEST) -m "not slow" -n $(WORKERS) $(ARGS)

test-slow: test .venv-beam/installed ## test, then the slow tests
	$(PYTEST) -m slow $(ARGS)
	.venv-beam/bin/python -m pytest -m slow tests/data/test_beam.py

test-tpu: .venv-tpu/installed ## what needs the compiler for TPUs: every kernel, a recipe of every objective
	.venv-tpu/bin/python -m pytest -m slow tests/compiling

test-docs: .venv-docs/installed ## builds the documentation, warnings as errors, and looks at its pages
	.venv-docs/bin/python -m pytest -m slow tests/docs

test-notebooks: .venv-notebooks/installed ## the notebooks of docs/notebooks/, executed with small settings
	.venv-notebooks/bin/python -m pytest tests/experiments/test_notebooks.py $(ARGS)

test-harness: .venv-harness/installed ## what needs lm_eval: its harness on our models
	.venv-harness/bin/python -m pytest tests/test_harness.py tests/experiments/test_harness_tasks.py

test-all: test-slow test-tpu test-docs test-notebooks test-harness .venv-torch/installed ## all of these, then what needs PyTorch
	.venv-torch/bin/python -m pytest tests/experiments/test_torch_baseline.py tests/checkpoints tests/evaluation/test_generative.py

# Apache Beam asks for older versions of some packages than are pinned, so its tests have an environment of their own.
.venv-beam/installed: requirements.lock setup.py
	@$(PYTHON) -m venv .venv-beam
	@sed '/^pyarrow==/d; /^protobuf==/d; /^pillow==/d; /^python-dateutil==/d; /^matplotlib==/d' requirements.lock > .venv-beam/requirements.txt
	@.venv-beam/bin/python $(PIP) --requirement .venv-beam/requirements.txt apache-beam==2.77.0
	@.venv-beam/bin/python $(PIP) --no-build-isolation --editable '.[beam]'
	@touch $@

# What `make test` does without, each in an environment of its own.
NEEDS_tpu := 'libtpu==0.0.42.*'
NEEDS_notebooks := nbclient==0.11.0 ipykernel==7.4.0
NEEDS_harness := lm_eval==0.4.13
NEEDS_torch := torch==2.13.0 transformers==5.24.0
NEEDS_docs := sphinx==9.0.4 myst-parser==5.2.0 furo==2025.12.19 $(NEEDS_harness)

.venv-%/installed: requirements.lock setup.py
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python $(PIP) --requirement requirements.lock $(NEEDS_$*)
	@.venv-$*/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

docs: .venv-docs/installed ## the documentation as HTML: build/docs/index.html
	@.venv-docs/bin/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

format: .venv ## format the code and apply what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## write requirements.lock anew from setup.py's ranges
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python $(PIP) --upgrade setuptools
	@build/lock/bin/python $(PIP) --editable '.[dev]'
	@{ sed '/^[^#]/,$$d' requirements.lock; \
	   build/lock/bin/python -m pip freeze --all --exclude-editable --exclude pip --exclude wheel; } > build/requirements.lock
	@mv build/requirements.lock requirements.lock

clean: ## remove the environment, caches and build products (data/ and runs/ stay)
	@rm -rf .venv .venv-* build docs/api dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find bd3_jax configs tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +
