PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
export JAX_PLATFORMS ?= cpu
# docs/xla-notes.md: large-pages
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo check test test-full notebooks lint clean clean-cache

demo: .venv/base
	$(BIN)/zamba2 demo

# What a change is checked with while it is made: a core of the tests.
check: lint
	$(BIN)/pytest -n 2 --dist worksteal @tests/core.txt

test: lint
	$(BIN)/pytest -n 2 --dist worksteal

test-full: .venv/full lint
	$(BIN)/pytest -n 2 --dist worksteal -m ""

# Runs the notebooks and stores what they show.
notebooks: .venv/dev
	$(BIN)/python notebooks/run.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) .
	touch $@

.venv/dev: .venv/base
	$(INSTALL) '.[dev,parity,notebooks,sentencepiece]'
	touch $@

.venv/full: .venv/dev
	$(INSTALL) '.[dev,parity,notebooks,sentencepiece,eval,wandb]'
	touch $@

clean:
	rm -rf .venv demo-output .mypy_cache .pytest_cache .ruff_cache

# What is in the user's cache for all clones: the programs that the tests have compiled, the models of the notebooks.
clean-cache:
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/zamba2-jax/tests" "$${XDG_CACHE_HOME:-$$HOME/.cache}/zamba2-jax/notebooks"
