# make demo   environment, then the whole workflow on the built-in photographs, then what to look at
# make test   the same environment with the test extras, then the whole test suite
# make lint   ruff                     make clean   remove what the workflow made (not the environment)

PYTHON ?= python3
VENV   := .venv
JOBS   ?= 2
BIN    := $(CURDIR)/$(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(BIN):$(PATH)

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(BIN)/dpar-cli run

test: $(VENV)/.tested
	@$(BIN)/ruff check .
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/.tested
	@$(BIN)/ruff check .

clean:
	rm -rf artifacts work

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else f"Python 3.11 or 3.12 is needed, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV) (2 to 3 minutes, about 2 GB without CUDA) ..."
	@$(PIP) install -qq -c constraints.txt -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@$(PIP) install -qq -c constraints.txt -e '.[test]'
	@touch $@
