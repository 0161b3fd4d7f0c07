# Two commands from a fresh clone, with nothing but Python >= 3.11, pip and make:
#   make demo   trains the demonstration
#   make test   runs the tests; make test-slurm those that start a Slurm of their own, make test-transformers5 those of
#               checkpoints with transformers 5, which has no Flax classes to compare with
PYTHON ?= python3
VENV ?= .venv

demo: $(VENV)/ready
	$(VENV)/bin/python main.py

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest --ignore=tests/slurm

test-slurm: $(VENV)/ready
	$(VENV)/bin/python -m pytest tests/slurm

test-transformers5: $(VENV)/transformers5
	PYTHONPATH=$(VENV)/transformers5 $(VENV)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONPATH=$(VENV)/transformers5 $(VENV)/bin/python -m pytest tests/test_checkpoints.py tests/test_predict.py

benchmarks: $(VENV)/ready
	$(VENV)/bin/python -m benchmarks --quick

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/ready: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@

# In a folder of its own, which hides the version of the lock.
$(VENV)/transformers5: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --target $@ huggingface_hub==2.4.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --target $@ --no-deps \
		transformers==5.23.0 tokenizers==0.23.1

.PHONY: benchmarks demo test test-slurm test-transformers5 lint
