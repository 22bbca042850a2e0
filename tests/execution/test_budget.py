"""A budget holds as many seeds, then settings, as fit it."""

import pytest

from mad_efla.config import ConfigError
from mad_efla.execution import budget
from tests.plan.test_expand import expanded
from tests.tiny import PLAN

SETTINGS = "settings: {recall: {a: {task.vocab_size: 8}, b: {task.vocab_size: 10}}}\n"
TWO = PLAN.replace("settings: baseline\n", SETTINGS).replace("seeds: [0, 1]", f"seeds: {budget.seeds([0, 1, 2])}")
CHOOSE = TWO + "grid: {optim.lr: [1e-3, 1e-2]}\nchoose: {seeds: [100]}\n"


def fit(folder, text, seconds, each=1.0):
    (found,), said = budget.fit([expanded(folder, text)], 3, seconds, lambda runs: each * len(runs))
    return found, said


def kept(runs):
    return sorted({(r.setting, r.seed) for r in runs})


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (4, [("a", 0), ("a", 1)]),
        (7.9, [("a", 0), ("a", 1), ("a", 2)]),
        (10, [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]),
        (16, [(s, n) for s in "ab" for n in range(4)]),
    ],
)
def test_seeds_come_first_then_settings_then_more_seeds(tmp_path, seconds, expected):
    found, said = fit(tmp_path, TWO, seconds)
    assert kept(found.runs) == expected
    assert f"{len({s for s, _ in expected})} of 2 settings" in said


def test_a_longer_budget_holds_all_that_a_shorter_one_made(tmp_path):
    before: set[str] = set()
    for seconds in (4, 6, 10, 14, 30, 1000):
        names = {r.fingerprint for r in fit(tmp_path, TWO, seconds)[0].runs}
        assert before <= names
        before = names
    assert len(before) == 2 * 2 * budget.MOST_SEEDS


def test_choosing_and_one_point_a_cell_are_counted(tmp_path):
    found, _ = fit(tmp_path, CHOOSE, 8)  # 2 mixers x (2 points on seed 100 + 2 measured seeds)
    assert kept(found.runs) == [("a", 100)]
    assert {tuple(r.seed for r in runs) for runs in found.measured.values()} == {(0, 1)}
    assert len(found.measured) == 4  # either point may be chosen


def test_seeds_that_set_has_fixed_are_all_that_is_said(tmp_path):
    text = TWO.replace(f"seeds: {budget.seeds([0, 1, 2])}", "seeds: [0, 1]")
    (found,), said = budget.fit([expanded(tmp_path, text)], 2, 1e6, len)
    assert kept(found.runs) == [(s, n) for s in "ab" for n in range(2)]
    assert said == "the budget holds 2 of 2 settings, 2 seeds at the last of them"


def test_the_least_must_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"the least of this plan, 2 seeds.*about 4 s; give more"):
        fit(tmp_path, TWO, 3)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("2m", 120), ("1.5h", 5400), (" 10 m", 600)])
def test_times_are_numbers_with_a_unit(text, seconds):
    assert budget.parse(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "0m", "-1m", "two m", "1d"])
def test_anything_else_is_refused_in_words(text):
    with pytest.raises(ConfigError, match=r"--budget .*such as 90s, 2m or 1.5h"):
        budget.parse(text)


def test_seeds_that_choose_are_never_added():
    assert budget.seeds([0, 1], taken=[3])[:5] == [0, 1, 2, 4, 5]
