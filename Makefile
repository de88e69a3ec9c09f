# make demo   crossvit_18 on a photograph, compared with timm
# make test   the tests
# Both set up .venv on the first run and install nothing that is there already.

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
WORKERS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# What the installed package depends on; a change installs again.
INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.PHONY: demo test test-drawn test-all test-faults test-sanitized test-exhaustive test-packaging bench \
  bench-smoke hardware lint format clean

demo: $(VENV)/.demo
	$(BIN)/crossvit demo examples/cat.png

# The seed draws random calls and, where OF=N is given, the part of N that runs; SEED=... repeats a run.
SEED := $(or $(SEED),$(shell date +%s))
SHARD = $(if $(OF),--shard $(shell expr $(SEED) % $(OF))/$(OF))
DRAW = --hypothesis-seed=$(SEED) $(SHARD)
PARALLEL := -n $(WORKERS) --dist worksteal

# Each kernel, operation, model and command (tests/tiers.py).
test: $(VENV)/.test
	$(PYTEST) tests $(PARALLEL) $(DRAW) -m "not (drawn or packaging or sanitized or exhaustive)"

# What `make test` leaves out: all sizes, dtypes and targets. OF=48 takes a forty-eighth.
test-drawn: $(VENV)/.test
	$(PYTEST) tests $(PARALLEL) $(DRAW) -m "drawn and not (packaging or sanitized or exhaustive)"

# Both.
test-all: $(VENV)/.test
	$(PYTEST) tests $(PARALLEL) $(DRAW) -m "not (packaging or sanitized or exhaustive)"

# Mistakes put into the kernels, which tests have to notice.
test-faults: $(VENV)/.test
	$(PYTEST) tests $(PARALLEL) $(DRAW) -m fault

# The native module with AddressSanitizer and UndefinedBehaviorSanitizer through the contract.
test-sanitized: $(VENV)/.test
	$(PYTEST) tests $(DRAW) -m sanitized

# 100,000 random calls, every seeded fault, every kernel on every GPU's compiler.
test-exhaustive: $(VENV)/.test
	$(PYTEST) tests $(PARALLEL) $(DRAW) -m exhaustive

# Builds and installs in fresh environments, once for every Python on this machine; needs a package index.
test-packaging: $(VENV)/.test
	$(PYTEST) tests $(DRAW) -m packaging

bench: $(VENV)/.test
	$(PYTEST) benchmarks --benchmark-only

# One case of each benchmark in a minute: whether they run and write their report, not how fast anything is.
bench-smoke: $(VENV)/.test
	$(PYTEST) benchmarks --benchmark-only --smoke

# On a GPU only: builds, checks and measures everything, and fills docs/hardware.md. Under eight minutes.
hardware: $(VENV)/.test
	$(BIN)/python -m benchmarks.hardware

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

# Extras contain each other: dev has test, test has demo. A stamp also stands for those it contains.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.python $(INPUTS)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[$(subst .,,$(notdir $@))]'
	@touch $(VENV)/.demo
	@case $@ in *.test|*.dev) touch $(VENV)/.test;; esac
	@touch $@

# The first Python of 3.10 or newer that can make environments, unless PYTHON names one.
$(VENV)/.python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10 python; do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV) && touch $@ && exit 0; fi; done; \
	echo 'Python 3.10 or newer with the module venv is needed; name one with make PYTHON=...' >&2; exit 1

clean:
	rm -rf $(VENV) build dist out *.egg-info crossvit_kernels/_native*.so crossvit_kernels/_build_report.json
