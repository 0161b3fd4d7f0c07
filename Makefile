# Two commands from a fresh clone, with nothing but Python >= 3.11, pip and make:
#   make demo   trains the demonstration
#   make test   runs the tests
PYTHON ?= python3
VENV ?= .venv

demo: $(VENV)/ready
	$(VENV)/bin/python main.py

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/ready: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@

.PHONY: demo test lint
