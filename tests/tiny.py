"""A run small enough to train in a blink, for tests."""

from mad_efla.config import Document, from_paths, merge
from mad_efla.plan.run import RunConfig, build

BASE = Document(
    {
        "task": {"name": "recall", "vocab_size": 8, "seq_len": 12},
        "data": {"train_examples": 64, "validation_examples": 32, "test_examples": 32},
        "model": {"width": 16, "depth": 1},
        "mixers": [{"name": "efla", "heads": 2}],
        "optim": {"lr": 1e-2},
        "train": {"batch_size": 16, "steps": 30, "eval_every": 10},
    }
)


def tiny(**fields) -> RunConfig:
    """Build the run; `optim__lr=0.1` sets a field."""
    paths = {name.replace("__", "."): value for name, value in fields.items()}
    return build(merge(BASE, from_paths(paths, "test")))


PLAN = """
protocol: custom
mixers: [{name: efla, heads: 2}, {name: deltanet, heads: 2}]
settings: baseline
seeds: [0, 1]
model: {width: 16, depth: 1}
data: {train_examples: 64, validation_examples: 32, test_examples: 32}
optim: {lr: 1e-2}
train: {batch_size: 16, steps: 20, eval_every: 10}
"""

TASK = """
task: {name: recall, vocab_size: 8, seq_len: 12}
vary:
  task.vocab_size: [10]
"""


def write_files(folder) -> None:
    """Write `task.yaml` and `plan.yaml`."""
    (folder / "task.yaml").write_text(TASK)
    (folder / "plan.yaml").write_text(PLAN)
