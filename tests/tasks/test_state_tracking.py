"""Tasks of state tracking: what each asks is held to a second way of finding it out."""

import numpy as np
import pytest

from mad_efla.tasks import IGNORE
from mad_efla.tasks.counting import Counting
from mad_efla.tasks.flip_flop import FlipFlop
from mad_efla.tasks.group_words import GroupWords, permutations, product_table
from mad_efla.tasks.modular_arithmetic import ModularArithmetic
from mad_efla.tasks.parity import Parity
from mad_efla.training import data


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


# ------------------------------------------------------------------ modular arithmetic


@pytest.mark.parametrize("brackets", [False, True])
@pytest.mark.parametrize("operators", ["+", "+-", "+-*"])
def test_an_expression_has_the_value_that_python_gives_it(brackets, operators):
    task = ModularArithmetic(seq_len=24, brackets=brackets, operators=operators, modulus=7)
    examples = drawn(task, 300, "train")
    for row, targets in zip(examples.inputs, examples.targets, strict=True):
        names = [str(t) if r == "digit" else r for t, r in zip(row, task.describe(row), strict=True)]
        end = names.index("=")
        assert set(names[end + 1 :]) <= {"pad"}
        assert np.flatnonzero(targets != IGNORE).tolist() == [end]
        assert targets[end] == eval("".join(names[:end])) % 7  # it holds digits and + - * ( )


def test_brackets_hold_two_halves_whose_lengths_are_drawn_alike():
    task = ModularArithmetic(seq_len=12, brackets=True, operators="+-")
    rows = drawn(task, 20_000).inputs
    plus, opening, closing = 5, 8, 9
    assert (rows[:, 0] == opening).all()
    assert (rows[:, -2] == closing).all()
    depth = ((rows == opening).astype(int) - (rows == closing)).cumsum(axis=1)
    split = (depth[:, 1:-2] == 1) & np.isin(rows[:, 1:-2], (plus, plus + 1))
    unary = ~np.isin(rows[:, :-3], (*range(5), closing))  # a minus behind no operand
    left = (split & ~unary).argmax(axis=1)
    assert ((split & ~unary).sum(axis=1) == 1).all()
    assert abs((rows[:, 1:-2][split & ~unary] == plus).mean() - 1 / 2) < 0.015
    assert np.abs(np.bincount(left, minlength=8)[1:] / 20_000 - 1 / 7).max() < 0.01


def test_operators_and_digits_are_drawn_alike():
    rows = drawn(ModularArithmetic(shortest=None), 5_000).inputs
    digits, signs = rows[:, ::2], rows[:, 1:-1:2]
    assert np.abs(np.bincount(digits.ravel()) / digits.size - 1 / 5).max() < 0.005
    assert np.abs(np.bincount(signs.ravel() - 5) / signs.size - 1 / 3).max() < 0.005
    assert (rows[:, -1] == 10).all()


# ------------------------------------------------------------------ group words


@pytest.mark.parametrize(
    ("group", "order", "commutes"),
    [
        ("Z2", 2, True),
        ("Z60", 60, True),
        ("S3", 6, False),
        ("A4", 12, False),
        ("S4", 24, False),
        ("A5", 60, False),
        ("S5", 120, False),
    ],
)
def test_product_tables_are_groups_whose_identity_is_0(group, order, commutes):
    table = product_table(group)
    assert table.shape == (order, order)
    every = np.arange(order)
    assert np.array_equal(table[0], every)
    assert np.array_equal(table[:, 0], every)
    assert np.array_equal(np.sort(table, axis=0), np.tile(every[:, None], order))
    assert np.array_equal(np.sort(table, axis=1), np.tile(every, (order, 1)))
    assert np.array_equal(table[table], table[every[:, None, None], table])  # (g h) k = g (h k)
    assert np.array_equal(table, table.T) == commutes


def test_alternating_groups_are_the_even_permutations():
    for n, order in (("3", 3), ("4", 12), ("5", 60)):
        points = permutations("A" + n)
        assert len(points) == order
        signs = [np.linalg.det(np.eye(int(n))[row]) for row in points]
        assert np.allclose(signs, 1)


def test_the_answer_is_where_all_elements_so_far_take_each_point():
    task = GroupWords(group="S4", seq_len=20)
    points = permutations("S4")
    for row, targets in zip(*drawn(task, 50)[:2], strict=True):
        where = list(range(4))
        for element, answer in zip(row, targets, strict=True):
            where = [int(points[element][x]) for x in where]
            assert points[answer].tolist() == where


def test_elements_and_products_are_drawn_alike():
    inputs, targets, _ = drawn(GroupWords(group="A5", seq_len=32), 5_000)
    for ids in (inputs, targets):
        assert np.abs(np.bincount(ids.ravel(), minlength=60) / ids.size - 1 / 60).max() < 0.002


def test_the_word_problem_of_two_elements_is_parity_asked_everywhere():
    inputs, targets, _ = drawn(GroupWords(group="Z2", seq_len=32), 100)
    assert np.array_equal(targets, inputs.cumsum(axis=1) % 2)


def test_moves_draws_the_identity_and_swaps():
    inputs = drawn(GroupWords(group="S5", seq_len=32, moves=2), 500).inputs
    moved = (permutations("S5")[np.unique(inputs)] != np.arange(5)).sum(axis=1)
    assert sorted(moved.tolist()) == [0] + [2] * 10


# ------------------------------------------------------------------ flip-flop


def test_flip_flop_draws_instructions_at_their_rates_and_scores_every_read():
    task = FlipFlop(seq_len=64, ignore=0.7)
    inputs, targets, _ = drawn(task, 5_000)
    acts, bits = inputs[:, ::2], inputs[:, 1::2]
    assert (acts[:, 0] == 2).all()
    assert (acts[:, -1] == 3).all()
    rates = np.bincount(acts[:, 1:-1].ravel(), minlength=5)[2:] / acts[:, 1:-1].size
    assert np.abs(rates - (0.15, 0.15, 0.7)).max() < 0.005
    assert np.array_equal(targets[:, ::2] != IGNORE, acts == 3)
    assert (targets[:, 1::2] == IGNORE).all()
    assert np.array_equal(targets[:, ::2][acts == 3], bits[acts == 3])
    for act in (2, 4):
        assert abs(bits[acts == act].mean() - 0.5) < 0.01


def test_flip_flop_reads_the_last_write_whatever_is_to_be_ignored():
    text = "w1i0i0r1w0i1r0r0"
    row = np.array(["01wri".index(letter) for letter in text])
    answers = FlipFlop(seq_len=16).solve(row, None)
    assert answers[row == 3].tolist() == [1, 0, 0]
    roles = FlipFlop(seq_len=16).describe(row)
    assert [r for r in roles if len(r) > 1] == ["bit", "noise", "noise", *["bit"] * 2, "noise", *["bit"] * 2]


# ------------------------------------------------------------------ counting


def test_counting_asks_for_the_balance_where_it_can_be_named():
    task = Counting(seq_len=200, most=3, idle=0.25)
    inputs, targets, _ = drawn(task, 4_000)
    steps = np.array([1, -1, 0])[inputs - 7]
    balance = steps.cumsum(axis=1)
    assert np.array_equal(targets != IGNORE, abs(balance) <= 3)
    assert np.array_equal(targets[targets != IGNORE], balance[abs(balance) <= 3] + 3)
    assert abs((inputs == 9).mean() - 0.25) < 0.005
    assert abs(balance[:, -1].var() / (200 * 0.75) - 1) < 0.1
    assert np.abs(np.bincount((inputs - 7).ravel())[:2] / inputs.size - 0.375).max() < 0.005
    crossed = (abs(balance) > 3).cumsum(axis=1) > 0
    assert (targets[crossed] != IGNORE).any()  # it comes back, and is then asked again


def test_counting_by_hand():
    task = Counting(seq_len=8, most=2)
    row = np.array([{"+": 5, "-": 6}[sign] for sign in "++-++---"])
    assert task.solve(row, None).tolist() == [3, 4, 3, 4, IGNORE, 4, 3, 2]
