# Two commands do everything: `make sweep` and `make test`. Each installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install sweep test peer cluster stress check gpu gpu-train clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@

sweep: install
	$(BIN)/mad-efla sweep tasks/recall.yaml

test: install
	$(BIN)/python -m pytest

# Other projects' implementations beside ours, on a CPU: 25 MB of downloads.
peer: $(VENV)/.peer
	$(BIN)/python -m pytest -m peer tests/peer

$(VENV)/.peer: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[peer]'
	touch $@

# A Ray cluster of two nodes, one killed under a sweep, and Slurm's jobs without its queue; 250 MB on disk.
cluster: $(VENV)/.cluster
	$(BIN)/python -m pytest -m cluster tests/executors

$(VENV)/.cluster: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[ray,slurm]'
	touch $@

# Fifty kills of a sweep's processes, and a count of what was lost, doubled or differs.
stress: install
	$(BIN)/python -m tests.stress

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Accuracy of the GPU kernels on the device, then timings; under 8 minutes, needs a CUDA torch.
gpu:
	$(BIN)/python kernels/gpu.py

# Training steps on the device: forms of the step, runs at once, the hours of the full protocol;
# under 8 minutes, needs a CUDA torch. `bench device` on a CPU rehearses it.
gpu-train:
	$(BIN)/mad-efla bench device recall noisy_recall fuzzy_recall selective_copying compression \
	  memorization --plan mad --set mixers=[efla] --device cuda --to kernels/results/device.jsonl

clean:
	rm -rf $(VENV) build dist
