# make demo   set up, then take a small real model from its published checkpoint to an answer in 4 bits, and serve it
# make test   set up, then run the tests
# make check  what CI runs besides: lint and types

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= .demo
BIN    := $(VENV)/bin

.PHONY: demo test check format clean

demo: $(VENV)/base.stamp
	DEMO=$(DEMO) ATOM=$(BIN)/atom sh examples/demo.sh

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/base.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serving]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt $(VENV)/base.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass-dsl==4.8.1 flashinfer-bench==0.1.2
	touch $@
