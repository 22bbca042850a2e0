"""Worker processes: what is killed, fails or is stopped costs itself and nothing else."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mad_efla.execution import pool
from mad_efla.execution.costs import Costs
from mad_efla.execution.queue import RunQueue
from mad_efla.plan.run import Limits
from mad_efla.runs.folder import RunFolder
from tests.runs.test_folder import result
from tests.tiny import tiny

BROKEN = """
import glob, multiprocessing, os, time
import torch
from mad_efla.mixers.efla import EFLA

class Broken(EFLA):
    class Config(EFLA.Config):
        name: str
    def forward(self, x):
        self.break_down()
        return super().forward(x)

class Raises(Broken):
    def break_down(self):
        raise ZeroDivisionError("no such luck")

class Kills(Broken):
    def break_down(self):
        os.kill(os.getpid(), 9)

class KillsOnce(Broken):
    def break_down(self):
        if not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), 9)

class Crashes(Broken):
    def break_down(self):
        os.kill(os.getpid(), 11)

class Hangs(Broken):
    def break_down(self):
        time.sleep(600)

class Eats(Broken):
    def break_down(self):
        held = [torch.ones(2**26) for _ in range(8)]
        time.sleep(600)

class StartsProcesses(Broken):
    def break_down(self):
        if not os.path.exists(f"started-{os.getpid()}"):
            open(f"started-{os.getpid()}", "w").close()
            with multiprocessing.get_context("fork").Pool(2) as pool:  # its end is a SIGTERM to each
                assert pool.map(abs, [-1, 2]) == [1, 2]

class LeavesProcesses(Broken):
    def break_down(self):
        if not os.path.exists("left"):
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
            child.start()
            with open("left", "w") as file:
                file.write(str(child.pid))

class CutsData(Broken):
    def break_down(self):
        if not os.path.exists("cut"):
            open("cut", "w").close()
            for path in glob.glob("runs/data/*/*.npy"):
                os.truncate(path, 0)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a module of the user's own, importable here and in workers."""
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    yield
    sys.modules.pop("broken", None)


def run_all(runs, tmp_path, workers=2, **options):
    seen = []
    pool.execute(
        runs,
        tmp_path / "runs",
        device="cpu",
        workers=workers,
        watch=lambda events: seen.extend((e.run.fingerprint, e.status) for e in events),
        **options,
    )
    return seen


def test_workers_and_this_process_give_equal_bits(tmp_path):
    runs = [tiny(seed=s) for s in range(3)]
    seen = run_all(runs, tmp_path)
    assert sum(s == "finished" for _, s in seen) == 3
    pool.execute(runs, tmp_path / "here", device="cpu", workers=0)
    for run in runs:
        there, here = (RunFolder(tmp_path / name, run.fingerprint).load_model() for name in ("runs", "here"))
        assert all(torch.equal(there[k], here[k]) for k in here)


def broken(name, **fields):
    return tiny(mixers=[{"name": f"broken:{name}", "heads": 2}], **fields)


def test_what_goes_wrong_in_a_run_fails_alone_with_its_reason(tmp_path, plugin):
    names = ("Raises", "Kills", "KillsOnce", "Crashes", "Eats", "CutsData")
    runs = {name: broken(name, seed=i) for i, name in enumerate(names)} | {"good": tiny(seed=9)}
    run_all(list(runs.values()), tmp_path, limits=Limits(memory_gib=1.5))
    folders = {n: RunFolder(tmp_path / "runs", run.fingerprint) for n, run in runs.items()}
    for name in ("good", "KillsOnce", "CutsData"):
        assert folders.pop(name).status() == "finished", name
    failures = {name: folder.failure() for name, folder in folders.items()}
    assert {name: f.reason for name, f in failures.items()} == {
        "Raises": "ZeroDivisionError: no such luck",
        "Kills": "its worker died 2 times, the last time by signal 9 (Killed; out of memory?)",
        "Crashes": "its worker died 2 times, the last time by signal 11 (Segmentation fault)",
        "Eats": "memory limit of 1.5 GiB reached",
    }
    assert "broken.py" in failures["Raises"].traceback
    assert [name for name, f in failures.items() if f.transient] == ["Kills", "Crashes"]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_run_may_start_processes_at_any_number_of_workers_and_they_end_with_its_worker(tmp_path, plugin):
    runs = [broken("StartsProcesses"), broken("LeavesProcesses")]
    run_all(runs, tmp_path, workers=1)
    there = [RunFolder(tmp_path / "runs", run.fingerprint) for run in runs]
    assert [folder.status() for folder in there] == ["finished"] * 2
    _wait(lambda: not Path(f"/proc/{Path('left').read_text()}").exists())
    pool.execute(runs[:1], tmp_path / "here", device="cpu", workers=0)
    here = RunFolder(tmp_path / "here", runs[0].fingerprint).load_model()
    assert all(torch.equal(here[key], weights) for key, weights in there[0].load_model().items())


def test_a_run_that_hangs_is_ended_at_its_limit(tmp_path, plugin, monkeypatch):
    monkeypatch.setattr(pool, "_GRACE_SECONDS", 0.5)
    run = broken("Hangs")
    run_all([run], tmp_path, limits=Limits(minutes=1e-3))
    failure = RunFolder(tmp_path / "runs", run.fingerprint).failure()
    assert (failure.reason, failure.transient) == ("time limit of 0.001 min reached", False)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(minutes=1e-9), "time limit of 1e-09 min reached"),
        (Limits(memory_gib=1e-9), "memory limit of 1e-09 GiB reached"),
    ],
)
def test_a_run_that_notices_its_limit_keeps_its_checkpoint(tmp_path, limits, reason):
    run = tiny()
    run_all([run], tmp_path, workers=0, limits=limits)
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    assert (folder.failure().kind, folder.failure().reason) == ("failed", reason)
    assert not folder.failure().transient
    assert folder.load_checkpoint()["step"] == 1
    run_all([run], tmp_path, workers=0)
    assert folder.status() == "finished"


def test_the_longest_that_is_left_goes_first_and_ends_teach_what_is_long(tmp_path):
    runs = [tiny(seed=s, train__steps=n) for s, n in enumerate((5, 20, 10))]
    costs = Costs(runs)
    seen = run_all(runs, tmp_path, workers=0, costs=costs)
    assert [f for f, s in seen if s == "running"] == [runs[i].fingerprint for i in (1, 2, 0)]
    assert not (tmp_path / "runs" / "data").exists()
    work = RunQueue([tiny(seed=8, train__steps=n) for n in (5, 20)], tmp_path, Costs([]))
    slow, quick = work.waiting.values()
    work.costs = Costs([slow, quick])
    work.costs.observe_result(slow.fingerprint, result(slow.fingerprint, seconds=100.0, steps=5))
    work.costs.observe_result(quick.fingerprint, result(quick.fingerprint, seconds=1.0, steps=20))
    assert work.next() is slow


class _Prunes(RunQueue):
    def prune_reason(self, run):
        logged = run.steps > 1000 and RunFolder(self.out, run.fingerprint).rows()[0]
        return "pruned at step 10" if logged else ""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_verdict_ends_a_run_with_its_checkpoint_and_the_worker_goes_on(tmp_path, workers):
    long, short = tiny(train__steps=100_000), tiny()
    work = _Prunes([long, short], tmp_path, Costs([long, short]))
    seen = []
    pool.perform(work, device="cpu", workers=workers, watch=seen.extend)
    ends = {e.run.steps: e.status for e in seen if e.status != "running"}
    assert ends == {100_000: "pruned", 30: "finished"}
    folder = RunFolder(tmp_path, long.fingerprint)
    assert folder.failure().reason == "pruned at step 10"
    assert folder.load_checkpoint()["step"] >= 10


def test_a_run_held_by_another_process_is_waited_for(tmp_path):
    run = tiny()
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    folder.create(run)
    done = threading.Event()

    def sweep():
        pool.execute([run], tmp_path / "runs", device="cpu", workers=0)
        done.set()

    with folder.lock() as free:
        assert free
        thread = threading.Thread(target=sweep)
        thread.start()
        assert not done.wait(1.0)
    assert done.wait(60)
    thread.join()
    assert folder.status() == "finished"


DRIVER = """
import pathlib, sys
from mad_efla.execution import pool
from tests.tiny import tiny
if __name__ == "__main__":
    runs = [tiny(seed=s, train__steps=100_000) for s in range(2)]
    try:
        pool.execute(runs, pathlib.Path("runs"), device="cpu", workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_the_driver_stops_the_workers_and_loses_nothing(tmp_path, number):
    (tmp_path / "driver.py").write_text(DRIVER)
    root = str(Path(__file__).parents[2])
    driver = subprocess.Popen([sys.executable, "driver.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": root})
    folders = [RunFolder(tmp_path / "runs", tiny(seed=s, train__steps=100_000).fingerprint) for s in range(2)]
    _wait(lambda: all(f.rows()[0] for f in folders))
    driver.send_signal(number)
    code = driver.wait(30)
    assert code == (-9 if number == signal.SIGKILL else 130)
    _wait(lambda: all(f.status() == "interrupted" for f in folders))
    for folder in folders:
        step = folder.load_checkpoint()["step"]
        assert step >= folder.rows()[0][-1].step > 0
        assert "stopped after step" in folder.failure().reason


def test_ctrl_c_again_does_not_wait_for_a_step_that_hangs(tmp_path, plugin):
    (tmp_path / "driver.py").write_text(
        DRIVER.replace(
            "tiny(seed=s, train__steps=100_000) for s in range(2)",
            "tiny(mixers=[{'name': 'broken:Hangs', 'heads': 2}])",
        ).replace("workers=2", "workers=1")
    )
    root = str(Path(__file__).parents[2])
    path = f"{tmp_path}{os.pathsep}{root}"
    driver = subprocess.Popen([sys.executable, "driver.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    folder = RunFolder(tmp_path / "runs", broken("Hangs").fingerprint)
    _wait(lambda: folder.status() == "running")
    driver.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        driver.wait(3)
    assert folder.status() == "running"
    driver.send_signal(signal.SIGINT)
    assert driver.wait(20) == 130
    assert folder.status() == "waiting"  # it has logged nothing


def _wait(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_another_sweep_makes_is_left_until_the_others_are_done(tmp_path):
    long, short = tiny(train__steps=60), tiny(train__steps=5)
    folders = [RunFolder(tmp_path, r.fingerprint) for r in (long, short)]
    folders[0].create(long)
    with contextlib.ExitStack() as elsewhere:
        assert elsewhere.enter_context(folders[0].lock())

        def watch(events):
            if folders[1].result() is not None:
                elsewhere.close()

        pool.execute([long, short], tmp_path, device="cpu", workers=1, watch=watch)
    assert all(folder.result().status == "finished" for folder in folders)
