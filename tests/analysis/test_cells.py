"""Cells: what they are, how a grid point is chosen, what their tables show."""

import pytest
from scipy import stats

from mad_efla.analysis import statistics
from mad_efla.analysis.cells import cells
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import load, of_runs
from mad_efla.runs.schema import Scores, SweepRecord, planned
from mad_efla.runs.sweeps import write_sweep
from tests.runs.test_folder import result
from tests.tiny import tiny


def split(accuracy):
    return Scores(loss=1 - accuracy, token_accuracy=accuracy, macro_accuracy=accuracy)


def done(run, validation, test, **fields):
    return result(run.fingerprint, validation=split(validation), test=split(test), **fields)


def table(runs, results):
    return cells(of_runs(runs, results))


def test_validation_chooses_and_test_is_shown():
    low, high = tiny(optim__lr=0.01), tiny(optim__lr=0.02)
    results = {r.fingerprint: r for r in (done(low, 0.9, 0.5), done(high, 0.8, 0.99))}
    (line,) = table([low, high], results)
    assert line.accuracy.mean == 0.5
    assert line.point == {"optim.lr": 0.01}


def test_seeds_are_averaged_with_a_student_interval():
    runs = [tiny(seed=s) for s in range(3)]
    values = [0.5, 0.6, 0.7]
    results = {r.fingerprint: done(r, 0.5, v) for r, v in zip(runs, values, strict=True)}
    (line,) = table(runs, results)
    low, high = stats.t.interval(0.95, 2, loc=0.6, scale=stats.sem(values))
    assert line.accuracy == pytest.approx((0.6, low, high))
    assert line.seeds == [0, 1, 2]
    assert line.point == {}


def test_one_seed_has_no_interval_and_intervals_stay_in_range():
    assert statistics.interval([0.5]) == (0.5, None, None)
    assert statistics.interval([1.0, 0.9])[1:] == (pytest.approx(0.3147, abs=1e-3), 1.0)
    assert statistics.interval([1.0, 1.0]) == (1.0, 1.0, 1.0)


def test_the_best_comes_first_within_each_setting():
    easy = [tiny(setting="easy"), tiny(setting="easy", mixers=["attention"])]
    hard = [tiny(setting="hard", task__seq_len=14), tiny(setting="hard", task__seq_len=14, mixers=["attention"])]
    values = dict(zip([r.fingerprint for r in easy + hard], [0.1, 0.9, 0.4, 0.3], strict=True))
    results = {r.fingerprint: done(r, 0.5, values[r.fingerprint]) for r in easy + hard}
    lines = table(hard + easy, results)
    assert [(m.setting, m.mixer) for m in lines] == [
        ("hard", "efla(heads=2)"),
        ("hard", "attention"),
        ("easy", "attention"),
        ("easy", "efla(heads=2)"),
    ]


def test_divergence_counts_against_a_grid_point_and_is_named():
    runs = {lr: [tiny(optim__lr=lr, seed=s) for s in (0, 1)] for lr in (0.01, 0.02)}
    results = {r.fingerprint: done(r, 0.6, 0.6) for r in runs[0.01]}
    first, second = runs[0.02]
    results[first.fingerprint] = done(first, 0.9, 0.9)
    results[second.fingerprint] = result(second.fingerprint, status="diverged", test=None, validation=None)
    (line,) = table(runs[0.01] + runs[0.02], results)
    assert line.point == {"optim.lr": 0.01}  # 0.9 and a divergence average to 0.45
    assert line.missing == "1 diverged"


def test_a_mixer_that_only_diverged_is_shown_as_such():
    run = tiny()
    gone = result(run.fingerprint, status="diverged", test=None, validation=None)
    (line,) = table([run], {run.fingerprint: gone})
    assert line.accuracy is None
    assert line.missing == "1 diverged"


def test_a_seed_that_diverged_counts_as_zero():
    runs = [tiny(seed=s) for s in (0, 1)]
    results = {runs[0].fingerprint: done(runs[0], 0.8, 0.8)}
    results[runs[1].fingerprint] = result(runs[1].fingerprint, status="diverged", test=None, validation=None)
    (line,) = table(runs, results)
    assert line.accuracy.mean == 0.4
    assert line.seeds == [0, 1]
    assert line.loss == pytest.approx(0.2)  # of the one that ended


def test_of_points_with_equal_accuracy_the_lower_loss_is_chosen_then_the_first():
    runs = [tiny(optim__lr=lr) for lr in (0.01, 0.02, 0.03)]
    results = {r.fingerprint: done(r, 1.0, 1.0) for r in runs}
    assert table(runs, results)[0].point == {"optim.lr": 0.01}
    sure = Scores(loss=-1.0, token_accuracy=1.0, macro_accuracy=1.0)
    results[runs[1].fingerprint] = result(runs[1].fingerprint, validation=sure, test=split(1.0))
    assert table(runs, results)[0].point == {"optim.lr": 0.02}


def test_missing_runs_are_counted():
    runs = [tiny(seed=s) for s in range(3)]
    (line,) = table(runs, {runs[0].fingerprint: done(runs[0], 0.5, 0.5)})
    assert line.missing == "2 missing"
    assert table(runs, {}) == []


def test_steps_to_90_is_a_median_that_knows_of_runs_that_never_got_there():
    def median(*steps):
        runs = [tiny(seed=i) for i in range(len(steps))]
        results = {r.fingerprint: done(r, 0.5, 0.5, steps_to_90=s) for r, s in zip(runs, steps, strict=True)}
        return table(runs, results)[0].steps_to_90

    assert median(10, 30) == 20
    assert median(10, None) is None
    assert median(10, 20, None) == 20


def test_a_point_that_lacks_seeds_is_not_chosen_over_one_that_has_them_all():
    whole = [tiny(seed=s, optim__lr=0.01) for s in range(5)]
    part = [tiny(seed=s, optim__lr=0.02) for s in range(5)]
    results = {r.fingerprint: done(r, 0.8, 0.8) for r in whole}
    results[part[0].fingerprint] = done(part[0], 0.95, 0.95)
    (cell,) = table(whole + part, results)
    assert (cell.point, cell.seeds, cell.missing) == ({"optim.lr": 0.01}, [0, 1, 2, 3, 4], "4 missing")


def test_what_is_no_field_of_the_optimiser_is_another_cell_whatever_it_is_called():
    runs = [tiny(model__width=16), tiny(model__width=32)]
    results = {r.fingerprint: done(r, v, v) for r, v in zip(runs, (0.5, 0.9), strict=True)}
    found = table(runs, results)
    assert [(c.setting, c.accuracy.mean) for c in found] == [("baseline, width=16", 0.5), ("baseline, width=32", 0.9)]


def test_two_plans_that_name_one_setting_differently_pair():
    runs = [tiny(setting="hard"), tiny(setting="seq_len=12", mixers=["attention"])]
    results = {r.fingerprint: done(r, 0.5, 0.5) for r in runs}
    assert [(c.setting, c.mixer) for c in table(runs, results)] == [("hard", "efla(heads=2)"), ("hard", "attention")]


def test_only_points_that_every_mixer_was_given_are_chosen_among():
    efla = [tiny(optim__lr=lr) for lr in (0.01, 0.02)]
    other = [tiny(mixers=["attention"])]
    values = (0.6, 0.9, 0.5)
    results = {r.fingerprint: done(r, v, v) for r, v in zip(efla + other, values, strict=True)}
    first, second = table(efla + other, results)
    assert (first.mixer, first.accuracy.mean) == ("efla(heads=2)", 0.6)
    assert first.note == "one seed has no interval; 1 grid point left out that not every mixer was given"
    assert second.note == "one seed has no interval"


def test_seeds_that_choose_are_not_measured():
    choosing = [tiny(seed=100, optim__lr=lr) for lr in (0.01, 0.02)]
    measured = [tiny(seed=s, optim__lr=0.02) for s in range(3)]
    results = {r.fingerprint: done(r, v, v) for r, v in zip(choosing, (0.7, 0.9), strict=True)}
    results |= {r.fingerprint: done(r, 0.1, 0.8 + r.seed / 100) for r in measured}
    (cell,) = cells(of_runs(measured, results, choosing=choosing))
    assert (cell.seeds, cell.point) == ([0, 1, 2], {"optim.lr": 0.02})
    assert cell.accuracy.mean == pytest.approx(0.81)


def test_a_seed_that_has_not_learned_is_named():
    runs = [tiny(seed=s) for s in range(5)]
    values = (0.93, 0.92, 0.94, 0.55, 0.93)
    results = {r.fingerprint: done(r, v, v) for r, v in zip(runs, values, strict=True)}
    (cell,) = table(runs, results)
    assert cell.note == "1 of 5 seeds has not learned yet"


def test_a_setting_that_any_sweep_measures_is_no_check(tmp_path):
    run = tiny()
    for number, check in enumerate((True, False)):
        record = SweepRecord(
            id=f"s{number}",
            task="recall",
            plan="p",
            protocol="custom",
            command="",
            started=number,
            ended=None,
            fingerprints=(run.fingerprint,),
            planned=(planned(run, check=check),),
        )
        write_sweep(tmp_path, record)
    folder = RunFolder(tmp_path, run.fingerprint)
    folder.create(run)
    folder.finish(done(run, 0.5, 0.5))
    (group,) = load(tmp_path)
    (cell,) = cells(group)
    assert not cell.check
