# make demo | test | lint | bench | bench-tasks | instructions: each sets up .venv by itself on a machine with Python >= 3.11, a C++ compiler and make.
# make gpu-check: on a machine with a GPU, in the Python environment that is active.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test lint format bench bench-tasks instructions gpu-check clean
.DELETE_ON_ERROR:

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "vitq needs Python 3.11 or newer on the PATH (or make PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: the extension builds against it (--no-build-isolation).
$(VENV)/.torch: | $(VENV)/bin/python
	$(PY) -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install -q "torch>=2.11" torchvision timm "pybind11>=2.13" "cmake>=3.24" ninja
	touch $@

$(STAMP): $(VENV)/.torch $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation -e ".[demo,test,lint]"
	touch $@

demo: $(STAMP)
	$(PY) -m vitq.cli demo --output build/demo

test: $(STAMP)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu' 'tests/*.cpp' 'bench/*.cpp' 'python/*.c')

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu' 'tests/*.cpp' 'bench/*.cpp' 'python/*.c')

# With the peers in the environment (pip install .[bench]) beside them; without, they are named as absent.
bench: $(STAMP)
	$(PY) -m bench.run
	$(PY) -m bench.run --isa avx2 --peers none
	-$(PY) -m bench.instructions --json bench/results/instructions.json
	$(PY) -m bench.update_docs

# What a change of a CPU kernel does to its instruction counts; needs valgrind (apt-get install valgrind).
instructions: $(STAMP)
	@mkdir -p build
	$(PY) -m bench.instructions --json build/instructions.json
	$(PY) -m bench.compare bench/results/instructions.json build/instructions.json

bench-tasks: $(STAMP)
	$(PY) -m bench.tasks
	$(PY) bench/update_docs.py

# With the python that is active, which brings torch and triton for the GPU; nothing is installed.
GPU_PYTHON ?= python3
gpu-check:
	$(GPU_PYTHON) -m bench.gpu.check

clean:
	rm -rf build $(VENV)
