"""One owner at a time, across processes and machines, and whoever slept too long writes nothing."""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

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


def _grants(file, operation):
    """Lock nothing and say that it is done, as some file systems do."""


def _refuses(file, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


LOCKS = pytest.mark.parametrize("flock", [_grants, _refuses])

SWEEP = """
import fcntl, pathlib, socket, sys
from mad_efla.execution import attempt, pool
from mad_efla.runs import claims
from tests.runs import test_claims
from tests.tiny import tiny
fcntl.flock = getattr(test_claims, sys.argv[1])
socket.gethostname = lambda: "node"
train, take = attempt.train, claims.take
def told(*arguments, **options):
    print("made", flush=True)
    sys.stdin.readline()
    return train(*arguments, **options)
def refused(folder):
    claim = take(folder)
    print("claimed" if claim else "refused", flush=True)
    return claim
attempt.train, claims.take = told, refused
pool.execute([tiny()], pathlib.Path("runs"), device="cpu", workers=0)
"""


@LOCKS
def test_without_locks_a_run_is_made_once_by_two_machines_of_one_name(tmp_path, monkeypatch, flock):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]))
    monkeypatch.setenv("MAD_KERNELS_BACKEND", "reference")  # nothing to be compiled
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first, second = (subprocess.Popen([sys.executable, "-c", SWEEP, flock.__name__], **pipes) for _ in range(2))
    said = first.stdout.readline(), second.stdout.readline()
    assert sorted(said) == ["claimed\n", "refused\n"]
    maker, other = (first, second) if said[0] == "claimed\n" else (second, first)
    assert maker.stdout.readline() == "made\n"
    assert other.stdout.readline() == "refused\n"  # while the first is at it
    assert maker.communicate("go on\n", timeout=600)[0].split() == []
    assert "made" not in other.communicate(timeout=600)[0].split()
    assert (maker.returncode, other.returncode) == (0, 0)
    folder = RunFolder(tmp_path / "runs", tiny().fingerprint)
    assert folder.status() == "finished"
    steps = [row.step for row in folder.rows()[0] if "train/loss" in row.metrics]
    assert steps == [10, 20, 30]


@LOCKS
def test_without_locks_a_claim_excludes_others_and_a_dead_owner_is_followed_at_once(
    tmp_path, monkeypatch, holder, flock
):
    monkeypatch.setattr("fcntl.flock", flock)
    assert claims.is_held(tmp_path)
    assert claims.take(tmp_path) is None
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which nobody has asked for yet
    assert not claims.is_held(tmp_path)
    first = claims.take(tmp_path)
    assert first.path.name == "claim.2"
    assert claims.take(tmp_path) is None
    first.release()
    assert not claims.is_held(tmp_path)


def test_a_machine_of_equal_name_is_another_machine(tmp_path):
    with subprocess.Popen(["true"]) as process:
        pass
    (tmp_path / "claim.1").write_text(f"{socket.gethostname()} process {process.pid}\nanother boot 1\n")
    assert claims.is_held(tmp_path)  # its process would be gone here
    assert claims.take(tmp_path) is None


def test_a_number_that_another_process_has_by_now_is_not_the_owner(tmp_path):
    first = claims.take(tmp_path)
    host, machine = first.path.read_text().splitlines()
    first.release()
    started = machine.split()[-1]
    (tmp_path / "claim.2").write_text(f"{host}\n{machine.removesuffix(started)}{int(started) - 1}\n")
    assert not claims.is_held(tmp_path)


@pytest.mark.parametrize("refused", ["link", "fsync"])
def test_claims_need_neither_hard_links_nor_synced_folders(tmp_path, monkeypatch, refused):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(f"os.{refused}", refuse)
    claim = claims.take(tmp_path)
    assert claims.take(tmp_path) is None
    claim.release()
    assert [p.name for p in tmp_path.iterdir()] == ["claim.1"]


def test_a_failure_is_written_by_whoever_holds_the_run_and_by_nobody_else(tmp_path):
    run = tiny()
    folder, other = (RunFolder(tmp_path, run.fingerprint) for _ in range(2))
    folder.create(run)
    with folder.lock() as free:
        assert free
        assert not other.fail("failed", "its node is gone", "")
        assert folder.failure() is None
        assert folder.fail("failed", "mine", "")
    assert folder.failure().reason == "mine"
    assert other.fail("failed", "its node is gone", "")  # under a claim of its own
    assert folder.failure().reason == "its node is gone"
    assert not claims.is_held(folder.path)
    (tmp_path / run.fingerprint / "claim.3").write_text("another-machine process 1")
    assert not other.fail("failed", "by a clock of its own", "")
    assert folder.failure().reason == "its node is gone"
