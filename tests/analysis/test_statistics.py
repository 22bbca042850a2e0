"""Intervals that cover, tests that do not reject what is true, corrections."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mad_efla.analysis import statistics
from tests import coverage

SHARES = st.floats(0.0, 1.0)


@pytest.mark.parametrize(("settings", "seeds"), [(1, 2), (1, 3), (1, 5), (2, 2), (11, 2), (11, 5)])
def test_intervals_cover_normal_draws(settings, seeds):
    assert 0.93 <= coverage.coverage("normal", settings, seeds, 1_000) <= 0.99


@pytest.mark.parametrize(("kind", "least"), [("efla", 0.92), ("deltanet", 0.80)])
def test_intervals_cover_real_samples_from_five_seeds_on(kind, least):
    assert coverage.coverage(kind, 1, 5, 2_000) >= least


@pytest.mark.parametrize(("settings", "seeds"), [(1, 3), (11, 3), (66, 2)])
def test_a_true_null_is_rejected_as_seldom_as_is_said(settings, seeds):
    assert coverage.type_one(settings, seeds, 600) <= 0.08  # .05 and three standard errors


def test_one_seed_anywhere_has_no_interval():
    assert statistics.interval([0.5]) == (0.5, None, None)
    assert statistics.weighted([[0.5, 0.6], [0.7]], [0.5, 0.5])[1:] == (None, None)


def test_settings_that_differ_in_difficulty_widen_nothing():
    narrow = statistics.weighted([[0.0, 0.02], [0.98, 1.0]], [0.5, 0.5])
    assert narrow.high - narrow.low < 0.09


def test_one_setting_has_the_ordinary_interval():
    values = [0.5, 0.6, 0.75]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert statistics.interval(values) == pytest.approx((sum(values) / 3, low, high))


def test_satterthwaite_is_welch_for_two_settings_of_opposite_sign():
    a, b = [0.1, 0.3, 0.2], [0.5, 0.9, 0.6, 0.7]
    found = statistics.weighted([a, b], [1.0, -1.0], -1.0)
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert found[1:] == pytest.approx((welch.low, welch.high))


def test_differences_answer_both_questions():
    first = {"x": {0: 0.9, 1: 0.92, 2: 0.91}, "y": {0: 0.5, 1: 0.52, 2: 0.51}}
    second = {"x": {0: 0.8, 1: 0.81, 2: 0.82}, "y": {0: 0.6, 1: 0.61, 2: 0.62}}
    found = statistics.difference(first, second, {"x": 0.5, "y": 0.5})
    assert found.mean.mean == pytest.approx(0.0)
    assert (found.wins, found.losses, found.settings, found.seeds) == (1, 1, 2, 3)
    assert found.p_settings == 1.0
    blocks = stats.ttest_1samp([0.1, 0.11, 0.09], 0)
    only_x = statistics.difference({"x": first["x"]}, second, {"x": 1.0, "y": 1.0})
    assert only_x.p == pytest.approx(blocks.pvalue)


def test_pairs_of_unequal_seeds_use_what_both_have():
    first = {"x": {0: 0.9, 1: 0.9, 5: 0.1}, "y": {0: 0.5}}
    second = {"x": {0: 0.8, 1: 0.7}, "z": {0: 0.5}}
    found = statistics.difference(first, second, {"x": 0.5, "y": 0.3, "z": 0.2})
    assert found.mean.mean == pytest.approx(0.15)
    assert (found.settings, found.seeds) == (1, 2)
    assert statistics.difference({"y": {0: 0.5}}, {"y": {1: 0.5}}, {"y": 1.0}) is None


@given(st.lists(SHARES, min_size=1, max_size=12))
def test_holm_never_lowers_and_keeps_the_order(values):
    found = statistics.holm(values)
    assert all(c >= p for c, p in zip(found, values, strict=True))
    assert found[values.index(min(values))] == pytest.approx(min(1, len(values) * min(values)))
    ranked = sorted(range(len(values)), key=lambda i: (values[i], found[i]))
    assert [found[i] for i in ranked] == sorted(found)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (7, 2), (3, 3)])
def test_the_sign_test_is_the_binomial_one(wins, losses):
    n = wins + losses
    expected = stats.binomtest(wins, n).pvalue if n else 1.0
    assert statistics.sign_test(wins, losses) == pytest.approx(expected)


def test_the_samples_name_the_seed_that_lags():
    assert statistics.lagging(coverage.SAMPLES["deltanet"]) == 1
    assert statistics.lagging(coverage.SAMPLES["efla"]) == 0
