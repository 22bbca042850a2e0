# Two commands do everything: `make sweep` and `make test`. Each installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install sweep test notebooks notebooks-test images peer cluster stress busy thousand check gpu gpu-train clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

sweep: install
	$(BIN)/mad-efla sweep tasks/recall.yaml

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# Every numbered notebook, executed as it stands, as a page with its figures. Runs that are under
# notebooks/runs are not made again, and from nothing it is hours; a second call leaves out the
# progress of the first.
NOTEBOOKS = $(sort $(wildcard notebooks/[0-9]*.ipynb))

notebooks: $(VENV)/.notebooks
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter nbconvert --log-level WARN --execute --to markdown \
	  --ExecutePreprocessor.timeout=-1 \
	  --MarkdownExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor \
	  --output-dir notebooks/rendered $(NOTEBOOKS)

# The same in a minute or two, with a few steps of each run, in a folder of its own.
notebooks-test: export SMALL = --set seeds=[0] --set optim.lr=0.006 --set model.width=16 --set train.steps=4 \
  --set train.eval_every=2 --set train.batch_size=16 --set data.train_examples=64 \
  --set data.validation_examples=32 --set data.test_examples=32
notebooks-test: $(VENV)/.notebooks
	rm -rf build/notebooks
	mkdir -p build/notebooks
	cp $(NOTEBOOKS) build/notebooks
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --nbmake --nbmake-timeout=300 build/notebooks/*.ipynb

$(VENV)/.notebooks: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[notebooks]'
	touch $@

# The pictures of the tasks; a test holds them to these commands.
images: install
	$(BIN)/mad-efla show recall --set task.seq_len=24 --svg notebooks/images/tasks/recall.svg
	$(BIN)/mad-efla show noisy_recall --set task.seq_len=24 --set task.noise_fraction=0.4 --svg notebooks/images/tasks/noisy_recall.svg
	$(BIN)/mad-efla show fuzzy_recall --set task.seq_len=24 --set task.vocab_size=9 --set task.key_tokens=2 --set task.value_tokens=2 --svg notebooks/images/tasks/fuzzy_recall.svg
	$(BIN)/mad-efla show selective_copying --set task.seq_len=24 --set task.tokens_to_copy=6 --svg notebooks/images/tasks/selective_copying.svg
	$(BIN)/mad-efla show compression --set task.seq_len=16 --svg notebooks/images/tasks/compression.svg
	$(BIN)/mad-efla show memorization --set task.vocab_size=32 --set task.seq_len=24 --svg notebooks/images/tasks/memorization.svg
	$(BIN)/mad-efla show mqar --set task.vocab_size=64 --set task.seq_len=24 --svg notebooks/images/tasks/mqar.svg
	$(BIN)/mad-efla show parity --set task.seq_len=16 --svg notebooks/images/tasks/parity.svg
	$(BIN)/mad-efla show modular_arithmetic --set task.seq_len=20 --set task.brackets=true --svg notebooks/images/tasks/modular_arithmetic.svg
	$(BIN)/mad-efla show group_words --set task.seq_len=20 --svg notebooks/images/tasks/group_words.svg
	$(BIN)/mad-efla show flip_flop --set task.seq_len=24 --set task.ignore=0.6 --svg notebooks/images/tasks/flip_flop.svg
	$(BIN)/mad-efla show counting --set task.seq_len=20 --set task.idle=0.2 --svg notebooks/images/tasks/counting.svg
	$(BIN)/mad-efla show copying --set task.seq_len=20 --svg notebooks/images/tasks/copying.svg
	$(BIN)/mad-efla show palindrome --set task.seq_len=20 --svg notebooks/images/tasks/palindrome.svg
	$(BIN)/mad-efla show stack --set task.seq_len=48 --set task.stacks=4 --set task.elements=8 --svg notebooks/images/tasks/stack.svg
	$(BIN)/mad-efla show induction --set task.seq_len=20 --svg notebooks/images/tasks/induction.svg
	$(BIN)/mad-efla show retention --set task.vocab_size=32 --set task.seq_len=23 --set task.pairs=3 --svg notebooks/images/tasks/retention.svg
	$(BIN)/mad-efla show filtering --set task.vocab_size=32 --set task.seq_len=23 --set task.pairs=3 --svg notebooks/images/tasks/filtering.svg
	$(BIN)/mad-efla show overwrite --set task.vocab_size=32 --set task.seq_len=23 --set task.pairs=3 --svg notebooks/images/tasks/overwrite.svg
	$(BIN)/mad-efla show digits --examples 1 --svg notebooks/images/tasks/digits.svg

# Other projects' implementations beside ours, on a CPU: 25 MB of downloads.
peer: $(VENV)/.peer
	$(BIN)/python -m pytest -m peer tests/peer

$(VENV)/.peer: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peer]'
	touch $@

# A Ray cluster of two nodes, one killed under a sweep, and Slurm's jobs without its queue; 250 MB on disk.
cluster: $(VENV)/.cluster
	$(BIN)/python -m pytest -m cluster tests/execution

$(VENV)/.cluster: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray,slurm]'
	touch $@

# Fifty kills of a sweep's processes, and a count of what was lost, doubled or differs.
stress: install
	$(BIN)/python -m tests.stress

# A hundred runs: are both cores busy until the last minute? Then a thousand tiny ones, on the clock.
busy: install
	$(BIN)/python -m tests.busy --runs 100

thousand: install
	$(BIN)/python -m tests.busy --runs 1000 --steps 20 --window 60

check: $(VENV)/.cluster # for the types of its packages
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
