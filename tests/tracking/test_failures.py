"""What goes wrong between the run folders and MLflow costs only itself, and is said with its cure."""

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import re
import shutil
import sqlite3
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mad_efla import tracking
from mad_efla.analysis.cells import cells
from mad_efla.config import ConfigError
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import of_record
from mad_efla.runs.schema import ProbeScore, Row
from mad_efla.runs.sweeps import read_sweeps
from mad_efla.tracking import bridge, entry, locks, records, uploads
from tests.cli.test_cli import SWEEP, call, folders
from tests.tiny import tiny
from tests.tracking.test_tracking import OUT, TRACE, begun, finished, learned, result, shown, swept


def alter(uri: str, statement: str) -> None:
    """Change a local store behind MLflow's back."""
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        database.execute(statement)
        database.commit()


def artifacts(client, run) -> list[str]:
    return [a.path for a in client.list_artifacts(run.info.run_id)]


# ------------------------------------------------------------------ partly filled


def test_a_disk_that_refuses_locks_is_no_hindrance(uri, client, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = tiny()
    finished(run)
    with tracking.Mirror(uri, OUT, swept(run)) as shadow:
        pass
    assert shadow.problem is None
    assert shown(client)[run.fingerprint].data.metrics["test/token_accuracy"] == 0.5
    assert shown(client, "sweep")["s1"].info.status == "FINISHED"


def test_a_mirror_that_cannot_even_begin_says_so(uri, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locks.claims, "take", refuse)
    with tracking.Mirror(uri, OUT, swept(tiny())) as shadow:
        pass
    assert "Input/output error" in str(shadow.problem)


@pytest.fixture
def blocked(uri, tmp_path):
    """A place for artifacts that cannot be written, even by root."""
    path = tmp_path / "mlartifacts"
    path.write_text("in the way")
    return path


def test_without_a_place_for_files_all_numbers_arrive_and_it_is_said_once(uri, client, blocked):
    good, other, bad = (tiny(seed=seed) for seed in range(3))
    for run in (good, other):
        figures = finished(run).figures
        figures.mkdir()
        (figures / "a.png").write_bytes(b"a")
    begun(bad, 10).fail("failed", "ValueError: why", TRACE)
    swept(good, other, bad)

    report = tracking.sync(uri, OUT, log_models=True)

    assert report.runs == 3
    assert str(report.problem).count("MLflow has the numbers but not all files") == 1
    assert f"{blocked}" in str(report.problem)
    assert "make it reachable" in str(report.problem)
    told, parent = shown(client), shown(client, "sweep")["s1"]
    assert [told[r.fingerprint].info.status for r in (good, other, bad)] == ["FINISHED", "FINISHED", "FAILED"]
    assert told[other.fingerprint].data.metrics["test/token_accuracy"] == 0.5
    assert told[other.fingerprint].data.params["seed"] == "1"
    assert len(client.get_metric_history(told[other.fingerprint].info.run_id, "train/loss")) == 3
    assert parent.info.status == "FAILED"
    assert "efla(heads=2)" in parent.data.tags["mlflow.note.content"]

    blocked.unlink()
    assert tracking.sync(uri, OUT).problem is None
    told = shown(client)
    assert artifacts(client, told[good.fingerprint]) == ["config.json", "figures"]
    assert artifacts(client, told[bad.fingerprint]) == ["config.json", "traceback.txt"]
    assert artifacts(client, shown(client, "sweep")["s1"]) == ["leaderboard.csv", "leaderboard.json"]


def test_a_model_that_could_not_be_stored_leaves_no_half_of_one(uri, client, blocked):
    run = tiny()
    learned(run)
    swept(run)
    experiment = tracking.sync(uri, OUT, log_models=True).experiments["recall"]
    assert not client.search_logged_models([experiment])
    blocked.unlink()
    assert tracking.sync(uri, OUT, log_models=True).problem is None
    assert len(client.search_logged_models([experiment])) == 1


def test_files_that_hang_are_not_waited_for(uri, client, monkeypatch):
    monkeypatch.setattr(uploads, "_SECONDS", 0.05)
    hang, asked = threading.Event(), []
    monkeypatch.setattr(entry.Entry, "write", lambda self, name, text: asked.append(name) or hang.wait())
    runs = [tiny(seed=seed) for seed in range(6)]
    for run in runs:
        finished(run)
    swept(*runs)
    report = tracking.sync(uri, OUT)
    hang.set()
    assert report.runs == len(shown(client)) == 6
    assert "no answer within" in str(report.problem)
    assert len(asked) <= 4  # then the place is taken for unreachable


def test_what_mlflow_refuses_costs_only_itself_and_is_noted_once(uri, client):
    runs = [tiny(seed=seed) for seed in range(3)]
    for run in runs:
        begun(run, 10)
    swept(*runs)
    tracking.sync(uri, OUT)
    alter(uri, "UPDATE params SET value = 'other' WHERE key = 'setting'")
    for run in runs:
        RunFolder(OUT, run.fingerprint).finish(result(run, 0.75))
    report = tracking.sync(uri, OUT)
    assert report.problem is None
    [note] = report.notes
    assert "and 2 more: param 'setting' is refused by MLflow" in note
    assert {r.data.metrics["test/token_accuracy"] for r in shown(client).values()} == {0.75}
    assert {r.info.status for r in shown(client).values()} == {"FINISHED"}


ODD = ["noise@0.1", "drop=[1]", "a//b", "../x", "/x", "x/", ".", "..", "", "_u40_", "x" * 300, "λ/Ü: -", "a\nb"]


@pytest.mark.parametrize("text", ODD)
def test_every_name_is_made_one_that_mlflow_takes(text):
    from mlflow.utils.validation import _validate_metric_name, _validate_tag_name

    _validate_metric_name(records.name(text))
    _validate_tag_name(records.name(text))
    assert len(records.name(text)) <= 250


@given(st.text(alphabet="_u40@=/.", max_size=6), st.text(alphabet="_u40@=/.", max_size=6))
@example("a@", "a_")
@example("a@", "a_u40_")
@example("a/", "a_u2f_")
def test_no_two_names_become_one_and_good_ones_stay(text, other):
    assert (records.name(text) == records.name(other)) == (text == other)
    assert records.name("optim.lr") == "optim.lr"
    assert records.name("test_under/dropped keys") == "test_under/dropped keys"


def test_metrics_of_any_name_arrive(uri, client):
    run = tiny()
    folder = begun(run, 10)
    folder.append([Row(20, 1_020, {name: 1.0 for name in ODD} | {"train/loss": 0.5})])
    probe = ProbeScore(name="noise@0.1", severity=0.1, accuracy=0.25, finite=1.0)
    folder.finish(result(run, probes=(probe,)))
    swept(run)
    report = tracking.sync(uri, OUT)
    assert (report.problem, report.notes) == (None, ())
    metrics = shown(client)[run.fingerprint].data.metrics
    assert metrics["test_under/noise_u40_0.1"] == 0.25
    assert {records.name(name) for name in ODD} < set(metrics)


def test_texts_that_are_too_long_are_cut_and_nothing_else_is(uri, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # as stores that refuse them
    good, bad = tiny(seed=0, setting="s" * 9_000), tiny(seed=1)
    finished(good, 0.75)
    begun(bad, 10).fail("failed", "ValueError: " + "x" * 9_000, TRACE)
    swept(good, bad, plan="p" * 300)
    report = tracking.sync(uri, OUT)
    assert (report.problem, report.notes) == (None, ())
    told = shown(client)
    assert told[good.fingerprint].data.params["setting"] == "s" * 5_998 + " …"
    assert len(told[good.fingerprint].info.run_name) <= 250
    assert told[good.fingerprint].info.run_name.endswith("… seed 0")
    assert told[bad.fingerprint].data.tags["mlflow.note.content"].startswith("Failed: ValueError: xxx")
    assert told[good.fingerprint].data.metrics["test/token_accuracy"] == 0.75


def test_a_note_that_is_too_long_says_how_many_rows_it_lacks():
    runs = [tiny(task__vocab_size=8 + 2 * i, setting=f"setting number {i} of many") for i in range(150)]
    for run in runs:
        finished(run)
    record = swept(*runs)
    note = records.sweep_note(record, Counter({"finished": 150}), cells(of_record(record, OUT)))
    assert len(note) <= records.TAG
    kept = note.count("| setting number")
    assert 0 < kept < 150
    assert f"{150 - kept} rows more in leaderboard.csv" in note
    assert note.endswith("`mad-efla sweep recall`")


def test_lines_that_are_no_metrics_cost_only_themselves(uri, client):
    good, bad = tiny(seed=0), tiny(seed=1)
    finished(good)
    (finished(bad, 0.75).path / "metrics.jsonl").write_text('{"step": 1, "time": 1, "metrics": 5}\n')
    swept(bad, good)
    report = tracking.sync(uri, OUT)
    assert report.problem is None
    assert "metrics.jsonl: has lines that are no metrics" in report.notes[0]
    assert shown(client)[bad.fingerprint].data.metrics["test/token_accuracy"] == 0.75
    assert shown(client)[good.fingerprint].info.status == "FINISHED"


def test_a_run_deleted_in_mlflow_while_it_is_followed_costs_nothing_else(uri, client):
    run, other = tiny(seed=0), tiny(seed=1)
    begun(run, 10)
    begun(other, 10)
    swept(run, other)
    followed = bridge.Bridge(uri, OUT)
    followed.sync(math.inf)
    client.delete_run(shown(client)[run.fingerprint].info.run_id)
    client.delete_run(shown(client, "sweep")["s1"].info.run_id)
    for one in (run, other):
        RunFolder(OUT, one.fingerprint).finish(result(one))
    assert followed.sync(math.inf).problem is None
    assert {f: r.info.status for f, r in shown(client).items()} == {other.fingerprint: "FINISHED"}


def test_an_experiment_deleted_in_mlflow_costs_no_other_one(uri, client):
    run, other = tiny(), tiny(task__name="noisy_recall", task__vocab_size=30)
    begun(run, 10)
    begun(other, 10)
    swept(run, id="s1")
    swept(other, id="s2")
    followed = bridge.Bridge(uri, OUT)
    client.delete_experiment(followed.sync(math.inf).experiments["recall"])
    for one in (run, other):
        RunFolder(OUT, one.fingerprint).finish(result(one))
    followed.sync(math.inf)
    for report in (followed.sync(math.inf), tracking.sync(uri, OUT)):
        assert "mlflow experiments restore" in str(report.problem)
    experiment = client.get_experiment_by_name("noisy_recall").experiment_id
    assert {r.info.status for r in client.search_runs([experiment])} == {"FINISHED"}


# ------------------------------------------------------------------ whose a run is


def test_the_same_run_of_two_people_is_two_runs(uri, client, monkeypatch):
    run = tiny()
    for person, accuracy in (("ann", 0.25), ("ben", 0.75)):
        with monkeypatch.context() as patch:
            Path(person).mkdir()
            patch.chdir(person)
            finished(run, accuracy)
            swept(run)
            assert tracking.sync(uri, OUT) == (1, None, (), {"recall": "1"})
    made = client.search_runs(["1"], "tags.`mad.role` = 'cell'")
    assert sorted(r.data.metrics["test/token_accuracy"] for r in made) == [0.25, 0.75]
    sweeps = client.search_runs(["1"], "tags.`mad.role` = 'sweep'")
    assert {r.data.tags["mlflow.parentRunId"] for r in made} == {r.info.run_id for r in sweeps}
    assert len({r.data.tags["mad.owner"] for r in [*made, *sweeps]}) == 2
    shutil.copytree("ben", "backup")
    with monkeypatch.context() as patch:
        patch.chdir("backup")
        tracking.sync(uri, OUT)  # a copy is the same person's
    assert len(client.search_runs(["1"])) == 4


def test_runs_of_earlier_versions_are_taken_over_by_the_folder_that_made_them(uri, client, monkeypatch):
    run = tiny()
    finished(run)
    swept(run)
    tracking.sync(uri, OUT)
    alter(uri, "DELETE FROM tags WHERE key IN ('mad.owner', 'mad.artifacts', 'mad.host')")
    with monkeypatch.context() as patch:
        Path("other").mkdir()
        patch.chdir("other")
        begun(run, 10).finish(result(run, 0.75, started=500_000, ended=600_000))
        (OUT / run.fingerprint / "metrics.jsonl").write_text("")
        swept(run, started=2)
        assert tracking.sync(uri, OUT).problem is None
    assert tracking.sync(uri, OUT).problem is None
    made = client.search_runs(["1"], "tags.`mad.role` = 'cell'")
    assert sorted(r.data.metrics["test/token_accuracy"] for r in made) == [0.5, 0.75]
    assert len({r.data.tags["mad.owner"] for r in made}) == 2
    assert len(client.search_runs(["1"], "tags.`mad.role` = 'sweep'")) == 2


def test_looking_for_runs_makes_no_folder_for_them(uri):
    assert tracking.sync(uri, OUT) == (0, None, (), {})
    assert not OUT.exists()


# ------------------------------------------------------------------ a failure that is over


def test_a_run_that_failed_and_then_finished_does_not_look_failed(uri, client):
    run = tiny()
    folder = begun(run, 10)
    folder.fail("failed", "ValueError: why", TRACE)
    swept(run)
    tracking.sync(uri, OUT)
    cell = shown(client)[run.fingerprint]
    assert cell.data.tags["mlflow.note.content"] == "Failed: ValueError: why"
    folder.finish(result(run))
    assert tracking.sync(uri, OUT).problem is None
    cell = shown(client)[run.fingerprint]
    assert "mlflow.note.content" not in cell.data.tags
    assert (cell.info.status, artifacts(client, cell)) == ("FINISHED", ["config.json"])


def test_a_failure_that_earlier_versions_left_is_taken_away(uri, client):
    run = tiny()
    finished(run)
    swept(run)
    tracking.sync(uri, OUT)
    where = shown(client)[run.fingerprint].info.run_id
    client.set_tag(where, "mlflow.note.content", "Failed: OSError: disk full")
    client.log_text(where, TRACE, "traceback.txt")
    assert tracking.sync(uri, OUT).problem is None
    cell = shown(client)[run.fingerprint]
    assert "mlflow.note.content" not in cell.data.tags
    assert artifacts(client, cell) == ["config.json"]
    client.set_tag(where, "mlflow.note.content", "my own note")
    tracking.sync(uri, OUT)
    assert shown(client)[run.fingerprint].data.tags["mlflow.note.content"] == "my own note"


def test_where_files_cannot_be_deleted_the_traceback_says_that_it_is_old(uri, client, monkeypatch, tmp_path):
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def refuse(self, name=None):
        raise NotImplementedError

    monkeypatch.setattr(LocalArtifactRepository, "delete_artifacts", refuse)
    run = tiny()
    folder = begun(run, 10)
    folder.fail("failed", "ValueError: why", TRACE)
    swept(run)
    tracking.sync(uri, OUT)
    folder.finish(result(run))
    assert tracking.sync(uri, OUT).problem is None
    cell = shown(client)[run.fingerprint]
    text = Path(client.download_artifacts(cell.info.run_id, "traceback.txt", str(tmp_path))).read_text()
    assert "of an earlier attempt" in text


def test_a_sweep_that_two_processes_make_is_shown_until_the_last_one_ends():
    first, second = locks.Live(OUT, ["s1"]), locks.Live(OUT, ["s1"])
    first.show()
    second.show()
    assert locks.is_live(OUT, "s1")
    first.end()
    second.show()  # as it does every few seconds
    assert locks.is_live(OUT, "s1")
    second.end()
    assert not locks.is_live(OUT, "s1")


# ------------------------------------------------------------------ folders that can only be read


_READ_ONLY: list[str] = []


def _guard(event: str, arguments: tuple) -> None:
    """Refuse what changes a folder, for root too."""
    if not _READ_ONLY or not arguments or isinstance(arguments[0], int):
        return
    if event not in ("open", "os.mkdir", "os.remove", "os.rename", "os.link", "os.utime"):
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if any(os.path.abspath(os.fsdecode(arguments[0])).startswith(path) for path in _READ_ONLY):
        raise OSError(errno.EROFS, "Read-only file system", os.fsdecode(arguments[0]))


@functools.cache
def _install() -> None:
    sys.addaudithook(_guard)  # which stays for good, and does nothing unless a folder is named


@pytest.fixture
def read_only():
    """Make folders such that they can only be read."""
    _install()
    yield lambda path: _READ_ONLY.append(str(path.absolute()))
    _READ_ONLY.clear()


def test_runs_that_can_only_be_read_are_mirrored(uri, client, read_only, tmp_path):
    good, stopped = tiny(seed=0), tiny(seed=1)
    finished(good)
    begun(stopped, 10)
    swept(good, stopped)
    (OUT / "sweeps" / "s1.live").mkdir()
    (OUT / "sweeps" / "s1.live" / "claim.1").write_text("elsewhere process 1")
    os.utime(OUT / "sweeps" / "s1.live" / "claim.1", (0, 0))  # released
    read_only(OUT)
    with pytest.raises(OSError, match="Read-only"):
        (OUT / "x").touch()
    for _ in range(2):
        assert tracking.sync(uri, OUT) == (2, None, (), {"recall": "1"})
    assert {r.info.status for r in shown(client).values()} == {"FINISHED", "KILLED"}
    assert shown(client, "sweep")["s1"].info.status == "KILLED"
    with locks.exclusive("http://server", OUT, math.inf):  # whose lock is in the folder of runs
        pass


# ------------------------------------------------------------------ stores on other machines


class _Server(HTTPServer):
    """Answers as it is told to, and notes what was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, tuple[int, object]] = {}
        self.default: tuple[int, object] = (404, "nothing here")
        self.asked: list[tuple[str, str]] = []

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def _answer(self):
        assert isinstance(self.server, _Server)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.asked.append((self.path, body))
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        status, answer = self.server.answers.get(name, self.server.default)
        raw = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = _Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


DENIED = [
    (401, "who are you", r"credentials \(401\): set MLFLOW_TRACKING_USERNAME"),
    (401, {"detail": "Not authenticated"}, r"credentials \(401\): set MLFLOW_TRACKING_USERNAME"),
    (403, "no", r"does not let this account write \(403\): ask for the right"),
    (403, {"error_code": "PERMISSION_DENIED", "message": "no"}, r"does not let this account write \(403\)"),
    (403, "Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts"),
    (404, "<html>nothing here</html>", r"is no MLflow \(404: nothing is at this address\): check host and path"),
    (200, "<html>log in</html>", "is no MLflow .* check --tracking-uri"),
]


@pytest.mark.parametrize(("status", "answer", "said"), DENIED)
def test_what_a_server_denies_is_said_before_training_with_the_cure(server, status, answer, said):
    server.default = (status, answer)
    with pytest.raises(ConfigError, match=said) as caught:
        tracking.check(server.uri, ["recall"])
    assert "--no-tracking" in str(caught.value)
    swept(tiny())
    report = tracking.sync(server.uri, OUT)
    assert said.split(" ")[0] in str(report.problem)
    assert "mad-efla sync" in str(report.problem)


@pytest.mark.parametrize(("status", "said"), [(500, r"error of its own \(500\)"), (503, r"\(503\)"), (429, r"\(429\)")])
def test_what_may_pass_is_said_and_training_goes_on(server, status, said):
    server.default = (status, "later")
    assert re.search(said, str(tracking.check(server.uri, ["recall"])))


def test_a_sweep_that_could_not_be_told_is_not_begun(server, files):
    server.default = (401, "who are you")
    done = call(*SWEEP[:-1], "--tracking-uri", server.uri, code=2)
    assert "MLFLOW_TRACKING_USERNAME" in done.stderr
    assert not (files / "runs").exists()
    server.default = (503, "later")
    done = call(*SWEEP[:-1], "--no-figures", "--tracking-uri", server.uri)
    assert "warning: MLflow at" in done.stderr
    assert all(f.status() == "finished" for f in folders(files))


def test_a_name_that_a_store_refuses_is_found_before_training_and_has_a_prefix(server, files):
    absent = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
    refused = {"error_code": "INVALID_PARAMETER_VALUE", "message": "Got an invalid experiment name 'recall'."}
    server.answers = {"get-by-name": (404, absent), "create": (400, refused)}
    done = call(*SWEEP[:-1], "--tracking-uri", server.uri, code=2)
    assert "refuses the experiment name 'recall'" in done.stderr
    assert "--experiment-prefix /Users/me@example.org/" in done.stderr
    assert not read_sweeps(files / "runs")
    server.answers["create"] = (200, {"experiment_id": "7"})
    server.default = (503, "later")
    call(*SWEEP[:-1], "--no-figures", "--tracking-uri", server.uri, "--experiment-prefix", "/Users/me/")
    made = [json.loads(body)["name"] for path, body in server.asked if path.endswith("/create")]
    assert made[-1] == "/Users/me/recall"


def test_a_prefix_names_experiments_of_a_local_store_too(uri, client, monkeypatch):
    monkeypatch.setenv("MAD_EFLA_EXPERIMENT_PREFIX", "lab/")
    run = tiny()
    finished(run)
    swept(run)
    assert tracking.sync(uri, OUT).problem is None
    experiment = client.get_experiment_by_name("lab/recall")
    assert len(client.search_runs([experiment.experiment_id])) == 2
