"""What accuracy depends on: axes of settings, and the course of a training."""

import pytest

from mad_efla.analysis import curves
from mad_efla.analysis.cells import cells
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import load
from tests.reporting.test_report import LENGTHS, MIXERS, RATES, accuracy, grid, made
from tests.runs.test_folder import result
from tests.tiny import tiny


def test_a_diverged_run_pulls_its_learning_curve_to_zero(tmp_path):
    runs = grid(rates=RATES[:1], lengths=LENGTHS[:1], mixers=MIXERS[:1])
    made(tmp_path, runs)
    (tmp_path / runs[1].fingerprint / "result.json").unlink()
    gone = result(runs[1].fingerprint, status="diverged", test=None, validation=None, steps=25)
    RunFolder(tmp_path, runs[1].fingerprint).finish(gone)
    (group,) = load(tmp_path)
    track = curves.validation(cells(group)[0], group)
    assert list(track) == [10, 20, 25, 30]
    assert track[25].mean == pytest.approx(accuracy(runs[0]) * 20 / 30 / 2)
    assert track[30].mean == pytest.approx((accuracy(runs[0]) + accuracy(runs[1])) / 2)  # a row that came before


def test_an_axis_is_a_field_in_which_settings_differ_alone():
    runs = [
        tiny(setting="baseline"),
        tiny(setting="seq_len=16", task__seq_len=16),
        tiny(setting="seq_len=8", task__seq_len=8),
        tiny(setting="vocab_size=10", task__vocab_size=10),
        tiny(setting="both", task__vocab_size=16, task__seq_len=20),
    ]
    axes = {axis.field: axis.settings for axis in curves.axes({r.setting: r for r in runs})}
    assert axes == {
        "task.seq_len": [(8, "seq_len=8"), (12, "baseline"), (16, "seq_len=16")],
        "task.vocab_size": [(8, "baseline"), (10, "vocab_size=10")],
    }


def test_axes_of_one_field_say_in_what_they_differ():
    runs = [tiny(setting=f"{n} {m}", task__seq_len=n, task__vocab_size=m) for n in (8, 12) for m in (8, 10)]
    found = [axis.others for axis in curves.axes({r.setting: r for r in runs}) if axis.field == "task.seq_len"]
    assert found == ["vocab_size=8", "vocab_size=10"]
