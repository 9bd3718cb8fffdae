# make demo          install, fetch, train, score, serve and ask, then stop   (KEEP=1 keeps it serving)
# make test          install, lint, types and tests
# PYTHON=python3.12  another interpreter       PIP_ARGS=...  more arguments for pip (an index with CPU builds of torch)
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.txt
# The stamp's name holds the lock's hash, so that a changed lock is installed anew and an unchanged one is not.
STAMP := $(VENV)/.installed-$(shell cat $(LOCK) pyproject.toml | sha256sum | cut -c1-16)

.PHONY: demo test lint types unit format clean install

demo: $(STAMP)
	$(BIN)/python examples/demo/demo.py $(if $(KEEP),--keep)

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/pytest -n 2

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP):
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS) "$$(grep '^torch==' $(LOCK))"
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS) --no-deps -r $(LOCK)
	# pip compiles on one core; some packages ship templates that are not Python, which is no fault of the install.
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
