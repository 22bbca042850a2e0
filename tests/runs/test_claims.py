"""One owner at a time, across processes and machines, and whoever slept too long writes nothing."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mad_efla.execution import attempt, pool
from mad_efla.runs import claims
from mad_efla.runs.claims import Fenced
from mad_efla.runs.folder import RunFolder
from tests.tiny import tiny

HOLD = """
import pathlib, sys, time
from mad_efla.runs import claims
claim = claims.take(pathlib.Path("."))
print("held" if claim else "refused", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds this folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()


def test_a_claim_excludes_others_until_it_is_released(tmp_path):
    first = claims.take(tmp_path)
    assert claims.take(tmp_path) is None
    assert claims.is_held(tmp_path)
    first.check()
    first.release()
    assert not claims.is_held(tmp_path)
    second = claims.take(tmp_path)
    assert second.path.name == "claim.2"
    second.release()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["claim.1", "claim.2"]


def _race(folder, barrier, queue):
    barrier.wait()
    claim = claims.take(folder)
    queue.put(claim is not None)
    barrier.wait()  # hold it until all have tried


def test_of_many_processes_exactly_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    for round_ in range(20):
        folder = tmp_path / str(round_)
        folder.mkdir()
        barrier, queue = context.Barrier(8), context.Queue()
        processes = [context.Process(target=_race, args=(folder, barrier, queue)) for _ in range(8)]
        for process in processes:
            process.start()
        assert sum(queue.get(timeout=60) for _ in processes) == 1
        for process in processes:
            process.join()


def test_a_dead_owner_is_followed_at_once(tmp_path, holder):
    assert claims.take(tmp_path) is None
    holder.kill()
    holder.wait()
    claim = claims.take(tmp_path)
    assert claim.path.name == "claim.2"
    claim.release()


def test_a_sleeping_owner_keeps_its_claim_for_the_lease_and_is_then_fenced_off(tmp_path, monkeypatch):
    sleeper = claims.take(tmp_path)
    sleeper._ended.set()  # its heart stands still, as in a process that was stopped
    sleeper._beat.join()
    past = time.time() - claims.LEASE_SECONDS + 5
    os.utime(sleeper.path, (past, past))
    assert claims.take(tmp_path) is None
    past -= 10
    os.utime(sleeper.path, (past, past))
    assert not claims.is_held(tmp_path)
    follower = claims.take(tmp_path)
    assert follower is not None
    with pytest.raises(Fenced, match=r"claim\.1: taken over by .* process"):
        sleeper.check()
    follower.check()
    sleeper.release()
    assert claims.is_held(tmp_path)  # the old owner's end is not the new one's
    follower.release()


def test_an_owner_on_another_machine_is_believed_while_its_heart_beats(tmp_path):
    (tmp_path / "claim.1").write_text("another-machine process 1")  # no lock of it is seen here
    assert claims.is_held(tmp_path)
    assert claims.take(tmp_path) is None
    past = time.time() - claims.LEASE_SECONDS - 1
    os.utime(tmp_path / "claim.1", (past, past))
    claim = claims.take(tmp_path)
    assert claim.path.name == "claim.2"
    claim.release()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    claim = claims.take(tmp_path)
    os.utime(claim.path, (0, 0))
    deadline = time.monotonic() + 30
    while claim.path.stat().st_mtime < time.time() - 30:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    claim.release()


def test_a_run_taken_over_while_it_slept_writes_nothing_more(tmp_path, monkeypatch):
    run = tiny()
    folder = RunFolder(tmp_path, run.fingerprint)
    folder.create(run)
    taken = []

    def stop():
        if folder.rows()[0] and not taken:  # in the middle: somebody thinks this process is dead
            past = time.time() - 2 * claims.LEASE_SECONDS
            os.utime(folder.path / "claim.1", (past, past))
            taken.append(claims.take(folder.path))
            taken.append(sorted((p.name, p.stat().st_size) for p in folder.path.iterdir()))
        return False

    attempt.attempt(folder, "cpu", {}, stop)
    files = sorted((p.name, p.stat().st_size) for p in folder.path.iterdir())
    assert files == taken[1]
    assert folder.result() is None
    assert folder.failure() is None
    taken[0].release()
    pool.execute([run], tmp_path, device="cpu", workers=0)
    assert folder.status() == "finished"
    steps = [row.step for row in folder.rows()[0]]
    assert steps == sorted(steps)


def test_four_sweeps_at_once_make_each_run_once(tmp_path, monkeypatch):
    runs = [tiny(seed=s) for s in range(6)]
    made = []
    real = attempt.train
    monkeypatch.setattr(
        "mad_efla.execution.attempt.train", lambda run, *a, **k: (made.append(run.fingerprint), real(run, *a, **k))
    )
    threads = [
        threading.Thread(target=lambda order=order: pool.execute(order, tmp_path, device="cpu", workers=0))
        for order in (runs, runs[::-1], runs[3:] + runs[:3], runs[::2] + runs[1::2])
    ]
    monkeypatch.setattr(signal, "signal", lambda *a: None)  # only a main thread may
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted(r.fingerprint for r in runs)
    assert all(RunFolder(tmp_path, r.fingerprint).status() == "finished" for r in runs)


def test_whether_a_folder_is_held_is_asked_of_its_own_clock(tmp_path, monkeypatch):
    held = claims.take(tmp_path)
    monkeypatch.setattr("time.time", lambda: 4e9)  # this machine's clock is far ahead
    assert claims.is_held(tmp_path)
    held.release()
    assert not claims.is_held(tmp_path)
    assert not list(tmp_path.glob(".claim-*"))
