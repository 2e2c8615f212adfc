# `make help` lists what can be done here. Everything runs in .venv, which is made when it is first needed.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := constraints.txt

# glibc returns large blocks to the system and faults them in again at every step; keeping them saves about a tenth.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000

.DEFAULT_GOAL := help
.PHONY: help venv install demo study test fuzz soak quality format bench newest clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Train every stage at miniature scale, evaluate, write report/ (ARGS="--quick" for two minutes)
	$(KEEP_MEMORY) $(BIN)/ett demo $(ARGS)

study: $(STAMP)  ## Run the ablations of the paper at miniature scale, some 9 hours of two cores (ARGS="--quick" for minutes)
	$(KEEP_MEMORY) $(BIN)/ett study $(ARGS)

test: $(STAMP)  ## Run all tests, one file to a core at a time (ARGS="tests/train -k resume" for some)
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(ARGS)

fuzz: $(STAMP)  ## Give 1,000 hostile inputs to every door, some 4 minutes (ARGS="--only recipes --count 100" for some)
	$(BIN)/python -m tests.campaigns.fuzz $(ARGS)

soak: $(STAMP)  ## Train every stage and disturb it 100 times, some 7 minutes (ARGS="--kills 20 --stage chat")
	$(BIN)/python -m tests.campaigns.soak $(ARGS)

quality: $(STAMP)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Repair style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Run the benchmarks
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

venv: $(BIN)/python  ## Make the environment, empty

install: $(STAMP)  ## Make the environment and install everything into it

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "ETT needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
		echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@if uv --version >/dev/null 2>&1; then uv venv --quiet --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV); \
	else $(PYTHON) -m venv $(VENV) || { \
		echo "Could not make $(VENV). On Debian and Ubuntu: apt install python3-venv (or install uv)." >&2; exit 1; }; fi

# pip goes quiet for minutes while it downloads torch; uv takes seconds where it is installed. Some of the tested versions
# need Python 3.11; 3.10 gets the newest that there are for it.
$(STAMP): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing ETT and what it needs (some gigabytes the first time) ..."
	@tested="--constraint $(CONSTRAINTS)"; \
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || tested=""; \
	if uv --version >/dev/null 2>&1; then uv pip install --python $(BIN)/python $$tested -e ".[dev]"; \
	else $(BIN)/python -m pip install --disable-pip-version-check $$tested -e ".[dev]"; fi
	@touch $@

newest:  ## Run all tests with the newest versions that the ranges of pyproject.toml allow, in .venv-newest
	$(MAKE) VENV=.venv-newest CONSTRAINTS=/dev/null test

clean:  ## Remove the environment and caches; models and reports stay
	rm -rf $(VENV) .venv-newest build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
