PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO := results/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lint leaderboard speed clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## train two methods on synthetic scans, print the leaderboard, write the report
	$(PY) benchmarks/run.py --method supervised --dataset phantom --labeled 2 --out $(DEMO)
	$(PY) benchmarks/run.py --method ua_mt --dataset phantom --labeled 2 --out $(DEMO)
	$(PY) benchmarks/leaderboard.py --results $(DEMO)
	$(PY) benchmarks/report.py --results $(DEMO)

test: $(STAMP) ## run the tests, a worker per core (PYTEST_ARGS are passed on)
	$(PY) -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

test-long: $(STAMP) ## run the tests that take minutes: crashes at many moments, long runs, Ray (pip install -e '.[sweep]')
	$(PY) -m pytest -m long $(PYTEST_ARGS)

lint: $(STAMP) ## check the style
	$(PY) -m ruff check .

leaderboard: $(STAMP) ## rebuild leaderboard, method cards and reading list from the committed records and lists
	$(PY) benchmarks/leaderboard.py
	$(PY) benchmarks/methods.py
	$(PY) benchmarks/literature.py

speed: $(STAMP) ## time this suite against the peers' way and write docs/speed.md (SPEED_ARGS are passed on)
	$(PY) benchmarks/speed/all.py $(SPEED_ARGS)

clean: ## remove the environment and the demo's results
	rm -rf $(VENV) $(DEMO)

# One set-up for all targets. An environment that is already there is kept and brought up to date.
# torch goes first, so that the constraint decides its version before any other package asks for one.
$(STAMP): setup.cfg constraints.txt
	@python="$(PYTHON)"; if [ -x $(PY) ]; then python=$(PY); fi; \
	command -v "$$python" > /dev/null || \
		{ echo "ssl4mis needs Python 3.11 or newer; '$$python' was not found: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ssl4mis needs Python 3.11 or newer; '$$python' is $$("$$python" -V 2>&1): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@[ -x $(PY) ] || "$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt torch
	$(PY) -m pip install -c constraints.txt -e '.[test,parity,tensorboard,dev]'
	@touch $@
