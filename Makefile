# Two commands do everything: `make sweep` and `make test`. Each installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install sweep test peer stress busy thousand check gpu clean

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

# Fifty kills of a sweep's processes, and a count of what was lost, doubled or differs.
stress: install
	$(BIN)/python -m tests.stress

# A hundred runs: are both cores busy until the last minute? Then a thousand tiny ones, on the clock.
busy: install
	$(BIN)/python -m tests.busy --runs 100

thousand: install
	$(BIN)/python -m tests.busy --runs 1000 --steps 20 --window 60

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Accuracy of the GPU kernels on the device, then timings; under 8 minutes, needs a CUDA torch.
gpu:
	$(BIN)/python kernels/gpu.py

clean:
	rm -rf $(VENV) build dist
