PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: demo test test-slow lint intra clean

# The main job on embedded data: train all five stages, evaluate, then read a new DICOM series.
demo: $(VENV)/runtime.stamp
	$(BIN)/python train.py
	$(BIN)/python -m aneurysm.data.phantom outputs/new_patients --patients 2 --seed 2026
	$(BIN)/python predict.py bundle=outputs/phantom/bundle input="$$(echo outputs/new_patients/*/series)" output=outputs/new_patients/report

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# Real anatomy: the IntrA vessel trees, rendered as scans (MESHES is the official folder or the packed one).
MESHES ?= ../shared/data/intra
intra: $(VENV)/dev.stamp
	$(BIN)/python train.py experiment=intra data.meshes=$(MESHES)

$(VENV)/runtime.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
