# make demo | test | check | hip | test-hip | bench | build | clean
#
# Every target works from nothing. Where the current python3 has torch 2.10 or later, that environment is used as it is;
# otherwise .venv is made and $(TORCH) installed there, once. Override with PYTHON=..., TORCH=..., MAX_JOBS=...

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv

# What the machine has: a GPU's driver decides, so that a machine with a compiler but no GPU does not wait for GPU code.
GPU := $(wildcard /dev/nvidiactl /dev/kfd)
export FLASH_ATTENTION_BACKEND ?= $(if $(GPU),auto,cpu)

HAS_TORCH := $(shell $(PYTHON) -c 'from importlib.metadata import version as v; \
  print(tuple(map(int, v("torch").split(".")[:2])) >= (2, 10))' 2>/dev/null)
ifeq ($(HAS_TORCH),True)
  PY := $(PYTHON)
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif

.PHONY: build demo test check lint format hip test-hip bench clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "python: $(PY) ($(if $(filter True,$(HAS_TORCH)),it has torch,made on first use)), backend: $(FLASH_ATTENTION_BACKEND)"

$(VENV)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: Python 3.10 or newer is needed (set PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { echo "error: this Python cannot make virtual environments (apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --upgrade $(TORCH) numpy setuptools
	touch $@

# Installs, of the modules named, those that are missing.
need = @missing=$$($(PY) tools/missing.py $(1)); test -z "$$missing" || $(PY) -m pip install --quiet $$missing

build: $(READY)
	@command -v $${CXX:-c++} >/dev/null || { echo "error: no C++ compiler (apt-get install g++)"; exit 1; }
	@command -v ninja >/dev/null || $(PY) -c 'import ninja' 2>/dev/null || $(PY) -m pip install --quiet ninja
	$(PY) -m tools.build

# Threads that wait for others sleep: spinning, they take a busy machine's time from those they wait for.
demo test: export OMP_WAIT_POLICY ?= PASSIVE

demo: build
	$(PY) -m flash_attn demo

test: build
	$(call need,pytest hypothesis numpy)
	$(PY) -m pytest

check: lint test

lint: $(READY)
	$(call need,ruff mypy)
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) tools/check_format.py
	$(PY) tools/check_layering.py
	$(PY) -m mypy

format: $(READY)
	$(call need,ruff)
	$(PY) -m ruff format
	$(PY) -m ruff check --fix

# Hipifies csrc/cuda, compiles every kernel for gfx90a, links the library, and reports what each kernel takes of the
# machine. Needs hipcc, neither a ROCm torch nor a GPU. One level of the host is enough here.
hip: export FLASH_ATTENTION_BACKEND := hip
hip: export FLASH_ATTENTION_ARCHS ?= gfx90a;generic
hip: $(READY)
	@command -v ninja >/dev/null || $(PY) -c 'import ninja' 2>/dev/null || $(PY) -m pip install --quiet ninja
	$(PY) -m tools.build --no-install
	$(PY) -m tools.build.hip_kernels

# HIP_TESTS: further arguments of pytest; -m "not grid" leaves out the long part.
test-hip: hip build
	$(call need,pytest hypothesis numpy)
	$(PY) -m pytest tests/hip $(HIP_TESTS)

bench: build
	$(PY) -m flash_attn bench

clean:
	rm -rf build dist *.egg-info flash_attn/_C*.so flash_attn/_build_info.py
