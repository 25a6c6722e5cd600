# demo and test need nothing but Python >= 3.11: they make VENV and install into it themselves.
# A second call installs again only when pyproject.toml has changed.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# A further requirement for pip, such as jax~=0.11.2.
WITH ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint types clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-plots
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-3.12 build dist out *.egg-info
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit( \
	  "error: Python >= 3.11 is needed, $(PYTHON) is Python " + v + \
	  "; name a newer one: make PYTHON=python3.12")'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# One stamp for each extra: plots (demo), test, dev (lint, types).
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing dynaexq-jax[$*] into $(VENV) (the first time takes a minute or two)"
	@$(PIP) install --editable '.[$*]' $(if $(WITH),'$(WITH)')
	@touch $@
