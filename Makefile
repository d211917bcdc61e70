# Longdraft: set-up and the commands of every day. `make help` lists them.
#   PYTHON   interpreter that builds .venv (3.11 or later)
#   TORCH    auto | cpu | cuda: which build of torch to install; auto takes cuda where nvidia-smi answers

PYTHON ?= python3
TORCH ?= auto
TORCH_VERSION := 2.13.0
TRITON_VERSION := 3.9.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --prefer-binary --constraint constraints.txt
UV := $(BIN)/python -m uv pip install --quiet --compile-bytecode --system-certs --index-strategy unsafe-best-match --python $(BIN)/python --constraint constraints.txt
STAMP := $(VENV)/.installed

ifeq ($(TORCH),auto)
TORCH_BUILD := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
else
TORCH_BUILD := $(TORCH)
endif

.PHONY: help demo test acceptance lint format clean

help: ## list the targets
	@echo "Longdraft: self-hosted batch inference"
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "Variables: PYTHON=$(PYTHON)  TORCH=$(TORCH) (auto, cpu, cuda)"

demo: $(STAMP) ## from zero: services, a job on a real model, live progress, answers and the bill; then stops everything
	@$(BIN)/longdraft demo

test: $(STAMP) lint ## lint, types and the whole test suite
	@echo "==> tests"
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(STAMP) ## ruff and mypy alone
	@echo "==> lint, format, types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## rewrite the sources the way ruff likes them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

acceptance: $(STAMP) ## the longer checks: one JSON row each in build/acceptance.jsonl (ONLY=name runs one)
	@$(BIN)/python -m tests.acceptance.run $(if $(ONLY),--only $(ONLY))

clean: ## remove the environment, caches and build outputs (models stay in the user's cache folder)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Longdraft needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing). Try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }

# uv installs several times faster, and compiles at once, for wherever no bytecode may be written later. It knows nothing of pip's
# configuration: what it is told here, and where it fails pip takes over.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_EXTRA_INDEX_URL
export UV_EXTRA_INDEX_URL ?= $(PIP_EXTRA_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

# torch first and by itself: its build is a choice, and everything else is locked in constraints.txt. The project's own build runs with the
# locked setuptools too (--no-build-isolation), so no step fetches a version that is not written down here.
$(STAMP): $(VENV)/bin/python pyproject.toml constraints.txt Makefile
	@echo "==> installing torch $(TORCH_VERSION) ($(TORCH_BUILD)) and the dependencies; the first time this may take minutes"
	@$(PIP) setuptools uv
	@install() { $(UV) "$$@" || $(PIP) "$$@"; }; \
	case "$(TORCH_BUILD)" in \
	  cpu) if install "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	      || install --extra-index-url "$(TORCH_INDEX)" "torch==$(TORCH_VERSION)+cpu" 2>/dev/null; \
	    then install "triton==$(TRITON_VERSION)"; \
	    else echo "    no CPU build of torch found; taking the default one, which may bring GPU libraries (gigabytes) and its own triton"; \
	         install "torch==$(TORCH_VERSION)"; fi ;; \
	  cuda) install "torch==$(TORCH_VERSION)" ;; \
	  *) echo "TORCH=$(TORCH) is not one of auto, cpu, cuda" >&2; exit 2 ;; \
	esac; \
	install --no-build-isolation --editable ".[engine,embedded,sdk,parquet,plot,dev]"
	@touch $@
