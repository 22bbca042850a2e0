"""What a run folder promises: whole files or none, and nothing deleted in silence."""

import errno
import json
import os
import random
import re
import stat

import pytest
import torch

from mad_efla.config import ConfigError
from mad_efla.execution.attempt import attempt
from mad_efla.execution.queue import mark_interrupted
from mad_efla.runs import claims
from mad_efla.runs.files import ensure_writable, write_bytes
from mad_efla.runs.folder import RunFolder, quarantine_broken
from mad_efla.runs.schema import Result, Row, Scores, SweepRecord
from mad_efla.runs.sweeps import read_sweeps, write_sweep
from tests.tiny import tiny


@pytest.fixture
def folder(tmp_path):
    run = tiny()
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    folder.create(run)
    return folder


def result(fingerprint, accuracy=0.5, **fields):
    scores = Scores(loss=1.0, token_accuracy=accuracy, macro_accuracy=accuracy)
    values = {
        "fingerprint": fingerprint,
        "status": "finished",
        "test": scores,
        "validation": scores,
        "chosen_step": 10,
        "steps": 30,
        "stopped": None,
        "steps_to_90": None,
        "parameters": 100,
        "state_size": 10,
        "seconds": 1.0,
        "train_seconds": 0.5,
        "data_digest": "d",
        "environment": {"torch": "2"},
        "started": 1,
        "ended": 2,
    }
    return Result(**(values | fields))


def test_a_run_reads_back_from_its_folder(folder):
    assert folder.run() == tiny()


def test_a_configuration_that_is_another_run_is_refused(folder):
    path = folder.path / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ConfigError, match="describes run"):
        folder.run()
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        folder.run()


def test_status_follows_the_life_of_a_run(folder):
    assert RunFolder(folder.path.parent, "f" * 16).status() == "waiting"
    assert folder.status() == "waiting"
    folder.append([Row(1, 1, {"a": 1.0})])
    assert folder.status() == "interrupted"
    with folder.lock() as free:
        assert free
        assert RunFolder(folder.path.parent, folder.fingerprint).status() == "running"
    folder.fail("failed", "why", "trace")
    assert folder.status() == "failed"
    folder.finish(result(folder.fingerprint))
    assert folder.status() == "finished"
    assert folder.failure() is None


@pytest.mark.parametrize("broken", [b"", b"{", b'{"status": "finished"}', b"\0\xff"])
def test_a_broken_result_is_said_by_readers_and_set_aside_by_sweeps(folder, broken):
    path = folder.path / "result.json"
    path.write_bytes(broken)
    before = sorted(folder.path.iterdir())
    assert folder.result() is None and folder.status() == "waiting"
    assert folder.notes == [f"{path}: cannot be read; its sweep makes the run again"]
    assert sorted(folder.path.iterdir()) == before and path.read_bytes() == broken
    (note,) = quarantine_broken(folder.path.parent, [folder.fingerprint])
    assert "set aside as result.json.broken-1" in note
    assert (folder.path / "result.json.broken-1").read_bytes() == broken
    path.write_bytes(broken)
    quarantine_broken(folder.path.parent, [folder.fingerprint])
    assert (folder.path / "result.json.broken-2").exists()


def test_a_newer_versions_result_is_touched_by_nobody(folder):
    folder.finish(result(folder.fingerprint))
    path = folder.path / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"energy_joules": 3}))
    before = {p: p.read_bytes() for p in folder.path.iterdir()}
    assert folder.result() is None
    assert "written by a newer version" in folder.notes[0]
    with pytest.raises(ConfigError, match=r"newer version.*update mad-efla, or name another --out"):
        quarantine_broken(folder.path.parent, [folder.fingerprint])
    assert {p: p.read_bytes() for p in folder.path.iterdir()} == before
    assert attempt(folder, "cpu", {}, lambda: False)
    assert path.read_bytes() == before[path]
    assert folder.failure() is None


@pytest.mark.parametrize("broken", [None, b"", b"[]"])
def test_a_sweep_restores_a_configuration(folder, broken):
    run, path = folder.run(), folder.path / "config.json"
    path.unlink()
    if broken is not None:
        path.write_bytes(broken)
    folder.create(run)
    assert folder.run() == run


def test_what_another_holds_is_not_marked_interrupted(folder):
    run = folder.run()
    folder.append([Row(1, 5, {"a": 1.0})])
    other = RunFolder(folder.path.parent, folder.fingerprint)
    status = RunFolder.status
    with pytest.MonkeyPatch.context() as patch:

        def then_taken(found):
            answer = status(found)
            if other._claim is None:
                other._claim = claims.take(folder.path)
            return answer

        patch.setattr(RunFolder, "status", then_taken)
        mark_interrupted([run], folder.path.parent)
    assert folder.failure() is None
    other._claim.release()
    mark_interrupted([run], folder.path.parent)
    assert folder.failure().kind == "interrupted"


def test_a_result_of_another_run_does_not_count(folder):
    folder.finish(result("0" * 16))
    assert folder.result() is None


def test_rows_are_read_from_where_one_stopped_and_torn_lines_wait(folder):
    folder.append([Row(1, 5, {"a": 1.0}), Row(2, 6, {"a": 2.0})])
    rows, offset = folder.rows()
    assert [r.step for r in rows] == [1, 2]
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ti')
    assert folder.rows(offset) == ([], offset)


def test_a_checkpoint_comes_back_and_cuts_the_metrics_to_its_time(folder):
    folder.append([Row(1, 1, {"a": 1.0})])
    folder.save_checkpoint({"x": torch.arange(3)})
    folder.append([Row(2, 2, {"a": 2.0})])
    state = folder.load_checkpoint()
    assert torch.equal(state["x"], torch.arange(3))
    assert [r.step for r in folder.rows()[0]] == [1]


def test_without_a_checkpoint_the_metrics_start_anew(folder):
    folder.append([Row(1, 1, {"a": 1.0})])
    assert folder.load_checkpoint() is None
    assert folder.rows()[0] == []


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_used(folder, seed):
    folder.save_checkpoint({"step": 1})
    folder.save_checkpoint({"step": 2})
    path, rng = folder.path / "checkpoint.pt", random.Random(seed)
    raw = bytearray(path.read_bytes())
    if seed % 2:
        raw = raw[: rng.randrange(len(raw))]
    else:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    assert folder.load_checkpoint()["step"] == 1
    assert "is broken" in folder.notes[0]
    assert (folder.path / "checkpoint.pt.broken-1").exists()


def test_a_malicious_checkpoint_is_not_executed(folder, tmp_path):
    import hashlib
    import io
    import pickle

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "pwned"), "w")

    buffer = io.BytesIO()
    torch.save({"x": Evil()}, buffer)
    raw = buffer.getvalue()
    (folder.path / "checkpoint.pt").write_bytes(hashlib.sha256(raw).digest() + raw)
    with pytest.raises(pickle.UnpicklingError):
        folder.load_checkpoint()
    assert not (tmp_path / "pwned").exists()


def test_writing_replaces_a_file_whole(tmp_path):
    path = tmp_path / "f"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(
    ("number", "folders"), [(errno.EINVAL, False), (errno.EIO, True), (errno.EIO, False), (errno.ENOSPC, False)]
)
def test_a_file_system_that_cannot_sync_is_written_and_a_lost_file_is_an_error(folder, monkeypatch, number, folders):
    def refuse(file):
        if not folders or stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))

    folder.append([Row(1, 1, {"a": 1.0})])
    monkeypatch.setattr("os.fsync", refuse)
    if folders or number == errno.EINVAL:
        folder.save_checkpoint({"step": 1})
        assert folder.load_checkpoint()["step"] == 1
    else:
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            folder.save_checkpoint({"step": 1})


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        ensure_writable(tmp_path / "file" / "runs")


def test_sweeps_are_read_back_oldest_first(tmp_path):
    record = SweepRecord(
        id="b", task="recall", plan="quick", protocol="quick", command="c", fingerprints=("1",), started=2, ended=None
    )
    write_sweep(tmp_path, record)
    write_sweep(tmp_path, record.model_copy(update={"id": "a", "started": 1}))
    (tmp_path / "sweeps" / "broken.json").write_text("{")
    assert [r.id for r in read_sweeps(tmp_path)] == ["a", "b"]
