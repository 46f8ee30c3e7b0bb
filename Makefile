# Two commands set everything up: `make demo` and `make test`. Each makes .venv if it is not there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_RUN := runs/demo
# Empty for the newest releases that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt

.PHONY: demo test lint install clean

demo: $(VENV)/.installed
	$(BIN)/flap-export run pipelines/demo.yaml --output $(DEMO_RUN)

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
