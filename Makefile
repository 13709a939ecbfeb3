# make            install everything into .venv
# make demo       the whole road on drawn clips and a tiny model, on a CPU
# make test       lint and tests
# make soak       the tests that run for many minutes
# make lint       ruff only; `make format` repairs what it can
# make lock       bring requirements.lock up to date with pyproject.toml
#                 (LOCK_FLAGS=--upgrade: newest versions of everything)
# make clean      remove .venv and caches
#
# Needs Python >= 3.11 with its headers, a C++ compiler, make and git, and a path without spaces.
# Options: PYTHON=python3.12, PYTEST_ARGS="-k lora", V=1 (show what pip does)

PYTHON ?= python3
PYTEST_ARGS ?=
LOCK_FLAGS ?=

# torch is pinned here and not in the lock: its wheel differs between CPU and CUDA machines, so
# no one hash fits. Another build: make TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
# torch's CUDA wheels bring their own Triton. Beside a CPU build this one's interpreter runs the GPU
# kernels' code in the tests; where there is no wheel of it, those tests are skipped.
TRITON ?= triton==3.7.1
UV ?= uv==0.13.9

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check $(if $(V),,-qq)
OPS := $(VENV)/torch_extensions

# DeepSpeed compiles through `ninja`, which it looks for on PATH; what it compiled stays in .venv.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/$(OPS)"

.PHONY: install demo test soak lint format lock clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "TempoLoRA needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 2; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)

# torch comes first because DeepSpeed's build imports it and uses the setuptools it brings.
# --no-deps: the lock is complete, and pip must not fetch another torch. The stamp is touched last,
# so a failed install is taken up again.
$(VENV)/.installed: pyproject.toml requirements.lock | $(BIN)/pip
	@echo "installing $(TORCH)"
	@$(PIP) install $(TORCH)
	@echo "installing requirements.lock"
	@$(PIP) install --no-deps --no-build-isolation --require-hashes -r requirements.lock
	@$(BIN)/python -c 'import triton' 2> $(VENV)/triton.log || { echo "installing $(TRITON)"; \
	  $(PIP) install --no-deps "$(TRITON)" || echo "no Triton: its tests will be skipped"; }
	@echo "installing tempolora"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip --disable-pip-version-check check
	@touch $@

# On a CPU DeepSpeed compiles its communication at first use (about a minute). Done here once, so
# that no test pays for it and no two ranks race for it.
$(VENV)/.ops: $(VENV)/.installed
	@echo "compiling DeepSpeed's CPU communication"
	@rm -rf $(OPS) && mkdir -p $(OPS)
	@$(RUN) python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' \
	  > $(VENV)/ops.log 2>&1 || { tail -n 20 $(VENV)/ops.log >&2; \
	  echo "DeepSpeed could not compile: it needs a C++ compiler (g++), Python's headers" \
	    "(Debian: python3-dev) and a path without spaces; its output: $(VENV)/ops.log" >&2; exit 2; }
	@touch $@

demo: $(VENV)/.installed
	@$(RUN) tempolora demo

# Two processes, each with whole files: a file's tests share what is slow to import and to make.
# They are taken in the order of tests/conftest.py, not by their number of tests.
# A run killed while it loads a compiled op leaves a lock file on which the next would wait for ever.
test: lint $(VENV)/.ops
	@find $(OPS) -name lock -delete
	@$(RUN) python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

soak: $(VENV)/.ops
	@find $(OPS) -name lock -delete
	@$(RUN) python -m pytest -m soak -o faulthandler_timeout=3600 $(PYTEST_ARGS)

lint: $(VENV)/.installed
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

format: $(VENV)/.installed
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

# One lock for every Python from 3.11 on. torch and the CUDA packages that its wheel names are left
# out; torch's other needs are in.
lock: | $(BIN)/pip
	@$(PIP) install "$(UV)"
	@printf '%s\n' "$(TORCH)" > $(VENV)/torch.txt
	@printf '%s\n' cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 \
	  nvidia-nccl-cu13 nvidia-nvshmem-cu13 triton > $(VENV)/excluded.txt
	@$(BIN)/uv pip compile -q pyproject.toml --extra test -o requirements.lock --generate-hashes \
	  --universal --fork-strategy fewest --python-version 3.11 --no-emit-index-url \
	  --constraint $(VENV)/torch.txt --no-emit-package torch --excludes $(VENV)/excluded.txt \
	  --annotation-style line --custom-compile-command "make lock" $(LOCK_FLAGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
