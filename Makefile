# One command each: `make train`, `make test`. Both make .venv first, from the committed lock.
# PYTHON=… picks an interpreter; otherwise the first one ≥ 3.11 on the PATH that can make a venv.

VENV ?= .venv
LOCK ?= requirements.lock
WORKDIR ?= runs/quickstart
PYTHONS ?= python3 python3.11 python3.12 python3.13 python3.14 python /usr/bin/python3
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PYTEST = $(BIN)/python -m pytest
DEVICES8 = XLA_FLAGS="$(XLA_FLAGS) --xla_force_host_platform_device_count=8"

# With PYTHON given each interpreter has its own environment, so changing it never mixes two.
ifdef PYTHON
PYTHONS = $(PYTHON)
VENV = .venv-$(notdir $(PYTHON))
endif

.PHONY: train test test-all test-oracle venv lint lock clean

train: venv
	$(BIN)/llmjax train --config=experiments/quickstart.py --workdir=$(WORKDIR) $(ARGS)

test: venv lint
	$(PYTEST) tests --ignore=tests/multidevice
	$(DEVICES8) $(PYTEST) tests/multidevice

test-all: venv lint
	$(PYTEST) tests --ignore=tests/multidevice -m "not oracle"
	$(DEVICES8) $(PYTEST) tests/multidevice -m "not oracle"

# The tests that need torch and transformers, in the same environment, from a second lock.
test-oracle: venv
	@if ! cmp -s requirements-oracle.lock $(VENV)/.oracle; then \
	  $(BIN)/python -m pip install --quiet -r $(LOCK) -r requirements-oracle.lock && \
	  cp requirements-oracle.lock $(VENV)/.oracle; fi
	$(PYTEST) tests/oracle -m oracle

lint: venv
	$(BIN)/ruff check .

venv: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
	  found=; \
	  for p in $(PYTHONS); do \
	    if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then found=$$p; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "llmjax: error: no Python ≥ 3.11 that can make a venv (tried: $(PYTHONS));" \
	      "install one (Debian, Ubuntu: apt install python3 python3-venv) or name it:" \
	      "make PYTHON=/path/to/python3.12" >&2; \
	    exit 2; \
	  fi; \
	  echo "making $(VENV) with $$("$$found" --version)"; \
	  rm -rf $(VENV); "$$found" -m venv $(VENV); \
	fi; \
	echo "installing the packages of $(LOCK)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(LOCK); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation -e .; \
	touch $@

# Pins every package for every Python ≥ 3.11; run after changing pyproject.toml.
lock: venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-emit-index-url \
	  --extra dev --constraint constraints.txt -o $(LOCK) pyproject.toml

clean:
	rm -rf .venv .venv-* .jax_cache .pytest_cache .hypothesis .ruff_cache build *.egg-info
