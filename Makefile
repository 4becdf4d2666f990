# Every entry point of the project. Each sets up what it needs, once, in .venv: see scripts/environment.py.
PYTHON ?= python3
# The builds that this checkout is tested with. The package itself asks for less: settings.ini has lower bounds.
TORCH ?= torch==2.13.0 torchvision==0.28.0
# Passed on: make test ARGS="-k data", make lab ARGS="--port 9000"
ARGS ?=

BIN := .venv/bin
MINOR := $(shell sed -n 's/^requires-python = ">=3\.\([0-9]*\)"/\1/p' pyproject.toml)
NEEDS := sota_course needs Python 3.$(MINOR) or newer

# Nothing of another environment gets in; an empty HOME is as good as none.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV JUPYTER_PATH
ifeq ($(strip $(HOME)),)
unexport HOME
endif

# One file of tests, in the environment of the target, without what the other tests need
VERSIONS = SOTA_COURSE_PINS=$(@:test-%=.venv-%)/.sota_course/pins.txt $(@:test-%=.venv-%)/bin/python -m pytest --noconftest -s $(ARGS) tests/test_versions.py

.PHONY: help course lab test test-oldest test-colab test-newest docs bench env bench-env python
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

course: env ## Set up, train the book's recipe and ours on the drawn data set, and say how to go on
	@$(BIN)/python scripts/course.py $(ARGS)
	@echo
	@echo "Now open the notebooks: make lab"

lab: env ## Open the notebooks in JupyterLab
	@$(BIN)/python -m jupyterlab --ServerApp.root_dir=. $(if $(filter 0,$(shell id -u)),--allow-root --no-browser) $(ARGS) nbs/index.ipynb

test: python ## Set up, then run every test: notebooks, commands, clean installs, the site and JupyterLab in a browser
	@"$(PYTHON)" scripts/environment.py --torch "$(TORCH)" --extras dev,bench --chromium
	@$(BIN)/python -m pytest -n 3 --dist loadfile $(ARGS)

test-oldest: python ## Run the library with the oldest versions that it asks for, all at once
	@"$(PYTHON)" scripts/environment.py --venv .venv-oldest --extras "" --pins oldest --also pytest
	@$(VERSIONS)

test-colab: python ## Run the library with Colab's versions (scripts/colab.txt)
	@"$(PYTHON)" scripts/environment.py --venv .venv-colab --extras "" --pins scripts/colab.txt --also pytest
	@$(VERSIONS)

test-newest: python ## Run the library with the newest version of everything
	@"$(PYTHON)" scripts/environment.py --venv .venv-newest --extras "" --also pytest
	@$(VERSIONS)

docs: env ## Build the site in _docs
	@$(BIN)/python scripts/build_docs.py $(ARGS)

bench: bench-env ## Measure the functions beside their peers (timm, kornia, ttach, torchvision, fastai)
	@$(BIN)/python -m pytest bench $(ARGS)

env: python
	@"$(PYTHON)" scripts/environment.py --torch "$(TORCH)"

bench-env: python
	@"$(PYTHON)" scripts/environment.py --torch "$(TORCH)" --extras dev,bench

python:
	@command -v "$(PYTHON)" > /dev/null || { echo '$(NEEDS), and there is no "$(PYTHON)" here: install it, or name one with make PYTHON=…' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] < (3, $(MINOR)))' || { echo "$(NEEDS); $(PYTHON) is $$("$(PYTHON)" --version 2>&1): name a newer one with make PYTHON=…" >&2; exit 1; }
