# make demo      environment, then the whole workflow on the built-in photographs, then what to look at
# make test      the same environment with the test extras, then ruff and the whole test suite
# make lint      ruff, codespell, mypy            make format    rewrite the sources as `make lint` wants them
# make coverage  the tests again, with the lines that they reach; slower, so `make test` leaves it out
# make docs      the documentation site in site/, readable without a network
# make browser   the report in Chromium, which has to be installed; not part of `make test`
# make pictures  docs/report.png anew from artifacts/report, in Chromium
# make clean     remove what the workflow made (not the environment)
#
# Outside git and in folders below the project, `make` and `dpar-cli` work as well; `make environment` only installs.

PYTHON      ?= python3
PIP_OPTIONS ?=
JOBS        ?= 2
VENV        := .venv
BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip --disable-pip-version-check
SUPPORTED   := 3.11 to 3.14
PYTEST      := -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Byte-compiling the 20,000 installed files takes pip 80 s; on all cores at once it is faster. Without it every process would
# compile what it imports anew wherever PYTHONDONTWRITEBYTECODE is set, as in many containers. Some packages ship files for
# other Pythons, which do not compile and are never imported.
COMPILE     := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
.PHONY: demo test lint format types coverage docs browser pictures environment clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(BIN)/dpar-cli run

environment: $(VENV)/.installed

test: $(VENV)/.tested
	@$(BIN)/ruff check .
	@OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(TESTS)

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

coverage: $(VENV)/.tested
	@$(BIN)/coverage erase
	@OMP_NUM_THREADS=1 $(BIN)/coverage run $(PYTEST) $(TESTS)
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
	@echo "Installing into $(VENV) (2 to 3 minutes, about 2 GB without CUDA) ..."
	@$(PIP) install -qq --no-compile $(PIP_OPTIONS) -c constraints.txt -e .
	@$(COMPILE)
	@$(BIN)/dpar-cli params list > /dev/null
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@$(PIP) install -qq --no-compile $(PIP_OPTIONS) -c constraints.txt -e '.[test]'
	@$(COMPILE)
	@touch $@

$(VENV)/.documented: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(PIP) install -qq --no-compile $(PIP_OPTIONS) -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@touch $@
