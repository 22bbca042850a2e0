"""The MAD score: chosen on validation, reported on test, with intervals, never mixed."""

import csv
import io
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad_efla.analysis.leaderboard import leaderboard
from mad_efla.analysis.statistics import holm
from mad_efla.config import ConfigError
from mad_efla.reporting import export
from mad_efla.runs.read import load, of_runs
from tests.analysis.test_cells import done
from tests.runs.test_folder import result
from tests.tiny import tiny

LENGTHS = (8, 10, 12, 14)


def cell(mixer, length, seed, lr=0.01):
    return tiny(mixers=[mixer], task__seq_len=length, seed=seed, optim__lr=lr, setting=f"L{length}")


def scored(runs, results):
    return leaderboard(of_runs(runs, results))


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
    return scored(runs, results)


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


def test_mixers_are_ranked_by_their_mean_and_compared_pairwise():
    found = board(VALUES)
    assert [(m.mixer, m.rank, m.unranked) for m in found.mixers] == [("efla", 1, ""), ("deltanet", 2, "")]
    (pair,) = found.pairs
    d = pair.difference
    assert (pair.first, pair.second, d.settings, d.seeds) == ("efla", "deltanet", 4, 2)
    assert d.mean.mean == pytest.approx(np.mean([0.1, 0.05, 0.2, 0.0]))
    first, second = (m.average.mean for m in found.mixers)
    assert d.mean.mean == pytest.approx(first - second)


def test_p_values_are_corrected_for_the_number_of_pairs():
    values = VALUES | {"attention": dict(zip(LENGTHS, (0.3, 0.2, 0.1, 0.4), strict=True))}
    runs, results = [], {}
    for mixer, by_length in values.items():
        for length, accuracy in by_length.items():
            for seed in range(3):
                run = cell(mixer, length, seed)
                runs.append(run)
                shift = (seed * 7 + len(mixer) * seed) % 5 / 100
                results[run.fingerprint] = done(run, 0.9, accuracy + shift)
    found = scored(runs, results).pairs
    assert len(found) == 3
    assert [p.p_corrected for p in found] == pytest.approx(holm([p.difference.p for p in found]))
    assert any(p.p_corrected > p.difference.p for p in found)


def test_equal_mixers_differ_by_nothing_and_share_their_rank():
    found = board({"efla": VALUES["efla"], "deltanet": VALUES["efla"]})
    (pair,) = found.pairs
    assert (pair.difference.mean.mean, pair.difference.p, pair.differ) == (0.0, 1.0, False)
    assert [m.rank for m in found.mixers] == [1, 1]


@given(st.data())
def test_the_order_of_ranks_is_the_sign_of_the_differences(data):
    runs, results = [], {}
    shares = st.integers(0, 100).map(lambda n: n / 100)
    for mixer, length, seed in itertools.product(VALUES, LENGTHS[:2], range(2)):
        if data.draw(st.integers(0, 9)):  # some runs are missing
            run = cell(mixer, length, seed)
            results[run.fingerprint] = done(run, 0.5, data.draw(shares))
        runs.append(cell(mixer, length, seed))
    found = scored(runs, results)
    ranks = {m.mixer: m.rank for m in found.mixers}
    for pair in found.pairs:
        if ranks[pair.first] and ranks[pair.second]:
            mean = pair.difference.mean.mean
            assert (ranks[pair.first] < ranks[pair.second]) == (mean > 1e-9)


def test_a_mixer_with_other_seeds_is_not_ranked_and_it_is_said():
    runs = [cell("efla", 8, s) for s in range(3)] + [cell("deltanet", 8, s) for s in range(2)]
    found = scored(runs, {r.fingerprint: done(r, 0.5, 0.5 + r.seed / 10) for r in runs})
    assert [(m.mixer, m.rank) for m in found.mixers] == [("efla", 1), ("deltanet", None)]
    assert found.notes == [
        "deltanet is not ranked: 1 run is missing that others have, counting settings and seeds",
        "the same sweep command makes what is missing",
    ]
    (pair,) = found.pairs
    assert (pair.difference.seeds, pair.difference.mean.mean) == (2, 0.0)
    assert pair.left_out == "a run that one lacks"


def test_what_is_missing_is_said():
    found = board(VALUES, drop=(0, 1, 2, 3))
    efla = next(t for t in found.tasks if t.mixer == "efla")
    assert efla.missing == "4 missing"
    assert efla.settings == 3
    assert next(m for m in found.mixers if m.mixer == "efla").rank is None


def test_a_mixer_without_a_whole_task_has_no_average():
    runs = [cell("efla", 8, 0), cell("deltanet", 8, 0)]
    found = scored(runs, {runs[0].fingerprint: done(runs[0], 0.5, 0.5)})
    deltanet = next(m for m in found.mixers if m.mixer == "deltanet")
    assert (deltanet.average, deltanet.rank, deltanet.unranked) == (None, None, "no run of it is done")


def test_divergence_scores_zero_and_is_named():
    run = cell("efla", 8, 0)
    gone = result(run.fingerprint, status="diverged", test=None, validation=None)
    found = scored([run], {run.fingerprint: gone})
    assert found.tasks[0].accuracy.mean == 0.0
    assert found.tasks[0].missing == "1 diverged"


def test_a_score_is_shown_against_what_can_be_answered():
    run = cell("efla", 8, 0)
    found = done(run, 0.4, 0.32, ceiling=0.64)
    assert scored([run], {run.fingerprint: found}).tasks[0].of_ceiling == pytest.approx(0.5)


def test_unlike_budgets_under_one_label_are_different_settings():
    runs = [tiny(), tiny(train__steps=40)]
    results = {r.fingerprint: done(r, 0.5, 0.5) for r in runs}
    found = scored(runs, results)
    assert found.tasks[0].settings == 2


def test_exports_say_the_same_and_are_stable():
    boards = [board(VALUES)]
    data = json.loads(export.as_json(boards))
    assert data[0]["tasks"][0]["accuracy"]["mean"] == boards[0].tasks[0].accuracy.mean
    assert len(data[0]["cells"]) == 8
    rows = list(csv.DictReader(io.StringIO(export.as_csv(boards))))
    assert {(r["mixer"], r["task"]) for r in rows} == {
        (m, t) for m in ("efla", "deltanet") for t in ("recall", "mean over tasks")
    }
    assert float(rows[0]["accuracy %"]) == boards[0].tasks[0].accuracy.mean
    assert r"\textbf{75.5}" in export.as_latex(boards)
    again = [board(VALUES)]
    for write in (export.as_json, export.as_csv, export.as_latex):
        assert write(boards) == write(again)


def test_a_folder_without_sweeps_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no sweep"):
        load(tmp_path)
