PYTHON ?= python
SOURCES = setup.py sb3_sdac_zoo_hook.py sb3_sdac tests $(wildcard examples) $(wildcard benchmarks)

.PHONY: format lint type test test-fast sb3-tests commit-checks check

format:  ## sort imports, apply safe fixes, format
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m black $(SOURCES)

lint:  ## ruff and black, without writing
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m black --check $(SOURCES)

type:
	$(PYTHON) -m mypy $(SOURCES)

test:
	$(PYTHON) -m pytest

test-fast:
	$(PYTHON) -m pytest -m "not slow"

sb3-tests:  ## SB3's own published tests, with SDAC standing in for SAC
	$(PYTHON) tests/helpers/sb3_standin.py

check: lint type  ## the checks that write nothing

commit-checks: format type test-fast
