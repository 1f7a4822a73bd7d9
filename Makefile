# Every target sets itself up (packaging/setup.sh); a second run skips that. ARGS passes arguments on.
VENV ?= .venv
PYTHON ?=
WORKER_PYTHON ?=
ARGS ?=
export WORKER_PYTHON
python := $(VENV)/bin/python

.PHONY: help setup demo test lint bench bench-peers selection ring swaps faults fuzz crash kills vm

help:
	@echo "make demo    the product on this machine: broker, publisher, device, a model replaced over the air"
	@echo "make test    the test suite, ruff and mypy     (ARGS='-k ring' passes arguments to pytest)"
	@echo "             (WORKER_PYTHON=/path/to/python3.10 runs the workers of the suite under another Python)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the benchmarks    (ARGS='--only pipeline')"
	@echo "make bench-peers   the same clip and model in other packages, each in an environment of its own    (gigabytes)"
	@echo "make selection   healthy delegates tried 50 times on loaded cores: no false alarm    (ARGS='--trials 10')"
	@echo "make ring    a million frames with checksums through the ring    (ARGS=--arm64: under qemu-aarch64, as root)"
	@echo "make swaps   memory of all processes before and after 20 swaps    (ARGS='--count 100')"
	@echo "make faults  every row of the fault list: claimed by a test that passes, and that misses its guard"
	@echo "make fuzz    mutated input for every parser     (ARGS='--seconds 600')"
	@echo "make crash   every state a power cut can leave of every scene    (ARGS='--all' for all of them)"
	@echo "make kills   a thousand kills of a real updating process         (ARGS='--count 5000 --power 200')"
	@echo "make vm      long absences and power cuts in a virtual machine    (root; ARGS='--cuts 10')"

setup:
	@PYTHON='$(PYTHON)' packaging/setup.sh '$(VENV)'

demo: setup
	@$(python) tests/demo/run.py $(ARGS)

# Lint first and the suite last: both always run, either fails the target, and pytest's closing line stands at the end.
test: setup
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	$(python) -m pytest -n 5 --no-loadscope-reorder $(ARGS) || status=1; \
	exit $$status

lint: setup
	@status=0; \
	$(python) -m ruff check || status=1; \
	$(python) -m mypy || status=1; \
	exit $$status

bench: setup
	@$(python) tests/bench/run.py $(ARGS)

bench-peers: setup
	@$(python) tests/bench/peers.py $(ARGS)

selection: setup
	@$(python) -m tests.bench.alarms $(ARGS)

ring: setup
	@$(python) -m tests.bench.ringcheck $(ARGS)

swaps: setup
	@$(python) -m tests.bench.swaps $(ARGS)

faults: setup
	@$(python) -m tests.meta.faults $(ARGS)

fuzz: setup
	@$(python) -m tests.fuzz.campaign $(ARGS)

crash: setup
	@$(python) tests/crash/run.py $(ARGS)

kills: setup
	@$(python) tests/crash/kills.py $(ARGS)

vm: setup
	@$(python) tests/vm/run.py $(ARGS)
