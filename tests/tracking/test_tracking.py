"""What MLflow shows is what the run folders hold, however often it is told, and by whomever."""

import contextlib
import http.client
import json
import logging
import math
import multiprocessing
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from mad_efla import tracking
from mad_efla.analysis.cells import cells
from mad_efla.config import ConfigError
from mad_efla.plan.run import RunConfig
from mad_efla.reporting.figures import artifacts
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import of_record
from mad_efla.runs.schema import Result, Row, Scores, SweepRecord
from mad_efla.runs.sweeps import read_sweeps, sweep_figures, write_sweep
from mad_efla.tracking import experiments, locks, mirror, page, records, stores
from mad_efla.tracking.bridge import Bridge
from mad_efla.training import model
from tests import browser
from tests.cli.test_cli import SWEEP, call, folders
from tests.tiny import tiny

OUT = Path("runs")
TRACE = "Traceback (most recent call last):\n  ...\nValueError: why"


def rows(*steps: int, time: int = 1_000) -> list[Row]:
    found = []
    for step in steps:
        found.append(Row(step, time + step, {"train/loss": 1 / step, "train/learning_rate": 0.01}))
        found.append(Row(step, time + step, {"spectrum/horizon_p50": 6 - step / 10}))
        if step % 20 == 0:
            found.append(Row(step, time + step, {"val/token_accuracy": step / 100}))
    return found


def begun(run: RunConfig, *steps: int) -> RunFolder:
    folder = RunFolder(OUT, run.fingerprint)
    folder.create(run)
    folder.append(rows(*steps))
    return folder


def result(run: RunConfig, accuracy: float | None = 0.5, **fields) -> Result:
    scores = None
    if accuracy is not None:
        scores = Scores(loss=1.0, token_accuracy=accuracy, macro_accuracy=accuracy)
    values = {
        "fingerprint": run.fingerprint,
        "status": "finished",
        "test": scores,
        "validation": scores,
        "chosen_step": 20,
        "steps": 30,
        "stopped": None,
        "steps_to_90": None,
        "parameters": 100,
        "state_size": 10,
        "seconds": 1.0,
        "train_seconds": 0.5,
        "data_digest": "d" * 16,
        "environment": {"torch": "2", "git_commit": "a" * 40 + "+"},
        "started": 900,
        "ended": 2_000,
    }
    return Result(**(values | fields))


def finished(run: RunConfig, accuracy: float = 0.5) -> RunFolder:
    folder = begun(run, 10, 20, 30)
    folder.finish(result(run, accuracy))
    return folder


def learned(run: RunConfig, accuracy: float = 0.5) -> RunFolder:
    """A finished run with weights, those it would begin with."""
    folder = finished(run, accuracy)
    folder.save_model(model.build(run).state_dict())
    return folder


def swept(*runs: RunConfig, id: str = "s1", plan: str = "quick", started: int = 1) -> SweepRecord:
    record = SweepRecord(
        id=id,
        task=runs[0].task.name,
        plan=plan,
        protocol="custom",
        command="mad-efla sweep recall",
        fingerprints=tuple(r.fingerprint for r in runs),
        started=started,
        ended=3_000,
    )
    write_sweep(OUT, record)
    return record


def shown(client, role: str = "cell") -> dict:
    """Runs in the store: cells by fingerprint, sweeps by id."""
    experiment = client.get_experiment_by_name("recall")
    found = client.search_runs([experiment.experiment_id], f"tags.`mad.role` = '{role}'")
    key = {"cell": "mad.fingerprint", "sweep": "mad.sweep"}[role]
    by_key = {r.data.tags[key]: r for r in found}
    assert len(by_key) == len(found)
    return by_key


def points(uri: str) -> list[tuple]:
    database = sqlite3.connect(uri.removeprefix("sqlite:///"))
    try:
        query = "SELECT run_uuid, key, step, value FROM metrics ORDER BY 1, 2, 3"
        return database.execute(query).fetchall()
    finally:
        database.close()


# ------------------------------------------------------------------ one sweep


def test_a_sweep_is_shown_with_a_run_for_each_cell(uri, client):
    good, bad, broken, stopped, waiting = (tiny(seed=seed) for seed in range(5))
    finished(good, 0.75)
    diverged = result(bad, None, status="diverged", stopped="loss not finite at step 12")
    begun(bad, 10).finish(diverged)
    begun(broken, 10).fail("failed", "ValueError: why", TRACE)
    begun(stopped, 10)
    swept(good, bad, broken, stopped, waiting)

    report = tracking.sync(uri, OUT)

    assert report == (4, None, (), {"recall": "1"})
    cells, parent = shown(client), shown(client, "sweep")["s1"]
    assert {f: r.info.status for f, r in cells.items()} == {
        good.fingerprint: "FINISHED",
        bad.fingerprint: "FINISHED",
        broken.fingerprint: "FAILED",
        stopped.fingerprint: "KILLED",
    }
    assert {r.data.tags["mlflow.parentRunId"] for r in cells.values()} == {parent.info.run_id}
    assert parent.info.run_name == "quick"
    assert parent.info.status == "KILLED"  # not all of its runs have ended
    assert parent.data.metrics["sweep/failed"] == 1
    assert "1 diverged, 1 failed, 1 finished" in parent.data.tags["mlflow.note.content"]
    listed = [a.path for a in client.list_artifacts(parent.info.run_id)]
    assert listed == ["leaderboard.csv", "leaderboard.json"]
    traced = client.list_artifacts(cells[broken.fingerprint].info.run_id)
    assert [a.path for a in traced] == ["config.json", "traceback.txt"]


def test_a_cell_holds_all_there_is_to_know_of_its_run(uri, client):
    run = tiny(optim__lr=0.003)
    finished(run, 0.75)
    swept(run)
    tracking.sync(uri, OUT)
    cell = shown(client)[run.fingerprint]

    assert cell.info.run_name == "efla(heads=2) baseline seed 0"
    assert (cell.info.start_time, cell.info.end_time) == (900, 2_000)
    for section in ("task", "data", "model", "optim", "train"):
        for key, value in getattr(run, section).model_dump().items():
            assert cell.data.params[f"{section}.{key}"] == str(value)
    assert cell.data.params["token_mixer.heads"] == "2"
    assert float(cell.data.params["optim.lr_log10"]) == pytest.approx(math.log10(0.003), abs=1e-6)
    tags = cell.data.tags
    assert (tags["mad.protocol"], tags["mad.mixer"]) == ("custom", "efla(heads=2)")
    assert (tags["mad.env.torch"], tags["mad.status"]) == ("2", "finished")
    assert tags["mlflow.source.git.commit"] == "a" * 40
    assert cell.data.metrics["test/token_accuracy"] == 0.75
    assert cell.data.metrics["total/diverged"] == 0
    history = client.get_metric_history(cell.info.run_id, "train/loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [
        (10, 1 / 10, 1_010),
        (20, 1 / 20, 1_020),
        (30, 1 / 30, 1_030),
    ]
    assert [d.dataset.digest for d in cell.inputs.dataset_inputs] == ["d" * 16]
    path = client.download_artifacts(cell.info.run_id, "config.json", ".")
    assert json.loads(Path(path).read_text()) == run.model_dump(mode="json")


def test_a_sweep_of_which_a_run_failed_has_failed(uri, client):
    good, bad = tiny(seed=0), tiny(seed=1)
    finished(good)
    begun(bad).fail("failed", "ValueError: why", TRACE)
    swept(good, bad)
    tracking.sync(uri, OUT)
    assert shown(client, "sweep")["s1"].info.status == "FAILED"


def test_the_accuracy_is_logged_first(uri, client):
    run = tiny()
    finished(run)
    tracking.sync(uri, OUT)
    assert next(iter(shown(client)[run.fingerprint].data.metrics)) == tracking.PRIMARY


def test_a_running_run_is_shown_from_its_first_accuracy_on(uri, client):
    run = tiny()
    folder = begun(run, 10)
    with folder.lock():
        tracking.sync(uri, OUT)
        assert not shown(client)[run.fingerprint].data.metrics
        folder.append(rows(20))
        tracking.sync(uri, OUT)
    assert next(iter(shown(client)[run.fingerprint].data.metrics)) == "val/token_accuracy"


def test_a_diverged_run_has_no_score_and_nothing_infinite(uri, client):
    run = tiny()
    folder = begun(run, 10)
    folder.append([Row(20, 1_020, {"train/loss": math.inf, "val/loss": math.nan})])
    folder.finish(result(run, None, status="diverged", stopped="loss not finite at step 12"))
    tracking.sync(uri, OUT)
    metrics = shown(client)[run.fingerprint].data.metrics
    assert metrics["total/diverged"] == 1
    assert "test/token_accuracy" not in metrics
    assert all(abs(value) < 1e300 for *_, value in points(uri))
    assert "val/loss" not in metrics


def test_names_hold_the_fields_in_which_cells_differ():
    runs = [tiny(optim__lr=lr, seed=seed) for lr in (0.1, 0.2) for seed in (0, 1)]
    names = records.names([*runs, tiny(mixers=["deltanet"])])
    assert list(names.values()) == [
        "efla(heads=2) baseline lr=0.1 seed 0",
        "efla(heads=2) baseline lr=0.1 seed 1",
        "efla(heads=2) baseline lr=0.2 seed 0",
        "efla(heads=2) baseline lr=0.2 seed 1",
        "deltanet baseline seed 0",
    ]


def test_a_pattern_of_mixers_is_told_apart_by_place():
    run = tiny(mixers=["efla", "attention"], model__depth=2)
    found = records.parameters(run)
    assert found["mixer"] == "efla+attention"
    assert (found["token_mixer.0.name"], found["token_mixer.1.name"]) == ("efla", "attention")


def test_a_folder_that_cannot_be_read_is_noted_and_the_rest_is_shown(uri, client):
    good, bad = tiny(seed=0), tiny(seed=1)
    finished(good)
    (finished(bad).path / "config.json").write_text("{")
    swept(good, bad)
    report = tracking.sync(uri, OUT)
    assert report.problem is None
    assert "cannot be read" in report.notes[0]
    assert list(shown(client)) == [good.fingerprint]


def test_only_the_runs_asked_for_are_told(uri, client):
    runs = [tiny(seed=seed) for seed in range(3)]
    for run in runs:
        finished(run)
    swept(*runs)
    tracking.sync(uri, OUT, fingerprints=[runs[1].fingerprint])
    assert list(shown(client)) == [runs[1].fingerprint]


def test_each_folder_is_read_once_however_often_the_leaderboard_is_made(uri, client, monkeypatch):
    runs = [tiny(seed=seed) for seed in range(4)]
    folders = [finished(run) if run.seed else begun(run, 10) for run in runs]
    swept(*runs)
    bridge, read = Bridge(uri, OUT), Counter()
    whole = RunFolder.run
    monkeypatch.setattr(RunFolder, "run", lambda self: read.update([self.fingerprint]) or whole(self))
    assert bridge.sync(math.inf).problem is None
    folders[0].finish(result(runs[0], 0.75))
    assert bridge.sync(math.inf).problem is None
    assert read == dict.fromkeys((run.fingerprint for run in runs), 1)
    table = client.load_table(bridge.experiments["recall"], "leaderboard.json")
    [cell] = cells(of_record(read_sweeps(OUT)[0], OUT))
    assert cell.accuracy
    assert (table["accuracy"].tolist(), table["seeds"].tolist()) == ([cell.accuracy.mean], [4]) == ([0.5625], [4])


# ------------------------------------------------------------------ again and again


def test_telling_it_again_changes_nothing(uri, client):
    done, stopped = tiny(seed=0), tiny(seed=1)
    finished(done)
    begun(stopped, 10, 20)
    swept(done, stopped)
    tracking.sync(uri, OUT)
    before = points(uri)
    tracking.sync(uri, OUT)
    assert points(uri) == before
    assert len(shown(client)) == 2


def test_a_run_that_goes_on_is_running_and_keeps_one_point_a_step(uri, client):
    run = tiny()
    folder = begun(run, 10, 20, 30)
    tracking.sync(uri, OUT)
    assert shown(client)[run.fingerprint].info.status == "KILLED"
    # It goes on from the checkpoint of step 10: later steps are made, and timed, again.
    (folder.path / "metrics.jsonl").unlink()
    folder.append(rows(10) + rows(20, 30, 40, time=5_000))
    with folder.lock() as free:
        assert free
        tracking.sync(uri, OUT)
        assert shown(client)[run.fingerprint].info.status == "RUNNING"
    folder.finish(result(run))
    tracking.sync(uri, OUT)
    cell = shown(client)[run.fingerprint]
    assert cell.info.status == "FINISHED"
    history = client.get_metric_history(cell.info.run_id, "train/loss")
    assert [m.step for m in history] == [10, 20, 30, 40]
    assert [m.timestamp for m in history] == [1_010, 1_020, 1_030, 5_040]


def test_what_a_killed_process_left_running_becomes_killed(uri, client):
    run, other = tiny(seed=0), tiny(seed=1)
    folder, vanished = begun(run, 10, 20), begun(other, 10, 20)
    record = swept(run, other)
    with folder.lock(), vanished.lock():
        tracking.sync(uri, OUT)
        assert {r.info.status for r in shown(client).values()} == {"RUNNING"}
        assert shown(client, "sweep")[record.id].info.status == "RUNNING"
    (vanished.path / "metrics.jsonl").unlink()  # killed before it logged anything: it waits
    tracking.sync(uri, OUT)
    assert {r.info.status for r in shown(client).values()} == {"KILLED"}
    assert shown(client, "sweep")[record.id].info.status == "KILLED"


def test_a_run_of_two_sweeps_is_shown_once_under_the_first(uri, client):
    run = tiny()
    finished(run)
    swept(run, id="s1", started=1)
    swept(run, id="s2", plan="mad", started=2)
    tracking.sync(uri, OUT)
    tags = shown(client)[run.fingerprint].data.tags
    assert tags["mlflow.parentRunId"] == shown(client, "sweep")["s1"].info.run_id
    assert (tags["mad.sweep.s1"], tags["mad.sweep.s2"]) == ("quick", "mad")


def test_what_the_user_deleted_in_mlflow_stays_deleted(uri, client):
    run = tiny()
    begun(run, 10, 20)
    swept(run)
    tracking.sync(uri, OUT)
    client.delete_run(shown(client)[run.fingerprint].info.run_id)
    client.delete_run(shown(client, "sweep")["s1"].info.run_id)
    begun(run, 30)
    assert tracking.sync(uri, OUT).problem is None
    assert shown(client) == shown(client, "sweep") == {}


def test_a_deleted_experiment_is_said(uri, client):
    finished(tiny())
    client.delete_experiment(tracking.sync(uri, OUT).experiments["recall"])
    assert "mlflow experiments restore" in str(tracking.sync(uri, OUT).problem)


# ------------------------------------------------------------------ tables, figures, models


def test_the_leaderboard_is_a_table_that_mlflow_reads(uri, client):
    good, bad = tiny(seed=0), tiny(mixers=["deltanet"])
    finished(good, 0.75)
    finished(bad, 0.5)
    swept(good, bad)
    table = client.load_table(tracking.sync(uri, OUT).experiments["recall"], "leaderboard.json")
    assert table["mixer"].tolist() == ["efla(heads=2)", "deltanet"]
    assert table["accuracy"].tolist() == [0.75, 0.5]


def test_figures_are_artifacts_and_drawn_again_are_sent_again(uri, client, tmp_path):
    run = tiny()
    folder = finished(run)
    record = swept(run)
    tracking.sync(uri, OUT)  # complete before anything is drawn
    for path in (folder.figures / "a.png", sweep_figures(OUT, record.id) / "b.png"):
        path.parent.mkdir()
        path.write_bytes(b"first")
    for text in (b"first", b"second"):
        (folder.figures / "a.png").write_bytes(text)
        tracking.sync(uri, OUT)
        [cell], [parent] = shown(client).values(), shown(client, "sweep").values()
        got = client.download_artifacts(cell.info.run_id, "figures/a.png", str(tmp_path))
        assert Path(got).read_bytes() == text
    assert client.list_artifacts(parent.info.run_id, "figures")[0].path == "figures/b.png"
    sent = cell.data.tags["mad.figures"]
    tracking.sync(uri, OUT)
    assert shown(client)[run.fingerprint].data.tags["mad.figures"] == sent


def test_a_logged_model_is_the_run_s_own_and_logged_once(uri, client):
    run, other = tiny(), tiny(seed=1)
    folder = learned(run)
    finished(other)  # its weights are gone
    swept(run, other)
    experiment = tracking.sync(uri, OUT).experiments["recall"]
    assert not client.search_logged_models([experiment])
    for _ in range(2):
        assert tracking.sync(uri, OUT, log_models=True).problem is None
    [logged] = client.search_logged_models([experiment])
    cell = shown(client)[run.fingerprint]
    assert cell.data.tags["mad.model"] == logged.model_id
    assert [m.model_id for m in cell.outputs.model_outputs] == [logged.model_id]
    import mlflow

    mlflow.set_tracking_uri(uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a pickle is loaded
        loaded = mlflow.pytorch.load_model(f"models:/{logged.model_id}")
    mlflow.set_tracking_uri(None)
    tokens = torch.arange(8)[None] % run.task.vocabulary
    own = model.build(run)
    own.load_state_dict(folder.load_model())
    assert torch.equal(loaded(tokens), own(tokens))
    assert not loaded.training


def test_a_sweep_ends_with_figures_and_models_in_mlflow(uri, client, files):
    call(*SWEEP[:-1], "--log-model")
    runs = client.search_runs(["1"])
    assert sum("mad.figures" in run.data.tags for run in runs) == 3  # two runs and their sweep
    assert sum("mad.model" in run.data.tags for run in runs) == 4
    fresh = next(f for f in folders(files) if not f.figures.exists())
    call("spectrum", fresh.fingerprint, "--log")
    assert sum("mad.figures" in run.data.tags for run in client.search_runs(["1"])) == 4
    [record] = read_sweeps(OUT)
    shutil.rmtree(sweep_figures(OUT, record.id))
    sweep_figures(OUT, record.id).write_text("in the way")
    done = call("sync", "--figures")
    assert "4 runs are up to date" in done.stdout
    assert "not all is drawn: FileExistsError" in done.stderr


def test_the_recipes_of_the_reference_find_what_they_say(uri):
    text = (Path(__file__).parents[2] / "REFERENCE.md").read_text()
    [recipes] = [b.split("```")[0] for b in text.split("```python\n") if "search_runs" in b]
    good, lost = learned(tiny(), 0.9), tiny(mixers=["mamba2"])
    finished(tiny(seed=1), 0.7)
    begun(lost, 10).finish(result(lost, None, status="diverged", stopped="at step 12"))
    swept(*(RunFolder(OUT, p.parent.name).run() for p in sorted(OUT.glob("*/config.json"))))
    assert tracking.sync(uri, OUT, log_models=True).problem is None
    import mlflow

    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's dependencies
        try:
            exec(recipes, found)
        finally:
            mlflow.set_tracking_uri(None)
    assert found["best"]["tags.mad.fingerprint"][0] == good.fingerprint
    assert found["table"].loc["efla(heads=2)", "baseline"] == pytest.approx(0.8)
    assert len(found["forgetful"]) == 2
    assert found["diverged"]["tags.mad.fingerprint"].tolist() == [lost.fingerprint]
    assert [point.step for point in found["curve"]] == [10, 20, 30]
    assert isinstance(found["model"], model.LanguageModel)


# ------------------------------------------------------------------ the live mirror


def test_a_mirror_leaves_everything_told(uri, client, monkeypatch):
    monkeypatch.setattr(mirror, "LIVE_SECONDS", 0.01)
    run = tiny()
    record = swept(run)
    with tracking.Mirror(uri, OUT, record) as shadow, RunFolder(OUT, run.fingerprint).lock():
        folder = begun(run, 10, 20)
        while not client.get_experiment_by_name("recall") or not shown(client):
            pass  # until it has noticed, however long that takes
        assert shown(client, "sweep")[record.id].info.status == "RUNNING"
        folder.append(rows(30))
        folder.finish(result(run))
    assert shadow.problem is None
    cell = shown(client)[run.fingerprint]
    assert cell.info.status == shown(client, "sweep")[record.id].info.status == "FINISHED"
    history = client.get_metric_history(cell.info.run_id, "train/loss")
    assert [m.step for m in history] == [10, 20, 30]


def test_a_server_that_was_away_is_told_everything_when_it_is_back(uri, client, monkeypatch):
    monkeypatch.setattr(mirror, "LIVE_SECONDS", 0.01)
    refusals, connect = [], experiments.client

    def refuse(uri):
        if len(refusals) < 4:
            refusals.append(1)
            raise ConnectionError("refused")
        return connect(uri)

    monkeypatch.setattr(experiments, "client", refuse)
    run, problems = tiny(), set()
    with tracking.Mirror(uri, OUT, swept(run)) as shadow:
        finished(run)
        while len(refusals) < 4:
            time.sleep(0.001)
            problems.add(shadow.problem)
    assert any("mad-efla sync" in str(problem) for problem in problems)  # while it was away
    assert shadow.problem is None
    assert shown(client)[run.fingerprint].info.status == "FINISHED"


def test_a_sweep_between_two_runs_is_not_taken_for_killed(uri, client):
    record = swept(tiny())
    live = locks.Live(OUT, [record.id])
    live.show()
    tracking.sync(uri, OUT)
    assert shown(client, "sweep")[record.id].info.status == "RUNNING"
    live.end()
    tracking.sync(uri, OUT)
    assert shown(client, "sweep")[record.id].info.status == "KILLED"


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_does_not_answer_is_a_sentence_and_no_wait(template, closed_port):
    run = tiny()
    finished(run)
    begin = time.monotonic()
    with tracking.Mirror(f"http://me:secret@127.0.0.1:{closed_port}", OUT, swept(run)) as shadow:
        pass
    assert time.monotonic() - begin < mirror.CLOSE_SECONDS + 2
    assert "does not answer" in str(shadow.problem)
    assert "mad-efla sync" in str(shadow.problem)
    assert "secret" not in str(shadow.problem)


def test_closing_does_not_wait_for_a_server_that_hangs(template, monkeypatch):
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        begin = time.monotonic()
        with tracking.Mirror(f"http://127.0.0.1:{port}", OUT, swept(tiny())) as shadow:
            deaf.accept()[0].close()
        assert time.monotonic() - begin < 10
    assert "not up to date yet" in str(shadow.problem)
    shadow._thread.join()


def test_the_environment_and_loggers_are_left_as_they_were(uri, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    before, level = dict(os.environ), logging.getLogger("mlflow").level
    finished(tiny())
    with stores.mlflow_settings(), stores.mlflow_settings():
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    tracking.sync(uri, OUT)
    assert dict(os.environ) == before
    assert logging.getLogger("mlflow").level == level
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------ a driver that was killed


def _drive(uri: str, record: SweepRecord) -> None:
    """Be the driver of a sweep whose only run is at work, until killed."""
    with tracking.Mirror(uri, OUT, record), RunFolder(OUT, record.fingerprints[0]).lock():
        Path("held").touch()
        while True:
            time.sleep(0.02)


@pytest.fixture
def killed(uri, client, monkeypatch):
    """A sweep of `recall` whose driver was killed by SIGKILL; MLflow shows it as running."""
    monkeypatch.setattr(mirror, "LIVE_SECONDS", 0.05)
    run = tiny()
    begun(run, 10, 20)
    record = swept(run)
    context = multiprocessing.get_context("fork")  # MLflow need not be imported again
    driver = context.Process(target=_drive, args=(uri, record))
    driver.start()
    try:
        while not client.get_experiment_by_name("recall") or len(_statuses(client)) < 2:
            assert driver.is_alive()
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.join()
    assert _statuses(client) == ["RUNNING", "RUNNING"]
    return record


def _statuses(client) -> list[str]:
    return [r.info.status for r in [*shown(client).values(), *shown(client, "sweep").values()]]


def test_the_next_sync_sees_that_a_driver_was_killed(killed, uri, client):
    assert tracking.sync(uri, OUT).problem is None
    assert _statuses(client) == ["KILLED", "KILLED"]


def test_the_next_sweep_sees_that_the_driver_of_another_was_killed(killed, uri, client):
    other = tiny(seed=7)
    finished(other)
    with tracking.Mirror(uri, OUT, swept(other, id="s2", plan="mad")) as shadow:
        pass
    assert shadow.problem is None
    assert shown(client)[killed.fingerprints[0]].info.status == "KILLED"
    assert shown(client, "sweep")["s1"].info.status == "KILLED"
    assert shown(client, "sweep")["s2"].info.status == "FINISHED"


def test_one_mirror_follows_all_sweeps_of_a_call(uri, client, monkeypatch):
    runs = [tiny(seed=0), tiny(seed=1), tiny(seed=2)]
    for run in runs:
        finished(run)
    first, second, third = (swept(run, id=f"s{i}", started=i) for i, run in enumerate(runs))
    with tracking.Mirror(uri, OUT, first, second) as shadow:
        pass
    assert shadow.problem is None
    assert set(shown(client, "sweep")) == {"s0", "s1"}
    assert third.id == "s2"


# ------------------------------------------------------------------ stores


def test_the_store_is_the_option_then_the_environment_then_here(monkeypatch, tmp_path):
    assert tracking.resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert tracking.resolve_uri(None) == "http://localhost:5000"
    assert tracking.resolve_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"


@pytest.mark.parametrize("given", ["localhost:5000", "./mlruns", "file:///x", "sqlite://", "x.db"])
def test_a_store_that_is_none_is_refused(given):
    with pytest.raises(ConfigError, match="must"):
        tracking.resolve_uri(given)


def _alter(path: Path, statement: str) -> None:
    database = sqlite3.connect(path)
    database.execute(statement)
    database.commit()
    database.close()


def _newer(path: Path) -> None:
    _alter(path, "UPDATE alembic_version SET version_num = 'ffffffffffff'")


def _older(path: Path) -> None:
    _alter(path, "UPDATE alembic_version SET version_num = '451aebb31d03'")


def _foreign(path: Path) -> None:
    path.unlink()
    _alter(path, "CREATE TABLE mine (x)")


def _damaged(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20_000])


@pytest.mark.parametrize(
    ("spoil", "cure"),
    [
        (_newer, "newer than MLflow .* install the newer MLflow"),
        (_older, "run `mlflow db upgrade sqlite:///"),
        (_foreign, "no MLflow store; name another"),
        (_damaged, "move it away"),
        (_half, "move it away"),
    ],
)
def test_a_store_that_cannot_be_used_is_said_with_the_cure_and_left(uri, tmp_path, spoil, cure):
    import re

    finished(tiny())
    path = tmp_path / "mlflow.db"
    spoil(path)
    before = path.read_bytes()
    report = tracking.sync(uri, OUT)
    assert re.search(cure, str(report.problem))
    assert "mad-efla sync" in str(report.problem)
    assert path.read_bytes() == before


def test_several_processes_may_begin_on_an_empty_folder(template, tmp_path):
    runs = [tiny(seed=seed) for seed in range(2)]
    for run in runs:
        finished(run)
    swept(*runs)
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    context = multiprocessing.get_context("fork")  # MLflow need not be imported again
    queue = context.Queue()
    processes = [context.Process(target=lambda: queue.put(tracking.sync(uri, OUT).problem)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [None] * 3
    for process in processes:
        process.join()
    from mlflow import MlflowClient

    assert set(shown(MlflowClient(uri))) == {r.fingerprint for r in runs}
    assert not list((tmp_path / "new").glob(".mlflow.db.[0-9]*"))


def test_a_store_whose_beginning_was_killed_is_begun_again(template, tmp_path):
    run = tiny()
    finished(run)
    swept(run)
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    context = multiprocessing.get_context("fork")
    for seconds in (0.1, 0.4, 0.8):
        process = context.Process(target=tracking.sync, args=(uri, OUT))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
    assert tracking.sync(uri, OUT).problem is None
    from mlflow import MlflowClient

    assert set(shown(MlflowClient(uri))) == {run.fingerprint}


def test_artifacts_are_beside_the_store(template, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(template, folder / "mlflow.db")
    finished(tiny())
    tracking.sync(f"sqlite:///{folder}/mlflow.db", OUT)
    assert list(folder.glob("mlartifacts/recall/*/artifacts/config.json"))


def test_a_store_that_another_process_holds_is_waited_for_within_the_time(uri):
    finished(tiny())
    with locks.exclusive(uri, OUT, time.monotonic()):
        report = tracking.sync(uri, OUT, timeout_s=0.0)
    assert "the time was over" in str(report.problem)


def test_importing_leaves_mlflow_alone():
    code = "import sys, mad_efla.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------ the page


@pytest.fixture
def executed(monkeypatch):
    """What `ui` would have become."""
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, env: calls.append((command, env)))
    return calls


def test_ui_becomes_the_server_and_says_where(uri, executed, capsys, closed_port):
    finished(tiny())
    tracking.ui(uri, OUT, "127.0.0.1", closed_port, print)
    [(command, environment)] = executed
    assert command[1:4] == ["-m", "mlflow", "server"]
    assert environment["MLFLOW_BACKEND_STORE_URI"] == uri
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    said = capsys.readouterr().out
    assert f"http://127.0.0.1:{closed_port}/#/experiments/1/runs?" in said
    assert "orderByKey=metrics.%60test/token_accuracy%60" in said


def test_ui_says_addresses_that_browsers_take(uri, executed, capsys, closed_port, monkeypatch):
    finished(tiny())
    monkeypatch.setattr(page, "_free_port", lambda host, port: port)
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mine")
    tracking.ui(uri, OUT, "::1", closed_port, print)
    assert f"http://[::1]:{closed_port}/#/" in capsys.readouterr().out
    assert executed[0][1]["MLFLOW_SERVER_ALLOWED_HOSTS"] == "mine"  # what the user has set stands


def test_ui_says_what_is_wrong(uri, executed, closed_port, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port} .* choose another"):
            tracking.ui(uri, OUT, "127.0.0.1", port, print)
    with pytest.raises(ConfigError, match="no such store"):
        tracking.ui(f"sqlite:///{tmp_path}/other.db", OUT, "127.0.0.1", None, print)
    swept(tiny())
    with pytest.raises(ConfigError, match="does not answer"):
        tracking.ui(f"http://127.0.0.1:{closed_port}", OUT, "127.0.0.1", None, print)
    assert not executed


def test_a_server_has_its_own_address_whose_password_is_not_shown():
    link = tracking.deep_link("http://me:secret@lab:8080/", "127.0.0.1", 5000, "7")
    assert link.startswith("http://lab:8080/#/experiments/7/runs?")


# ------------------------------------------------------------------ a real server


@pytest.fixture(scope="module")
def served(template, tmp_path_factory):
    """MLflow's server, as `ui` starts it, on a store with a sweep of three runs and its figures.

    Yields the address it says and the folder of runs.
    """
    said: list[str] = []
    calls: list[tuple[list[str], dict[str, str]]] = []
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(template, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "execve", lambda path, command, env: calls.append((command, env)))
        runs = [tiny(seed=seed) for seed in range(3)]
        for run, accuracy in zip(runs, (0.2, 0.9, 0.5), strict=True):
            learned(run, accuracy)
        artifacts.of_sweep(OUT, swept(*runs))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        patch.setattr(socket, "gethostname", lambda: "lab")
        patch.setattr(socket, "getfqdn", lambda: "lab.example.org")
        tracking.ui(tracking.resolve_uri(None), OUT, "0.0.0.0", port, said.append, allowed_hosts=("runs.example.org",))
    assert said[1] == "from other machines: " + said[0].replace("127.0.0.1", "runs.example.org")
    [(command, environment)] = calls
    with browser.server(command, environment, f"http://127.0.0.1:{port}"):
        yield said[0].splitlines()[0], folder / OUT


@pytest.fixture(scope="module")
def opened():
    """A browser's page; pages of a server that runs already."""
    if browser.missing():
        pytest.skip(str(browser.missing()))
    with browser.page() as found:
        yield found


def of_server(link: str):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=link.split("/#/")[0])


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("lab.example.org", "http://lab.example.org", 200),
        ("lab", "http://lab", 200),
        ("runs.example.org", "https://runs.example.org", 200),
        ("127.0.0.1", "http://127.0.0.1", 200),
        ("evil.example.org", "http://evil.example.org", 403),
        ("lab.example.org", "http://evil.example.org", 403),
    ],
)
def test_the_page_answers_under_its_own_names_alone(served, host, origin, status):
    port = served[0].split("/")[2].split(":")[1]
    headers = {"Host": f"{host}:{port}", "Origin": f"{origin}:{port}", "Content-Type": "application/json"}
    body = json.dumps({"experiment_ids": ["1"], "max_results": 1})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)) as connection:
        connection.request("POST", "/ajax-api/2.0/mlflow/runs/search", body, headers)
        with connection.getresponse() as answer:
            assert answer.status == status


def test_a_remote_server_is_told_all_that_a_local_store_is(served):
    link, _ = served
    run = tiny(task__name="noisy_recall", task__vocab_size=30)
    learned(run, 0.75)
    artifacts.of_sweep(OUT, swept(run))
    address = link.split("/#/")[0]
    assert tracking.sync(address, OUT, log_models=True).problem is None
    client = of_server(link)
    experiment = client.get_experiment_by_name("noisy_recall").experiment_id
    cell, parent = client.search_runs([experiment], order_by=["tags.`mad.role`"])
    assert cell.data.metrics["test/token_accuracy"] == 0.75
    assert cell.info.status == parent.info.status == "FINISHED"
    for found, names in ((cell, ["spectrum.json", "spectrum.png"]), (parent, ["leaderboard.png"])):
        listed = client.list_artifacts(found.info.run_id, "figures")
        assert [a.path for a in listed] == [f"figures/{name}" for name in names]
    [logged] = client.search_logged_models([experiment])
    assert logged.status == "READY"
    assert logged.source_run_id == cell.info.run_id


@pytest.mark.browser
def test_the_page_shows_cells_best_first_and_their_curves(served, opened):
    link, _ = served
    browser.look(opened, link, "test/token_accuracy")
    opened.get_by_text("3 matching runs").wait_for()
    names = opened.get_by_role("link", name="baseline seed").all_inner_texts()
    assert names == [f"efla(heads=2) baseline seed {seed}" for seed in (1, 2, 0)]
    opened.get_by_placeholder("Search metric charts").fill("spectrum/horizon_p50|train/loss")
    opened.get_by_text("spectrum/horizon_p50", exact=True).first.wait_for()
    opened.locator(".scatterlayer .js-line").nth(5).wait_for()  # three runs in two charts
    assert opened.locator(".scatterlayer .js-line").count() == 6


@pytest.mark.browser
def test_runs_compare_in_parallel_coordinates(served, opened):
    link, _ = served
    runs = of_server(link).search_runs(["1"], "tags.`mad.role` = 'cell'")
    which = f"runs={json.dumps([r.info.run_id for r in runs])}&experiments={json.dumps(['1'])}"
    base = link.split("/#/")[0]
    browser.look(opened, f"{base}/#/compare-runs?{which}", "Parallel Coordinates Plot")
    opened.locator(".parcoords").first.wait_for()
    titles = opened.locator(".parcoords .axis-title")
    titles.first.wait_for()
    assert {"seed", tracking.PRIMARY} <= set(titles.evaluate_all("e => e.map(t => t.textContent)"))


@pytest.mark.browser
@pytest.mark.parametrize(("role", "name"), [("cell", "spectrum.png"), ("sweep", "leaderboard.png")])
def test_artifacts_show_the_figures(served, opened, role, name):
    link, _ = served
    found = of_server(link).search_runs(
        ["1"], f"tags.`mad.role` = '{role}'", order_by=["metrics.`test/token_accuracy` DESC"]
    )
    where = f"experiments/1/runs/{found[0].info.run_id}/artifacts/figures/{name}"
    opened.goto("about:blank")  # and with it the images of the page before
    browser.look(opened, f"{link.split('/#/')[0]}/#/{where}", name)
    opened.wait_for_function("[...document.images].some(i => i.naturalWidth > 300)")
