PYTHON ?= python
SOURCES = setup.py sb3_sdac_zoo_hook.py sb3_sdac tests $(wildcard examples) $(wildcard benchmarks) $(wildcard docs/*.py)

.PHONY: format lint type docs test test-fast sb3-tests commit-checks check

format:  ## sort imports, apply safe fixes, format
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m black $(SOURCES)

lint:  ## ruff and black, without writing
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m black --check $(SOURCES)

type:
	$(PYTHON) -m mypy $(SOURCES)

docs:  ## the site, in docs/_build/html; a warning is an error
	$(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build/html

test:
	$(PYTHON) -m pytest

test-fast:
	$(PYTHON) -m pytest -m "not slow"

sb3-tests:  ## SB3's own published tests, with SDAC standing in for SAC
	$(PYTHON) tests/helpers/sb3_standin.py

check: lint type docs  ## the checks that change no source

commit-checks: format type test-fast
