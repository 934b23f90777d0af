# The whole project from a clean machine: `make demo`. Each target installs what it needs first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test test-heavy check format reference docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints/cpu.txt
	@echo "installing PyTorch and the project into $(VENV): 3 GB; minutes, by the speed of the network"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt torch
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt -e '.[dev,decord]'
	touch $@

demo: $(STAMP)
	$(BIN)/ex4d demo --config configs/tiny.yaml --output out/demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-heavy: $(STAMP)
	$(BIN)/python -m pytest -m heavy --timeout=3600

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(STAMP)
	$(BIN)/python docs/make_reference.py docs/reference

docs: reference
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/render.py
	$(BIN)/python benchmarks/warp_truth.py
	$(BIN)/python benchmarks/loader.py --hardware "$$(nproc) $$(uname -m) cores"
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf out build dist *.egg-info
