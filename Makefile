# Two commands for a newcomer: `make demo` and `make test`. Both set up all they need; the second run reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint unit soak constraints clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 24

setup: $(STAMP) ## virtual environment with everything, exact versions of constraints.txt

# PIP_CONSTRAINT in the environment takes the place of a constraint set in pip's own configuration, which may
# cap torch below the pinned version; the package index and mirrors of that configuration stay in force.
$(STAMP): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (first run: two to four minutes, mostly downloading torch)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "python's venv module is missing (Debian: apt-get install python3-venv)"; exit 2; }
	@( while sleep 5; do printf .; done ) & dots=$$!; trap 'kill $$dots 2>/dev/null' EXIT INT TERM; \
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --editable '.[demo,test,dev]'
	@touch $@; echo " done"

demo: $(STAMP) ## pack, train (stopped and resumed), evaluate, report on real images: under 6 minutes
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

test: lint ## lint, types, the whole test suite
	@$(BIN)/python -m pytest tests

check: lint unit ## the developer's loop: lint, types, unit and property tests

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@git rev-parse --git-dir >/dev/null 2>&1 || exit 0; $(BIN)/pre-commit run --all-files

unit: $(STAMP)
	@$(BIN)/python -m pytest tests/unit tests/property

soak: $(STAMP) ## long random-fault schedules: FAULTS=20
	@HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest tests/property --timeout 1800
	@$(BIN)/python -m pytest tests -m soak --faults $(or $(FAULTS),20)

constraints: $(STAMP) ## renew constraints.txt from the installed versions (after the tests passed)
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -v '@ file'; } > constraints.new && mv constraints.new constraints.txt
	@touch $(STAMP)

clean: ## remove the virtual environment and what the demo made
	rm -rf $(VENV) runs data
