"""One folder of awkward sweeps, and one number for each cell in every output.

A grid over the model's width, two vocabularies under one label, a mixer with a seed more, a run that
diverged and one that is missing.
"""

import csv
import io
import json
import re
from pathlib import Path

import mlflow
import pytest

import mad_efla as mad
from mad_efla.analysis.cells import cells
from mad_efla.api import sweeping
from mad_efla.plan import expand
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import load, of_record
from mad_efla.runs.sweeps import read_sweeps
from tests.analysis.test_cells import done
from tests.cli.test_cli import call
from tests.runs.test_folder import result
from tests.tiny import TASK

PLAN = """
protocol: custom
mixers: [{name: efla, heads: 2}, {name: deltanet, heads: 2}]
settings: {recall: {hard: {}}}
seeds: [0, 1]
grid: {model.width: [16, 32]}
model: {depth: 1}
data: {train_examples: 64, validation_examples: 32, test_examples: 32}
optim: {lr: 1e-2}
train: {batch_size: 16, steps: 20, eval_every: 10}
"""
SWEEPS = ([], ["task.vocab_size=10"], ["seeds=[2]", "mixers=[{name: efla, heads: 2}]"])


def accuracy(run):
    """Return an accuracy that no two cells share, different from seed to seed."""
    base = 0.3 + 0.0017 * (run.model.width + 13 * run.task.vocabulary) + 0.1 * (run.mixers[0].name == "efla")
    return base + 0.013 * run.seed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("task.yaml").write_text(TASK)
        Path("plan.yaml").write_text(PLAN)
        out = Path("runs")
        count = 0
        for assignments in SWEEPS:
            sweep = expand.expand("task.yaml", "plan.yaml", assignments, "float32")
            for run in sweep.runs:
                count += 1
                if count == 3:
                    continue  # missing
                runs = RunFolder(out, run.fingerprint)
                runs.create(run)
                value = accuracy(run)
                ended = done(run, value, value, chance=0.2)
                if count == 6:
                    ended = result(run.fingerprint, status="diverged", test=None, validation=None)
                runs.finish(ended)
            sweeping.record(sweep, out)
        call("archive", "runs", "--to", "all.parquet")
    return folder


@pytest.fixture
def story(made, monkeypatch):
    monkeypatch.chdir(made)
    (group,) = load(Path("runs"))
    return {(c.setting, c.mixer): c for c in cells(group)}


def shown(cell):
    """Return the number of a cell as tables write it."""
    return f"{100 * cell.accuracy.mean:.1f}"


def test_the_folder_is_as_awkward_as_it_is_meant_to_be(story):
    assert len(story) == 8
    assert len({setting for setting, _ in story}) == 4
    assert {len(c.seeds) for c in story.values()} == {2, 3}
    notes = " ".join(c.missing for c in story.values())
    assert "1 missing" in notes
    assert "1 diverged" in notes
    assert len({shown(c) for c in story.values()}) == 8


def test_python_says_the_same_of_folder_and_archive(story):
    for place in ("runs", "all.parquet"):
        table = mad.load(place).scores().set_index(["setting", "mixer"]).accuracy
        assert table.to_dict() == {key: cell.accuracy.mean for key, cell in story.items()}


def test_the_frame_averages_to_it(story):
    frame = mad.load("runs").frame()
    for cell in story.values():
        own = frame.loc[[run.fingerprint for run in cell.runs]]
        assert own.score.mean() == pytest.approx(cell.accuracy.mean)


def test_scores_of_the_task_are_the_mean_of_its_cells(story):
    (board,) = json.loads(call("score", "runs", "--json").stdout)
    rows = list(csv.DictReader(io.StringIO(call("score", "runs", "--csv").stdout)))
    for mixer in ("efla(heads=2)", "deltanet(heads=2)"):
        own = [c.accuracy.mean for (_, name), c in story.items() if name == mixer]
        mean = sum(own) / len(own)
        (found,) = (t for t in board["tasks"] if t["mixer"] == mixer)
        assert found["accuracy"]["mean"] == pytest.approx(mean)
        (row,) = (r for r in rows if r["mixer"] == mixer and r["task"] == "recall")
        assert mean == pytest.approx(float(next(v for k, v in row.items() if "accuracy" in k)), abs=1e-4)
        assert f"{100 * mean:.1f}" in call("score", "runs").stdout


def test_the_pages_show_it(story):
    page = call("results", "runs").stdout
    call("report", "runs", "--to", "page/index.html")
    html = re.sub(r"<[^>]+>", " ", Path("page/index.html").read_text(encoding="utf-8"))
    for (setting, mixer), cell in story.items():
        assert shown(cell) in page, (setting, mixer)
        assert shown(cell) in html, (setting, mixer)


@pytest.mark.filterwarnings("ignore")  # of MLflow's
def test_a_sweeps_own_table_and_its_run_in_mlflow_show_its_cells(story):
    del story
    uri = f"sqlite:///{Path('mlflow.db').absolute()}"
    call("sync", "--out", "runs", "--tracking-uri", uri)
    mlflow.set_tracking_uri(uri)
    parents = mlflow.search_runs(
        experiment_names=["recall"], filter_string="tags.`mad.role` = 'sweep'", output_format="list"
    )
    assert len(parents) == len(SWEEPS)
    for parent in parents:
        (record,) = (r for r in read_sweeps(Path("runs")) if r.id == parent.data.tags["mad.sweep"])
        own = {(c.setting, c.mixer): c.accuracy.mean for c in cells(of_record(record, Path("runs")))}
        text = mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/leaderboard.csv")
        rows = {(r["setting"], r["mixer"]): float(r["accuracy"]) for r in csv.DictReader(io.StringIO(text))}
        assert rows == {key: round(mean, 4) for key, mean in own.items()}
        assert all(f"{mean:.4f}".rstrip("0") in parent.data.tags["mlflow.note.content"] for mean in own.values())
