# Each target does its own set-up: a fresh clone needs Python 3.10 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint matrix gpu figures models clean

demo: $(VENV)/.ready
	$(BIN)/falloff compare --output outputs/demo

# A process for every core, each of whose threads wait without work for the others.
test: $(VENV)/.dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks integrations
	$(BIN)/ruff format --check src tests benchmarks integrations
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/figures.py --check
	$(BIN)/python benchmarks/models.py --check

# Tests of the seam with diffusers under every supported version, and of vendor kernels' adapters beside the libraries,
# in environments of their own. Takes long.
matrix: $(VENV)/.dev
	$(BIN)/python tests/matrix/run.py

# What needs a GPU: its tests, then its figures, whose files are named after it: make gpu GPU=h200
GPU ?= gpu
gpu: $(VENV)/.dev
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "PyTorch finds no CUDA device")'
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 tests/gpu
	$(BIN)/python benchmarks/attention.py --output benchmarks/results/attention-$(GPU).json
	$(BIN)/python benchmarks/sla.py --shape wan1.3b-480p --dtype bfloat16 --output benchmarks/results/sla-$(GPU).json
	for shape in wan14b-720p hunyuan-720p; do \
		$(BIN)/python -m falloff bench model --shape $$shape --rounds 3 \
			--output benchmarks/results/model-$(GPU)-$$shape.json || exit; \
	done
	$(BIN)/python benchmarks/figures.py

# Rewrites the tables of README.md from the committed results in benchmarks/results.
figures: $(VENV)/.dev
	$(BIN)/python benchmarks/figures.py

# Tests every family of models, and rewrites docs/models.md from what passed.
models: $(VENV)/.dev
	$(BIN)/python benchmarks/models.py --test

# What a user installs; developers' tools come on top, because some of them are talkative when diffusers finds them.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "falloff needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $@

clean:
	rm -rf $(VENV) .matrix outputs
