# From a fresh clone, with nothing but Python >= 3.11, pip and make:
#   make demo                train the demonstration
#   make test                all tests that need no Slurm
#   make test-slurm          the tests that start their own Slurm (skipped where it is not installed)
#   make test-transformers5  the tests of checkpoints and predictions, with transformers 5
#   make gpu-compile         what `check --gpus=...` needs to compile for GPUs (573 MB)
#   make benchmarks          every benchmark with tiny models, to see that the scripts work
#   make audit               known weaknesses of the locked packages (needs the network)
#   make lint                ruff, and the import rules between the sub-packages
PYTHON ?= python3
VENV ?= .venv
# Memory in pages of 2 MB: BUILD.md, "Large pages".
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# A process for each core, up to four; a file's tests share what is costly, so they stay together.
PARALLEL ?= -n auto --maxprocesses=4 --dist=loadfile

demo: $(VENV)/ready
	$(VENV)/bin/python main.py

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest --ignore=tests/slurm $(PARALLEL)

test-slurm: $(VENV)/ready
	$(VENV)/bin/python -m pytest tests/slurm

test-transformers5: $(VENV)/transformers5
	PYTHONPATH=$(VENV)/transformers5 $(VENV)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONPATH=$(VENV)/transformers5 $(VENV)/bin/python -m pytest tests/test_checkpoints.py tests/test_predict.py $(PARALLEL)

benchmarks: $(VENV)/ready
	$(VENV)/bin/python -m benchmarks --quick
	$(VENV)/bin/python -m benchmarks gpu gpu-parts --quick
	$(VENV)/bin/python -m benchmarks accuracy --quick

audit: $(VENV)/audit
	PYTHONPATH=$(VENV)/audit $(VENV)/bin/python -m pip_audit -r requirements.lock --require-hashes --disable-pip

$(VENV)/audit: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --target $@ pip-audit

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

gpu-compile: $(VENV)/gpu-compile

# In a folder of its own: among the packages, JAX would try to use it in each run and complain that there is no GPU.
$(VENV)/gpu-compile: gpu-compile.lock $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --target $@ --no-deps \
		--require-hashes -r gpu-compile.lock
	touch $@

$(VENV)/ready: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@

# In a separate folder, which comes before the locked version on PYTHONPATH.
$(VENV)/transformers5: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --target $@ huggingface_hub==2.4.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --target $@ --no-deps \
		transformers==5.23.0 tokenizers==0.23.1

.PHONY: audit benchmarks demo gpu-compile test test-slurm test-transformers5 lint
