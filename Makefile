# Every target sets itself up (packaging/setup.sh); a second run skips that. ARGS passes arguments on.
VENV ?= .venv
PYTHON ?=
ARGS ?=
python := $(VENV)/bin/python

.PHONY: help setup demo test lint bench

help:
	@echo "make demo    the product on this machine: broker, publisher, device, a model replaced over the air"
	@echo "make test    the test suite, ruff and mypy     (ARGS='-k ring' passes arguments to pytest)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the benchmarks"

setup:
	@PYTHON='$(PYTHON)' packaging/setup.sh '$(VENV)'

demo: setup
	@$(python) tests/demo/run.py $(ARGS)

# Lint first and the suite last: both always run, either fails the target, and pytest's closing line stands at the end.
test: setup
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	$(python) -m pytest $(ARGS) || status=1; \
	exit $$status

lint: setup
	@status=0; \
	$(python) -m ruff check || status=1; \
	$(python) -m mypy || status=1; \
	exit $$status

bench: setup
	@$(python) tests/bench/run.py $(ARGS)
