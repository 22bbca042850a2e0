"""Copying, stacks and long memory: what is shown, what is asked, and how it is drawn."""

import numpy as np

from mad_efla import data
from mad_efla.tasks import IGNORE
from mad_efla.tasks.copying import Copying
from mad_efla.tasks.palindrome import Palindrome


def drawn(task, n, split="test"):
    return task.sample(n, data.stream(0, split), split, None)


# ------------------------------------------------------------------ copying


def test_a_string_stands_again_behind_the_bar_one_token_behind_what_is_asked():
    inputs, targets, _ = drawn(Copying(seq_len=20), 200)
    assert (inputs[:, 10] == 26).all()
    assert inputs[:, :10].max() <= 25
    assert np.array_equal(targets[:, 10:], inputs[:, :10])
    assert (targets[:, :10] == IGNORE).all()
    assert np.array_equal(inputs[:, 11:], targets[:, 10:-1])


def test_strings_are_of_any_length_in_training():
    inputs, targets, _ = drawn(Copying(seq_len=20, shortest=6), 20_000, "train")
    lengths = (inputs == 26).argmax(axis=1)
    assert np.abs(np.bincount(lengths, minlength=11)[3:] / 20_000 - 1 / 8).max() < 0.01
    assert lengths.min() == 3
    assert np.array_equal((targets != IGNORE).sum(axis=1), lengths)
    assert np.array_equal((inputs == 27).sum(axis=1), 20 - 2 * lengths)
    for row, wanted, n in zip(inputs[:300], targets[:300], lengths, strict=False):
        assert np.array_equal(wanted[n : 2 * n], row[:n])
        assert (row[2 * n :] == 27).all()


# ------------------------------------------------------------------ palindrome


def test_a_palindrome_is_asked_for_from_its_middle_on():
    for shortest in (None, 2):
        inputs, targets, _ = drawn(Palindrome(seq_len=20, shortest=shortest), 300, "train")
        lengths = (inputs == 26).argmax(axis=1)
        for row, wanted, n in zip(inputs, targets, lengths, strict=True):
            assert np.array_equal(wanted[n : 2 * n], row[:n][::-1])
            assert np.array_equal(row[n + 1 : 2 * n], wanted[n : 2 * n - 1])
            assert (wanted != IGNORE).sum() == n
            assert (row[2 * n :] == 27).all()
    assert (drawn(Palindrome(seq_len=20, shortest=2), 100).inputs[:, 10] == 26).all()
