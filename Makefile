# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
#   make demo PYTHON=python3.12 TORCH='torch==2.9.1'      another interpreter, another torch

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL ?= smollm2-135m
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FETCHED := $(VENV)/.fetched-$(MODEL)

.PHONY: setup demo app notebooks notebooks-in-place test shapes lint depth docs bench clean

setup: $(FETCHED)

# torch comes first and is then held, so that a build the user chose (CPU, CUDA) is never replaced.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Bathyscope needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'from importlib.metadata import version as v; assert (2, 8) <= tuple(map(int, v("torch").split(".")[:2])) < (2, 14)' \
	  2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/held.txt
	$(BIN)/python -m pip install --constraint $(VENV)/held.txt --editable '.[dev]'
	touch $@

$(FETCHED): $(INSTALLED)
	$(BIN)/bathyscope models fetch $(MODEL)
	touch $@

demo: $(FETCHED)
	$(BIN)/bathyscope demo --out runs/demo

runs/demo/report.html: | $(FETCHED)
	$(BIN)/bathyscope demo --out runs/demo

# Opens on the demo's saved runs, which are made once; APP='--no-browser --port 8600' passes flags.
app: $(FETCHED) runs/demo/report.html
	$(BIN)/bathyscope app --runs runs $(APP)

notebooks: $(FETCHED)
	mkdir -p runs/notebooks
	PYTHONWARNINGS='ignore:IProgress not found' $(BIN)/jupyter-execute notebooks/*.ipynb --output '../runs/notebooks/{notebook_name}'
	@echo 'with outputs, for any Jupyter front end or editor:' && ls runs/notebooks/*.ipynb

# After a change of what notebooks say: executes them where they lie, and keeps small outputs free of machine and time.
# Needs a Chrome or Chromium for the pictures of figures.
notebooks-in-place: $(FETCHED)
	$(BIN)/python -c "import kaleido" 2>/dev/null || $(BIN)/python -m pip install --constraint $(VENV)/held.txt --editable ".[images]"
	$(BIN)/python notebooks/execute.py

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint $(FETCHED)
	$(BIN)/python -m pytest

# Every method on models whose answer is known, the quick tasks.
depth: $(INSTALLED)
	$(BIN)/bathyscope bench depth --quick

# Shapes and types of every call, checked while tests run; SHAPES=tests checks them under every test.
SHAPES ?= $(addprefix tests/test_,$(addsuffix .py,needs kernels_operators kernels_rows linear linear_maps lens logit_lens statistics))

shapes: $(INSTALLED)
	$(BIN)/python -m pytest $(SHAPES) --jaxtyping-packages=probes,analyses,shape_check.typechecker \
	  -m 'not download and not gpu and not wrong_types'

# A warning is an error. Open docs/_build/html/index.html.
docs: $(INSTALLED)
	$(BIN)/sphinx-build -b html -W --keep-going -q docs docs/_build/html

bench: $(INSTALLED)
	$(BIN)/python -m pip install --constraint $(VENV)/held.txt --editable '.[bench]'
	$(BIN)/bathyscope bench

clean:
	rm -rf build dist runs docs/_build docs/_generated .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find probes analyses app tests -name __pycache__ -prune -exec rm -rf {} +
