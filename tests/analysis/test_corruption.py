"""Curves, areas and halves under corruption; what reads them; why layers fail."""

import json
import math

import pytest
import torch

from mad_efla.analysis import corruption
from mad_efla.analysis.cells import cells
from mad_efla.config import ConfigError
from mad_efla.reporting import charts, report, results
from mad_efla.reporting.figures import robustness as drawings
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import of_runs
from mad_efla.runs.schema import ProbeScore, Result, Scores, SweepRecord
from mad_efla.runs.sweeps import write_sweep
from mad_efla.spectrum import causes
from mad_efla.tracking import records
from tests.cli.test_cli import call
from tests.tasks.test_pixels import classify, toy, trained  # noqa: F401
from tests.tiny import tiny

FALLING = {"noise": {0.0: 0.8, 0.5: 0.6, 1.0: 0.2}, "intensity": {1.0: 0.8, 3.0: 0.8, 5.0: 0.5}}
ENVIRONMENT = dict.fromkeys(("git_commit", "device", "torch", "numpy", "python"), "here")


def result_of(run, probes=FALLING, validation=0.9):
    """Make up a result; None of `probes` is a run that diverged."""
    scores = lambda value: Scores(loss=1.0, token_accuracy=value, macro_accuracy=value)  # noqa: E731
    ended = probes is not None
    return Result(
        fingerprint=run.fingerprint,
        status="finished" if ended else "diverged",
        test=scores(0.8) if ended else None,
        validation=scores(validation) if ended else None,
        chosen_step=1,
        steps=1,
        stopped=None,
        steps_to_90=None,
        parameters=1,
        state_size=1,
        seconds=1.0,
        train_seconds=1.0,
        data_digest="d",
        environment=ENVIRONMENT,
        started=0,
        ended=1,
        probes=tuple(
            ProbeScore(name=name, severity=s, accuracy=a, finite=1.0)
            for name, at in (probes or {}).items()
            for s, a in at.items()
        ),
    )


def arms_of(runs, results):
    return corruption.arms(cells(of_runs(runs, results)))


@pytest.mark.parametrize(
    ("severities", "accuracy", "expected"),
    [([0.0, 1.0], [1.0, 0.0], 0.5), ([1.0, 2.0, 10.0], [1.0, 0.5, 0.5], (0.75 + 4) / 9), ([3.0], [0.4], 0.4)],
)
def test_the_area_is_the_mean_over_the_range(severities, accuracy, expected):
    assert corruption.mean_accuracy(severities, accuracy) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("severities", "accuracy", "neutral", "expected"),
    [
        ([0.0, 1.0], [1.0, 0.0], 0.0, 0.5),
        ([0.0, 0.5, 1.0], [0.8, 0.6, 0.2], 0.0, 0.75),
        ([0.0, 1.0], [0.8, 0.5], 0.0, math.inf),
        ([0.5, 1.0, 2.0], [0.1, 0.8, 0.4], 1.0, 2.0),  # what lies under the neutral one is no fall
        ([0.0, 1.0], [0.0, 0.0], 0.0, 0.0),
    ],
)
def test_the_half_is_where_accuracy_first_halves(severities, accuracy, neutral, expected):
    assert corruption.half_accuracy_severity(severities, accuracy, neutral) == pytest.approx(expected)


def test_the_learning_rate_is_chosen_on_clean_validation_and_divergence_counts_as_nothing():
    low = [classify(optim__lr=1e-3, seed=s) for s in (0, 1)]
    high = [classify(optim__lr=1e-2, seed=s) for s in (0, 1)]
    tough = {"noise": {0.0: 0.8, 1.0: 0.8}}
    found = {r.fingerprint: result_of(r, tough, validation=0.5) for r in low}
    found |= {r.fingerprint: result_of(r, validation=0.9) for r in high}
    (arm,) = arms_of(low + high, found)
    assert {r.optim.lr for r in arm.runs} == {1e-2}  # though the other is the more robust
    assert arm.clean.mean == pytest.approx(0.8)
    noise = arm.curves["noise"]
    assert noise.area.mean == pytest.approx(0.55)
    assert noise.half == pytest.approx((0.75, 0.75, 0.75))
    assert arm.curves["intensity"].half.median == math.inf
    assert arm.mean_area.mean == pytest.approx((0.55 + 0.725) / 2)
    found[high[1].fingerprint] = result_of(high[1], None)
    found |= {r.fingerprint: result_of(r, tough, validation=0.1) for r in low}
    (arm,) = arms_of(low + high, found)
    assert arm.curves["noise"].accuracy[0].mean == pytest.approx(0.4)
    assert arm.curves["noise"].half == pytest.approx((0.0, 0.0, 0.75))
    assert arms_of(low, {r.fingerprint: result_of(r, {}) for r in low}) == []


def test_a_run_tells_mlflow_areas_halves_and_curves():
    result = result_of(classify())
    summary = records.summary(result)
    assert summary["test_area/noise"] == pytest.approx(0.55)
    assert summary["test_half/noise"] == pytest.approx(0.75)
    assert "test_half/intensity" not in summary  # it never halves
    curve = [(p.step, p.value) for p in records.points([], result) if p.name == "test_under/noise"]
    assert curve == [(0, 0.8), (50, 0.6), (100, 0.2)]


def test_a_sweep_tells_mlflow_what_becomes_of_each_mixer():
    runs = [classify(seed=s) for s in (0, 1)]
    arms = arms_of(runs, {r.fingerprint: result_of(r) for r in runs})
    table = json.loads(records.corruption_json(arms))
    rows = {row[3]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    noise, intensity = rows["noise"], rows["intensity"]
    assert noise["area"] == noise["low"] == noise["high"] == pytest.approx(0.55)
    assert (noise["mixer"], noise["seeds"], noise["halves at"]) == ("plain_efla", 2, 0.75)
    assert intensity["halves at"] is None  # it never does


def write_runs(out, runs, made):
    for run, result in zip(runs, made, strict=True):
        folder = RunFolder(out, run.fingerprint)
        folder.create(run)
        folder.finish(result)
    write_sweep(
        out,
        SweepRecord(
            id="s",
            task="smnist",
            plan="toy",
            protocol="custom",
            command="mad-efla sweep",
            fingerprints=tuple(r.fingerprint for r in runs),
            started=0,
            ended=1,
        ),
    )


def test_the_results_page_and_the_report_show_areas_and_halves(tmp_path, monkeypatch):
    runs = [classify(seed=s) for s in (0, 1)]
    write_runs(tmp_path, runs, [result_of(r) for r in runs])
    text = results.sections(tmp_path)["toy"]
    assert "| plain_efla | 0.01 | 80.0 [80.0, 80.0] | " in text
    assert " | 55.0 [55.0, 55.0] | 72.5 [72.5, 72.5] |" in text
    assert "| plain_efla | 0.75 | > 5 |" in text
    monkeypatch.setitem(charts.DRAW, "spectra", lambda chapter: [])  # there are no weights
    page, *drawn = report.write(tmp_path, tmp_path / "page.html")
    assert "Severity at which accuracy is half" in page.read_text()
    assert [p for p in drawn if p.name == "toy-custom-corruption-smnist-baseline-0.png"]


def test_many_mixers_are_drawn_in_groups_of_equal_size():
    names = [str(i) for i in range(12)]
    assert [len(group) for group in drawings.chunks(names)] == [6, 6]
    assert [name for group in drawings.chunks(names) for name in group] == names
    assert drawings.chunks(names[:8]) == [names[:8]]


# ------------------------------------------------------------------ causes


@pytest.fixture
def subject(toy, tmp_path):  # noqa: F811
    _, folder = trained(classify(task__corruptions={"intensity": [1, 20]}), tmp_path)
    return causes.load(folder)


def test_all_parts_together_are_the_whole_layer_and_none_is_no_change(subject):
    clean = subject.probes["intensity", 1.0]
    bad = subject.probes["intensity", 20.0]
    everything = tuple(causes.PARTS)
    whole, *_ = causes.blame(subject, "intensity", 20.0, [everything])
    assert whole.alone == causes._accuracy(subject.model, bad)
    assert whole.mended == causes._accuracy(subject.model, clean)
    assert whole.alone < whole.mended
    same = list(causes.blame(subject, "intensity", 1.0))
    assert {b.alone for b in same} == {b.mended for b in same} == {whole.mended}
    assert [b.parts for b in same] == [*((p,) for p in causes.PARTS), everything]


@pytest.mark.parametrize("part", causes.PARTS)
def test_a_part_taken_from_elsewhere_changes_it_alone(subject, part):
    x = torch.rand(2, 2, 16, 16)
    own, other = (subject.model.mixers[0].parts(z) for z in x)
    mixed = causes.PARTS[part](own, other)
    field = {"query": "q", "value size": "v", "value direction": "v"}.get(part, part)
    untouched = [f for f in ("q", "key", "v", "erase", "write") if f != field]
    assert all(getattr(mixed, f) is getattr(own, f) for f in untouched)
    if field != "v":
        assert getattr(mixed, field) is getattr(other, field)
        return
    size, direction = mixed.v.norm(dim=-1), torch.nn.functional.normalize(mixed.v, dim=-1)
    sized, directed = (other, own) if part == "value size" else (own, other)
    assert torch.allclose(size, sized.v.norm(dim=-1), atol=1e-6)
    assert torch.allclose(direction, torch.nn.functional.normalize(directed.v, dim=-1), atol=1e-5)


def test_levels_show_what_brightness_does_to_raw_keys(subject):
    one, twenty = causes.levels(subject, "intensity", examples=4)
    assert (one.severity, twenty.severity) == (1.0, 20.0)
    assert twenty.scalars["lambda_mean"] > 50 * one.scalars["lambda_mean"]
    assert twenty.scalars["wiped"] > one.scalars["wiped"]


def test_what_cannot_be_taken_apart_is_said(subject, toy, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="'fog' is no corruption of the task"):
        list(causes.levels(subject, "fog"))
    with pytest.raises(ConfigError, match=r"intensity 3: the run's task has severities \[1.0, 20"):
        list(causes.blame(subject, "intensity", 3.0))
    with pytest.raises(ConfigError, match="did you mean 'write'"):
        list(causes.blame(subject, "intensity", 20.0, [("writ",)]))
    run = classify(mixers=[{"name": "linear_attention"}], train__steps=1)
    _, folder = trained(run, tmp_path)
    with pytest.raises(ConfigError, match="'linear_attention' is not of the delta family"):
        list(causes.blame(causes.load(folder), "intensity", 1.0))
    _, folder = trained(tiny(train__steps=1), tmp_path)
    with pytest.raises(ConfigError, match="task recall has no corruptions"):
        causes.load(folder)


def test_the_command_draws_and_prints(toy, tmp_path):  # noqa: F811
    runs = [
        classify(seed=s, mixers=[{"name": m}], task__corruptions={"intensity": [1, 20]}, train__steps=20)
        for m in ("plain_efla", "linear_attention")
        for s in (0, 1)
    ]
    made = [trained(run, tmp_path)[0] for run in runs]
    write_runs(tmp_path / "runs", runs, made)
    done = call(
        "causes", str(tmp_path / "runs"), "--to", str(tmp_path / "figures"), "--parts", "erase+write", "--examples", "2"
    )
    for words in (
        "plain_efla under intensity",
        "linear_attention under intensity",
        "erase + write",
        "intensity-states.png",
        "intensity-blame.svg",
    ):
        assert words in done.stdout
    assert (tmp_path / "figures" / "intensity-blame.png").stat().st_size > 5_000
    done = call("causes", str(tmp_path / "runs"), "--mixer", "plain_elfa", code=2)
    assert "did you mean 'plain_efla'" in " ".join(done.stderr.split())
    done = call("causes", str(tmp_path / "runs"), "--plan", "toys", code=2)
    assert "did you mean 'toy'" in " ".join(done.stderr.split())
