# Two commands from a fresh clone, with nothing but Python >= 3.11, pip and make:
#   make demo   trains the demonstration
#   make test   runs the tests; make test-slurm those that start a Slurm of their own
PYTHON ?= python3
VENV ?= .venv

demo: $(VENV)/ready
	$(VENV)/bin/python main.py

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest --ignore=tests/slurm

test-slurm: $(VENV)/ready
	$(VENV)/bin/python -m pytest tests/slurm

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/ready: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@

.PHONY: demo test test-slurm lint
