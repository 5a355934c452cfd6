# Everything runs from .venv, which the targets make by themselves out of `python3` and a package index.
#   make demo       set-up, then the whole way: base -> sft -> ppo on the bundled model
#   make test       set-up, then the default test suite
# Another interpreter: make test PYTHON=python3.12      Options of the demo: make demo ARGS="--seed 1"

PYTHON ?= python3
ARGS   ?=
BIN    := .venv/bin
# Two processes: most tests are small and run on one thread each. make test WORKERS=8 on a larger machine.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-all check mutants bench lock clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      set up and run the demo: a small real model learns a task (ARGS=\"...\" for its options)"
	@echo "make test      set up and run the default test suite"
	@echo "make test-all  the same with the slow tests and those that want an accelerator"
	@echo "make check     ruff, pyright, import-linter, the default test suite, then the advisories on every pin"
	@echo "make mutants   plant the faults of tests/mutants.toml and see that the tests notice (15 minutes on two cores; before a release)"
	@echo "make bench     speed: roofline, scaling, exactness, serving, and the comparison with TRL (hours on two cores)"
	@echo "make .venv     set up only"
	@echo "make lock      write requirements/ anew (for maintainers; ARGS=--upgrade takes the newest versions)"
	@echo "make clean     remove .venv and caches; runs/ stays"

.venv: .venv/.ready

.venv/.ready: requirements/torch.txt requirements/cuda.txt requirements/build.txt requirements/locked.txt requirements/compiled.txt pyproject.toml scripts/set_up.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "upslope needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12 ..." % v)'
	@$(PYTHON) scripts/set_up.py
	@touch $@

.venv/.ready-check: .venv/.ready requirements/check.txt
	@echo "== the checkers: ruff, pyright and pip-audit"
	@$(BIN)/python -m pip --disable-pip-version-check install -qq --require-hashes --no-deps -r requirements/check.txt
	@touch $@

demo: .venv/.ready
	$(BIN)/upslope demo $(ARGS)

test: .venv/.ready
	$(PYTEST) -m "not slow and not gpu"

test-all: .venv/.ready
	$(PYTEST)

check: .venv/.ready-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow and not gpu"
	$(BIN)/python scripts/audit.py

bench: .venv/.ready
	$(BIN)/python benchmarks/roofline.py --json
	$(BIN)/python benchmarks/scaling.py --json
	$(BIN)/python benchmarks/exactness.py --json
	$(BIN)/python benchmarks/serve.py --json
	$(BIN)/python benchmarks/vs_trl.py --json

lock:
	$(PYTHON) scripts/lock.py $(ARGS)

mutants: .venv/.ready
	$(BIN)/python scripts/mutants.py $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +
