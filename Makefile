# Everything runs in .venv, which the first command makes. PYTHON: the interpreter to make it with, 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/elijah demo --out out

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

lint: .venv/ready
	$(BIN)/ruff check src tests examples experiments
	$(BIN)/ruff format --check src tests examples experiments
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,bench]'
	touch $@

clean:
	rm -rf .venv out build
