"""The MAD score: chosen on validation, reported on test, with intervals, never mixed."""

import csv
import io
import json

import numpy as np
import pytest
from scipy import stats

from mad_efla.analysis import leaderboard
from mad_efla.config import ConfigError
from mad_efla.reporting import export
from tests.analysis.test_scores import done
from tests.runs.test_folder import result
from tests.tiny import tiny

LENGTHS = (8, 10, 12, 14)


def cell(mixer, length, seed, lr=0.01):
    return tiny(mixers=[mixer], task__seq_len=length, seed=seed, optim__lr=lr, setting=f"L{length}")


def board(values, seeds=(0, 1), drop=()):
    """Score `values[mixer][length] + seed / 100`, chosen over a worse grid point."""
    runs, results = [], {}
    for mixer, by_length in values.items():
        for length, accuracy in by_length.items():
            for seed in seeds:
                good, bad = (cell(mixer, length, seed, lr) for lr in (0.01, 0.02))
                runs += [good, bad]
                results[good.fingerprint] = done(good, 0.9, accuracy + seed / 100)
                results[bad.fingerprint] = done(bad, 0.5, accuracy + 0.05)
    results = {k: v for i, (k, v) in enumerate(results.items()) if i not in drop}
    (found,) = leaderboard.leaderboards(runs, results)
    return found


VALUES = {
    "efla": dict(zip(LENGTHS, (0.9, 0.8, 0.7, 0.6), strict=True)),
    "deltanet": dict(zip(LENGTHS, (0.8, 0.75, 0.5, 0.6), strict=True)),
}


def test_a_task_score_is_the_mean_over_settings_of_what_validation_chose():
    efla = next(t for t in board(VALUES).tasks if t.mixer == "efla")
    assert efla.accuracy.mean == pytest.approx(0.755)
    assert efla.best_on_test == pytest.approx(0.80)
    assert efla.settings == 4
    assert efla.missing == ""


def test_the_interval_resamples_settings_and_seeds():
    narrow = leaderboard._two_level([[0.5, 0.5]] * 4)
    assert narrow == (0.5, 0.5, 0.5)
    by_setting = leaderboard._two_level([[0.4], [0.6], [0.5], [0.7]])
    low, high = stats.bootstrap(
        (np.array([0.4, 0.6, 0.5, 0.7]),),
        np.mean,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert by_setting[1:] == pytest.approx((low, high), abs=0.011)
    by_seed = leaderboard._two_level([[0.4, 0.6]])
    assert by_seed[1:] == pytest.approx((0.4, 0.6))


def test_tasks_are_fixed_while_their_settings_are_resampled():
    assert leaderboard._over_tasks([[[0.2]], [[0.8]]]) == (0.5, 0.5, 0.5)


def test_mixers_are_ranked_and_compared_pairwise():
    found = board(VALUES)
    assert [(m.mixer, m.rank, m.complete) for m in found.mixers] == [
        ("efla", 1.0, True), ("deltanet", 2.0, True),
    ]  # fmt: skip
    (pair,) = found.differences
    expected = [0.8 - 0.9, 0.75 - 0.8, 0.5 - 0.7, 0.0] * 2
    assert (pair.first, pair.second, pair.pairs) == ("deltanet", "efla", 8)
    assert pair.mean.mean == pytest.approx(np.mean(expected))
    assert pair.mean.low < pair.mean.mean < pair.mean.high <= 0
    rounded = np.round(expected, 12)
    assert pair.p == pytest.approx(stats.wilcoxon(rounded).pvalue, rel=0.5)


def test_p_values_are_corrected_for_the_number_of_pairs():
    third = {"attention": dict(zip(LENGTHS, (0.3, 0.2, 0.1, 0.4), strict=True))}
    found = board(VALUES | third).differences
    assert len(found) == 3
    corrected = stats.false_discovery_control([d.p for d in found])
    assert [d.p_corrected for d in found] == pytest.approx(corrected)
    assert any(d.p_corrected > d.p for d in found)


def test_equal_mixers_differ_by_nothing():
    (pair,) = board({"efla": VALUES["efla"], "deltanet": VALUES["efla"]}).differences
    assert (pair.mean.mean, pair.p) == (0.0, 1.0)


def test_ties_share_their_rank():
    found = board({"efla": VALUES["efla"], "deltanet": VALUES["efla"]}).mixers
    assert [m.rank for m in found] == [1.5, 1.5]


def test_what_is_missing_is_said():
    found = board(VALUES, drop=(0, 1, 2, 3))
    efla = next(t for t in found.tasks if t.mixer == "efla")
    assert efla.missing == "4 of 16 runs missing"
    assert efla.settings == 3
    assert not next(m for m in found.mixers if m.mixer == "efla").complete


def test_a_mixer_without_a_whole_task_has_no_average():
    runs = [cell("efla", 8, 0), cell("deltanet", 8, 0)]
    (found,) = leaderboard.leaderboards(runs, {runs[0].fingerprint: done(runs[0], 0.5, 0.5)})
    deltanet = next(m for m in found.mixers if m.mixer == "deltanet")
    assert (deltanet.average, deltanet.rank, deltanet.complete) == (None, None, False)


def test_divergence_scores_zero_and_is_named():
    run = cell("efla", 8, 0)
    gone = result(run.fingerprint, status="diverged", test=None, validation=None)
    (found,) = leaderboard.leaderboards([run], {run.fingerprint: gone})
    assert found.tasks[0].accuracy.mean == 0.0
    assert found.tasks[0].missing == "1 diverged"


def test_a_score_is_shown_against_what_can_be_answered():
    run = cell("efla", 8, 0)
    found = done(run, 0.4, 0.32, ceiling=0.64)
    (scored,) = leaderboard.leaderboards([run], {run.fingerprint: found})
    assert scored.tasks[0].of_ceiling == pytest.approx(0.5)


def test_protocols_are_never_mixed():
    runs = [tiny(), tiny(protocol="quick", train__loss="answers")]
    results = {r.fingerprint: done(r, 0.5, v) for r, v in zip(runs, (0.2, 0.8), strict=True)}
    boards = leaderboard.leaderboards(runs, results)
    assert [(b.protocol, b.tasks[0].accuracy.mean) for b in boards] == [
        ("custom", 0.2),
        ("quick", 0.8),
    ]


def test_unlike_budgets_under_one_label_are_different_settings():
    runs = [tiny(), tiny(train__steps=40)]
    results = {r.fingerprint: done(r, 0.5, 0.5) for r in runs}
    (found,) = leaderboard.leaderboards(runs, results)
    assert found.tasks[0].settings == 2


def test_exports_say_the_same_and_are_stable():
    boards = [board(VALUES)]
    data = json.loads(export.as_json(boards))
    assert data[0]["tasks"][0]["accuracy"]["mean"] == boards[0].tasks[0].accuracy.mean
    rows = list(csv.DictReader(io.StringIO(export.as_csv(boards))))
    assert {(r["mixer"], r["task"]) for r in rows} == {
        (m, t) for m in ("efla", "deltanet") for t in ("recall", "average")
    }
    latex = export.as_latex(boards)
    assert r"\textbf{75.5}" in latex
    again = [board(VALUES)]
    for write in (export.as_json, export.as_csv, export.as_latex):
        assert write(boards) == write(again)


def test_a_folder_without_sweeps_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no sweep"):
        leaderboard.read(tmp_path)
