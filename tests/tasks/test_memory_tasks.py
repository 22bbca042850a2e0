"""Copying, stacks and long memory: what is shown, what is asked, and how it is drawn."""

import numpy as np

from mad_efla.tasks import IGNORE
from mad_efla.tasks.copying import Copying
from mad_efla.tasks.filtering import Filtering
from mad_efla.tasks.induction import Induction
from mad_efla.tasks.overwrite import Overwrite
from mad_efla.tasks.palindrome import Palindrome
from mad_efla.tasks.retention import Retention
from mad_efla.tasks.stack import Stack
from mad_efla.training import data


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


# ------------------------------------------------------------------ stack


def by_hand(task, rng):
    """Draw one sequence operation by operation; return pops, elements left, and the deepest."""
    stacks = [[] for _ in range(task.stacks)]
    pops = 0
    for t in range(task.seq_len // 3):
        stack = stacks[rng.integers(task.stacks)]
        last = t == task.seq_len // 3 - 1
        if last:
            filled = [s for s in stacks if s]
            stack = filled[rng.integers(len(filled))]
        if stack and (last or rng.random() < 0.5):
            stack.pop()
            pops += 1
        else:
            stack.append(t)
    return pops, sum(map(len, stacks)), max(map(len, stacks))


def test_operations_are_distributed_as_if_drawn_one_by_one():
    task, n = Stack(stacks=5, elements=8, seq_len=90), 4_000
    rng = np.random.default_rng(0)
    wanted = np.array([by_hand(task, rng) for _ in range(n)], float)
    acts = drawn(task, n).inputs.reshape(n, 30, 3)
    pops = acts[..., 0] == 14
    change = np.where(pops, -1, 1)[..., None] * (acts[..., 1, None] == 8 + np.arange(5))
    left = change.sum(axis=1)
    found = np.stack([pops.sum(axis=1), left.sum(axis=1), left.max(axis=1)], axis=1)
    error = np.sqrt((wanted.var(axis=0) + found.var(axis=0)) / n)
    assert (np.abs(wanted.mean(axis=0) - found.mean(axis=0)) < 4 * error).all()
    assert np.allclose(wanted.std(axis=0), found.std(axis=0), rtol=0.1)
    assert change.cumsum(axis=1).min() == 0
    assert np.abs(np.bincount(acts[:, -1, 1] - 8) / n - 1 / 5).max() < 0.03


def test_what_is_popped_is_scored_at_the_stack_and_read_after_it():
    inputs, targets, _ = drawn(Stack(), 300)
    acts = inputs.reshape(300, 85, 3)
    pops = acts[..., 0] == 129
    assert pops[:, -1].all()
    assert np.array_equal(targets[:, 1::3] != IGNORE, pops)
    assert np.array_equal(targets[:, 1::3][pops], acts[..., 2][pops])
    assert (targets[:, ::3] == IGNORE).all()
    assert (targets[:, 2::3] == IGNORE).all()
    assert acts[..., 1].min() == 64
    assert acts[..., 1].max() == 127


def test_a_stack_gives_back_the_newest_and_then_what_lay_below():
    task = Stack(stacks=2, elements=3, seq_len=18)
    push, pop, one, two = 5, 6, 3, 4
    row = np.array([push, one, 0, push, two, 1, push, one, 2, pop, one, 2, pop, two, 1, pop, one, 0])
    assert task.solve(row, None)[[10, 13, 16]].tolist() == [2, 1, 0]


# ------------------------------------------------------------------ induction


def test_the_mark_comes_twice_and_only_the_second_is_scored():
    inputs, targets, _ = drawn(Induction(seq_len=12), 20_000)
    marks = inputs == 15
    assert (marks.sum(axis=1) == 2).all()
    assert marks[:, -1].all()
    first = marks.argmax(axis=1)
    assert np.abs(np.bincount(first, minlength=10) / 20_000 - 1 / 10).max() < 0.01
    assert (targets[:, :-1] == IGNORE).all()
    assert np.array_equal(targets[:, -1], inputs[np.arange(20_000), first + 1])
    assert np.abs(np.bincount(targets[:, -1], minlength=15) / 20_000 - 1 / 15).max() < 0.01


# ------------------------------------------------------------------ long memory


def parts(task, n):
    """Return pairs shown at first, the gap, the questions and the answers."""
    inputs, targets, _ = drawn(task, n)
    K = task.pairs
    assert (targets[:, :-K] == IGNORE).all()
    pairs = inputs[:, : 2 * K].reshape(n, K, 2)
    return pairs, inputs[:, 2 * K : -K], inputs[:, -K:], targets[:, -K:]


def test_retention_waits_and_asks_for_every_key_in_any_order():
    pairs, gap, questions, answers = parts(Retention(seq_len=40, pairs=3), 6_000)
    assert gap.shape == (6_000, 31)
    assert not gap.any()
    asked = (questions[:, :, None] == pairs[:, None, :, 0]).argmax(axis=2)
    assert np.array_equal(np.sort(asked, axis=1), np.tile(np.arange(3), (6_000, 1)))
    counts = np.bincount(asked @ [9, 3, 1], minlength=27)
    assert (counts > 0).sum() == 6
    assert np.abs(counts[counts > 0] / 6_000 - 1 / 6).max() < 0.02
    assert abs((np.diff(questions, axis=1) > 0).all(axis=1).mean() - 1 / 6) < 0.02
    assert np.array_equal(answers, np.take_along_axis(pairs[..., 1], asked, axis=1))
    assert pairs[..., 0].min() == 1
    assert pairs[..., 0].max() == 127
    assert pairs[..., 1].min() == 128
    assert pairs[..., 1].max() == 255


def test_filtering_shows_keys_that_are_never_asked_for_with_values_that_could_be():
    for seq_len, fillers in ((41, 0), (40, 1)):
        pairs, gap, questions, answers = parts(Filtering(seq_len=seq_len, pairs=3), 2_000)
        assert np.array_equal(np.sort(questions, axis=1), np.sort(pairs[..., 0], axis=1))
        assert pairs[..., 0].max() == 63
        assert not gap[:, gap.shape[1] - fillers :].any()
        ignored = gap[:, : gap.shape[1] - fillers].reshape(2_000, -1, 2)
        assert ignored.shape[1] == 16 - fillers
        assert (ignored[..., 0].min(), ignored[..., 0].max()) == (64, 127)
        assert (ignored[..., 1].min(), ignored[..., 1].max()) == (128, 255)
        asked = (questions[:, :, None] == pairs[:, None, :, 0]).argmax(axis=2)
        assert np.array_equal(answers, np.take_along_axis(pairs[..., 1], asked, axis=1))


def test_overwrite_asks_for_the_newest_value_of_each_key():
    for seq_len, fillers in ((41, 0), (40, 1)):
        pairs, gap, questions, answers = parts(Overwrite(seq_len=seq_len, pairs=3), 2_000)
        assert not gap[:, gap.shape[1] - fillers :].any()
        again = gap[:, : gap.shape[1] - fillers].reshape(2_000, -1, 2)
        written = np.concatenate([pairs, again], axis=1)
        for row, keys, values in zip(written.tolist(), questions, answers, strict=True):
            newest = dict(row)  # a later pair replaces an earlier one
            assert [newest[key] for key in keys.tolist()] == values.tolist()
            assert len(newest) == 3
        which = (again[..., :1] == pairs[:, None, :, 0]).argmax(axis=2)
        assert np.abs(np.bincount(which.ravel()) / which.size - 1 / 3).max() < 0.01
        first = np.take_along_axis(
            pairs[..., 1], (questions[:, :, None] == pairs[:, None, :, 0]).argmax(axis=2), axis=1
        )
        assert (answers == first).mean() < 0.015  # hardly ever is the first value still the newest
