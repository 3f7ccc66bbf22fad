# Needs Python 3.11 or newer and make. Every target that needs the environment makes it first.
PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
DATASET ?= digits

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: install  ## digits, end to end: a teacher, its cache, a student three ways, the best one as ONNX
	$(BIN)/tspipe teacher --dataset digits
	$(BIN)/tspipe cache --dataset digits
	$(BIN)/tspipe student --cache cache/digits.h5 --compare
	$(BIN)/tspipe export "$$(ls -td runs/digits-* | head -n 1)" --out runs/demo.onnx --force
	@$(BIN)/python -c "from PIL import Image; from tspipe.data.datasets import open_dataset; \
		Image.fromarray(open_dataset('digits').test.read(0)[:, :, 0]).save('runs/demo.png')"
	$(BIN)/tspipe predict runs/demo.onnx runs/demo.png

test: install  ## run all tests
	$(BIN)/pytest -n 2

test-gpu: install  ## the tests that want a GPU
	TSPIPE_TEST_GPU=cuda $(BIN)/pytest tests/test_gpu.py

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make teacher-cache DATASET=cub200 [DATA=folder] [TEACHER=network] [IMAGES=1] [DOWNLOAD=1] [GPUS=number]
# The teacher's weights are WEIGHTS=file, or those in checkpoints/; where none are published, it is trained first.
teacher-cache: install  ## make cache/DATASET.h5 [WEIGHTS=file DATA=folder IMAGES=1 GPUS=n]
	@$(if $(GPUS),$(BIN)/torchrun --standalone --nproc-per-node '$(GPUS)' -m tspipe,$(BIN)/tspipe) cache --train-teacher --dataset '$(DATASET)' $(if $(TEACHER),--teacher '$(TEACHER)') \
		$(if $(WEIGHTS),--weights '$(WEIGHTS)') $(if $(DATA),--data '$(DATA)') $(if $(IMAGES),--images) $(if $(DOWNLOAD),--download)

install: $(VENV)/.installed  ## make the environment

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tspipe needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo 'Making $(VENV). PyTorch is large: this takes some minutes.'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:  ## remove the environment and everything made by tools, not caches, checkpoints or runs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

.PHONY: help demo test lint format teacher-cache install clean
