# `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo build test lint bench clean FORCE

VENV := $(CURDIR)/.venv
BOOTSTRAPPED := $(VENV)/.bootstrap-stamp
INSTALLED := target/.installed

# The interpreter to build for: the same path in every call of cargo, or else
# cargo would compile pyo3-ffi and all above it anew at every change of path.
export PYO3_PYTHON := $(VENV)/bin/python
# With it set, every start of Python would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## run the example
	$(VENV)/bin/tractor-host run examples/audit_stdlib.py

build: $(INSTALLED) ## provide CPython 3.14 and install the package into .venv, editable

test: build ## run every check and test, and print the totals
	@scripts/test

lint: build ## run the checks alone: format, clippy, ruff, mypy, pyright
	@scripts/test --lint

bench: build ## time spawning, sharing and calls
	$(VENV)/bin/python benches/spawn.py
	$(VENV)/bin/python benches/share.py
	$(VENV)/bin/python benches/calls.py
	$(VENV)/bin/python benches/fairness.py

clean: ## remove what was built; .venv and the cached CPython stay
	rm -rf target fuzz/target .mypy_cache .pytest_cache .ruff_cache python/tractor_host/*.so
	find python pytests scripts benches examples -name __pycache__ -prune -exec rm -rf {} +

# Asked every time, and quick when there is nothing to do; the stamp changes
# only when .venv was made anew.
$(BOOTSTRAPPED): FORCE
	@scripts/bootstrap >/dev/null

# Python sources are not listed: the install is editable.
$(INSTALLED): $(BOOTSTRAPPED) Cargo.toml $(wildcard Cargo.lock .cargo/config.toml) build.rs \
		pyproject.toml README.md scripts/build_backend.py scripts/cargo-for-maturin \
		$(shell find src -name '*.rs')
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--root-user-action=ignore --no-build-isolation --no-deps --editable .
	@mkdir -p $(@D) && touch $@
