"""The table: best of the grid on validation, shown on test, with an interval."""

import pytest
from scipy import stats

from mad_efla.analysis import scores
from mad_efla.runs.schema import Scores
from tests.runs.test_folder import result
from tests.tiny import tiny


def split(accuracy):
    return Scores(loss=1 - accuracy, token_accuracy=accuracy, macro_accuracy=accuracy)


def done(run, validation, test, **fields):
    return result(run.fingerprint, validation=split(validation), test=split(test), **fields)


def test_validation_chooses_and_test_is_shown():
    low, high = tiny(optim__lr=0.01), tiny(optim__lr=0.02)
    results = {r.fingerprint: r for r in (done(low, 0.9, 0.5), done(high, 0.8, 0.99))}
    (line,) = scores.table([low, high], results)
    assert line.accuracy.mean == 0.5
    assert line.point == {"optim.lr": 0.01}


def test_seeds_are_averaged_with_a_student_interval():
    runs = [tiny(seed=s) for s in range(3)]
    values = [0.5, 0.6, 0.7]
    results = {r.fingerprint: done(r, 0.5, v) for r, v in zip(runs, values, strict=True)}
    (line,) = scores.table(runs, results)
    low, high = stats.t.interval(0.95, 2, loc=0.6, scale=stats.sem(values))
    assert line.accuracy == pytest.approx((0.6, low, high))
    assert line.seeds == 3
    assert line.point == {}


def test_one_seed_has_no_interval_and_intervals_stay_in_range():
    assert scores.interval([0.5]) == (0.5, None, None)
    assert scores.interval([1.0, 0.9])[1:] == (pytest.approx(0.3147, abs=1e-3), 1.0)
    assert scores.interval([1.0, 1.0]) == (1.0, 1.0, 1.0)


def test_the_best_comes_first_within_each_setting():
    easy = [tiny(setting="easy"), tiny(setting="easy", mixers=["attention"])]
    hard = [
        tiny(setting="hard", task__seq_len=14),
        tiny(setting="hard", task__seq_len=14, mixers=["attention"]),
    ]
    values = dict(zip([r.fingerprint for r in easy + hard], [0.1, 0.9, 0.4, 0.3], strict=True))
    results = {r.fingerprint: done(r, 0.5, values[r.fingerprint]) for r in easy + hard}
    lines = scores.table(hard + easy, results)
    assert [(m.setting, m.mixer) for m in lines] == [
        ("hard", "efla(heads=2)"), ("hard", "attention"),
        ("easy", "attention"), ("easy", "efla(heads=2)"),
    ]  # fmt: skip


def test_divergence_counts_against_a_grid_point_and_is_named():
    runs = {lr: [tiny(optim__lr=lr, seed=s) for s in (0, 1)] for lr in (0.01, 0.02)}
    results = {r.fingerprint: done(r, 0.6, 0.6) for r in runs[0.01]}
    first, second = runs[0.02]
    results[first.fingerprint] = done(first, 0.9, 0.9)
    results[second.fingerprint] = result(
        second.fingerprint, status="diverged", test=None, validation=None
    )
    (line,) = scores.table(runs[0.01] + runs[0.02], results)
    assert line.point == {"optim.lr": 0.01}  # 0.9 and a divergence average to 0.45
    assert line.missing == "1 diverged"


def test_a_mixer_that_only_diverged_is_shown_as_such():
    run = tiny()
    gone = result(run.fingerprint, status="diverged", test=None, validation=None)
    (line,) = scores.table([run], {run.fingerprint: gone})
    assert line.accuracy is None
    assert line.missing == "1 diverged"


def test_a_seed_that_diverged_counts_as_zero():
    runs = [tiny(seed=s) for s in (0, 1)]
    results = {runs[0].fingerprint: done(runs[0], 0.8, 0.8)}
    results[runs[1].fingerprint] = result(
        runs[1].fingerprint, status="diverged", test=None, validation=None
    )
    (line,) = scores.table(runs, results)
    assert line.accuracy.mean == 0.4
    assert line.seeds == 2
    assert line.loss == pytest.approx(0.2)  # of the one that ended


def test_of_points_with_equal_accuracy_the_lower_loss_is_chosen_then_the_first():
    runs = [tiny(optim__lr=lr) for lr in (0.01, 0.02, 0.03)]
    results = {r.fingerprint: done(r, 1.0, 1.0) for r in runs}
    assert scores.table(runs, results)[0].point == {"optim.lr": 0.01}
    sure = Scores(loss=-1.0, token_accuracy=1.0, macro_accuracy=1.0)
    results[runs[1].fingerprint] = result(runs[1].fingerprint, validation=sure, test=split(1.0))
    assert scores.table(runs, results)[0].point == {"optim.lr": 0.02}


def test_missing_runs_are_counted():
    runs = [tiny(seed=s) for s in range(3)]
    (line,) = scores.table(runs, {runs[0].fingerprint: done(runs[0], 0.5, 0.5)})
    assert line.missing == "2 missing"
    assert scores.table(runs, {}) == []


def test_steps_to_90_is_a_median_that_knows_of_runs_that_never_got_there():
    def median(*steps):
        runs = [tiny(seed=i) for i in range(len(steps))]
        results = {
            r.fingerprint: done(r, 0.5, 0.5, steps_to_90=s)
            for r, s in zip(runs, steps, strict=True)
        }
        return scores.table(runs, results)[0].steps_to_90

    assert median(10, 30) == 20
    assert median(10, None) is None
    assert median(10, 20, None) == 20
