# Only wraps: python -m venv, pip install, dvc repro, pytest. README shows the plain commands.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: repro test test-all
repro: .venv/installed
	dvc repro
	@python -m pipeline.report --show

test: .venv/installed
	ruff check .
	ruff format --check .
	mypy
	pytest

test-all: .venv/installed
	pytest -m ""

.venv/installed: requirements.lock pyproject.toml
	@test -e .git || git rev-parse --git-dir >/dev/null 2>&1 || { \
	    echo "No git repository here, and DVC needs one. Clone the project, or: git init && git add --all && git commit -m start"; exit 1; }
	$(PYTHON) -c 'import sys; v = sys.version_info; assert (3, 11) <= v < (3, 13), f"Python 3.11 or 3.12 is needed, found {v[0]}.{v[1]}: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade -c requirements.lock pip
	.venv/bin/pip install -c requirements.lock -e '.[test]'
	touch $@
