"""Tasks of state tracking: what each asks is held to a second way of finding it out."""

import numpy as np

from mad_efla import data
from mad_efla.tasks import IGNORE
from mad_efla.tasks.parity import Parity


def drawn(task, n, split="test"):
    return task.sample(n, data.stream(0, split), split, None)


# ------------------------------------------------------------------ parity


def test_parity_is_asked_once_and_at_the_last_bit_of_any_length():
    examples = drawn(Parity(seq_len=12, shortest=3), 20_000, "train")
    lengths = (examples.inputs < 2).sum(axis=1)
    assert np.array_equal(examples.inputs < 2, np.arange(12) < lengths[:, None])
    scored = examples.targets != IGNORE
    assert np.array_equal(scored, np.arange(12) == lengths[:, None] - 1)
    shares = np.bincount(lengths, minlength=13)[3:] / 20_000
    assert lengths.min() == 3
    assert np.abs(shares - 1 / 10).max() < 0.01
    for row, target in zip(examples.inputs[:200], examples.targets[scored][:200], strict=True):
        assert target == row[row < 2].sum() % 2
    assert abs(examples.targets[scored].mean() - 0.5) < 0.01


def test_parity_is_scored_at_one_length():
    for split in ("validation", "test"):
        assert drawn(Parity(seq_len=12), 200, split).inputs.max() == 1
    assert drawn(Parity(seq_len=12, shortest=None), 200, "train").inputs.max() == 1
