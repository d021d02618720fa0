# Two commands do everything on a fresh machine with python3 and make:  make demo   and   make test

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo

.PHONY: demo test lint bench format browser clean

demo: .venv/installed  ## the whole path on the built-in data; says where the report is
	$(BIN)/clearwing demo --out $(OUT) --overwrite

test: .venv/installed browser  ## all tests
	$(BIN)/python -m pytest

lint: .venv/installed  ## style and types
	$(BIN)/ruff check src tests examples benchmarks docs
	$(BIN)/ruff format --check src tests examples benchmarks docs
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix src tests examples benchmarks docs
	$(BIN)/ruff format src tests examples benchmarks docs

bench: .venv/installed  ## what the benchmarks need beyond the project, then those that need no data
	echo 'opencv-python; sys_platform == "never"' > .venv/override.txt  # grad-cam asks for it; the headless build serves
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[bench]' --constraint constraints.txt --override .venv/override.txt
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/explain.py

# The virtual environment: uv installs the project with the versions of constraints.txt.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clearwing needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[peers,onnx]' --group dev --constraint constraints.txt
	touch $@

# Tests of the pages drive Debian's Chromium. Elsewhere, or without the right to install, they skip with the reason.
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium fonts-dejavu-core >/dev/null; \
	fi

clean:
	rm -rf .venv runs build dist .pytest_cache .ruff_cache .mypy_cache
