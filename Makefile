# make demo      environment, then the whole workflow on the built-in photographs, then what to look at
# make test      the same environment with the test extras, then ruff and the whole test suite
# make lint      ruff, codespell, mypy            make format    rewrite the sources as `make lint` wants them
# make coverage  the tests again, with every line that they reach, in what they start as well; slower, so not `make test`
# make docs      the documentation site in site/, readable without a network
# make faults    COUNT=300 SEED=1 faults in copies of a tiny project, 15 to 60 minutes; a dozen are part of `make test`
# make faults-hour  a training run of MINUTES=60 with a fault a minute and MLflow away a third of the time
# make fuzz      COUNT=10000 SEED=1 mutated files for every reader, about an hour; some are part of `make test`
# make fuzz-coverage  TARGET=tar (or names) SECONDS=60 guided by coverage, with atheris (Linux), which is installed for it
# make audit     the pinned packages against the advisories of PyPI, which needs a network
# make lock      requirements/*.lock anew, the hashes that the image is built with, from pyproject.toml and constraints.txt
# make browser   the report in Chromium, which has to be installed; not part of `make test`
# make pictures  docs/report.png and docs/mlflow-*.png anew from artifacts/report and the MLflow store, in Chromium
# make clean     remove what the workflow made (not the environment)
#
# Outside git and in folders below the project, `make` and `dpar-cli` work as well; `make environment` only installs.

PYTHON      ?= python3
PIP_OPTIONS ?=
JOBS        ?= 3
VENV        := .venv
BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip --disable-pip-version-check
TORCH_CPU   ?= https://download.pytorch.org/whl/cpu
SUPPORTED   := 3.11 to 3.14
PYTEST      := -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Traced, not by probes in the bytecode: torch cannot compile such code, nor can Ray send it, and users run other code.
COVER       := $(addprefix --cov=,dpar_core stages pipeline) --cov-config=/dev/null --cov-report=json:.coverage.json
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Byte-compiling the 20,000 installed files takes two cores 65 s, and a quarter of them is ever imported: what a run imports is
# compiled by importing it, on two cores, the rest by whoever comes to it first. So that this is kept, as many containers tell
# Python not to, the variable that does is taken out of the environment.
unexport PYTHONDONTWRITEBYTECODE
COMPILE     := $(BIN)/python -c "import torch._dynamo, torch.distributed.checkpoint, ray.train.torch, ray.tune" & \
               first=$$!; $(BIN)/python -c "import mlflow.store.tracking.sqlalchemy_store, matplotlib.pyplot, skimage.data, dvc.cli" && wait $$first
.PHONY: demo test lint format types coverage docs faults faults-hour fuzz fuzz-coverage audit lock browser pictures environment clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(BIN)/dpar-cli run

environment: $(VENV)/.installed

test: $(VENV)/.tested
	@$(BIN)/ruff check .
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python $(PYTEST) $(COVER) $(TESTS)
	@$(BIN)/python -m tests.helpers.coverage .coverage.json

lint: $(VENV)/.tested
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/codespell
	@$(BIN)/mypy

types: $(VENV)/.tested
	@$(BIN)/mypy

format: $(VENV)/.tested
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

browser: $(VENV)/.tested
	@$(BIN)/python -m pytest tests/browser/check_report.py -o python_functions='check_*'

pictures: $(VENV)/.installed
	@$(BIN)/python -m tests.browser.screenshots
	@$(BIN)/python -m tests.browser.screenshots --mlflow

faults: $(VENV)/.tested
	@$(BIN)/python -m tests.faults --count $(or $(COUNT),300) --seed $(or $(SEED),1)
	@$(BIN)/python -m tests.faults --kinds surroundings,beside,dvc,nodes --count 30 --seed $(or $(SEED),1)

faults-hour: $(VENV)/.tested
	@$(BIN)/python -m tests.faults.hour --minutes $(or $(MINUTES),60) --seed $(or $(SEED),1)

fuzz: $(VENV)/.tested
	@$(BIN)/python -m tests.fuzz --count $(or $(COUNT),10000) --seed $(or $(SEED),1)

fuzz-coverage: $(VENV)-tools/.installed
	@$(VENV)-tools/bin/python -m pip --disable-pip-version-check install -q $(PIP_OPTIONS) atheris
	@PYTHONPATH="$(CURDIR)" $(VENV)-tools/bin/python -P tests/fuzz/coverage.py $(or $(TARGET),tar) $(or $(SECONDS),60)

audit: $(VENV)-tools/.installed
	@$(VENV)-tools/bin/python requirements/audit.py $(VENV)-tools/bin/pip-audit

lock: $(VENV)-tools/.installed
	@$(VENV)-tools/bin/python requirements/lock.py $(VENV)-tools/bin/uv $(TORCH_CPU)

# In an environment of its own: what these tools need is not pinned with the rest.
$(VENV)-tools/.installed:
	@$(PYTHON) -m venv $(VENV)-tools
	@$(VENV)-tools/bin/python -m pip --disable-pip-version-check install -q $(PIP_OPTIONS) uv pip-audit packaging
	@touch $@

coverage: $(VENV)/.tested
	@$(BIN)/coverage erase
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/coverage run $(PYTEST) $(TESTS)
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report

docs: $(VENV)/.documented
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html; with the search box: $(BIN)/python -m http.server --bind 127.0.0.1 --directory site"

clean:
	rm -rf artifacts work site

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 14) else f"Python $(SUPPORTED) is needed; $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.13 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV) (2 minutes, about 2 GB without CUDA) ..."
	@$(PIP) install -qq --no-compile $(PIP_OPTIONS) -c constraints.txt -e .
	@$(COMPILE)
	@touch $@

$(VENV)/.tested: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV), with what the tests need (2 minutes, about 2 GB without CUDA) ..."
	@$(PIP) install -qq --no-compile $(PIP_OPTIONS) -c constraints.txt -e '.[test]'
	@$(COMPILE)
	@touch $(VENV)/.installed $@

$(VENV)/.documented: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(PIP) install -qq --no-compile $(PIP_OPTIONS) -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@touch $@
