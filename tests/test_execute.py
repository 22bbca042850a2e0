"""Worker processes: what is killed, fails or is stopped costs itself and nothing else."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from mad_efla import execute
from mad_efla.config import ConfigError
from mad_efla.store import RunFolder
from tests.tiny import tiny

BROKEN = """
import os
from mad_efla.mixers.efla import EFLA

class Raises(EFLA):
    class Config(EFLA.Config):
        name: str
    def forward(self, x):
        raise ZeroDivisionError("no such luck")

class Kills(EFLA):
    class Config(EFLA.Config):
        name: str
    def forward(self, x):
        os.kill(os.getpid(), 9)

class KillsOnce(EFLA):
    class Config(EFLA.Config):
        name: str
    def forward(self, x):
        if not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), 9)
        return super().forward(x)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a module of the user's own, importable here and in workers."""
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield
    sys.modules.pop("broken", None)


def run_all(runs, tmp_path, workers=2):
    seen = []
    execute.execute(
        runs, tmp_path / "runs", device="cpu", workers=workers,
        watch=lambda events: seen.extend((e.run.fingerprint, e.status) for e in events),
    )  # fmt: skip
    return seen


def status(run, tmp_path):
    return RunFolder(tmp_path / "runs", run.fingerprint).status()


def test_workers_and_this_process_give_equal_bits(tmp_path):
    runs = [tiny(seed=s) for s in range(3)]
    seen = run_all(runs, tmp_path)
    assert sum(s == "finished" for _, s in seen) == 3
    execute.execute(runs, tmp_path / "here", device="cpu", workers=0)
    for run in runs:
        there, here = (
            RunFolder(tmp_path / name, run.fingerprint).load_model() for name in ("runs", "here")
        )
        assert all(torch.equal(there[k], here[k]) for k in here)


def test_a_failing_run_fails_alone_with_its_reason(tmp_path, plugin):
    bad, good = tiny(mixers=[{"name": "broken:Raises", "heads": 2}]), tiny()
    run_all([bad, good], tmp_path)
    assert status(good, tmp_path) == "finished"
    failure = RunFolder(tmp_path / "runs", bad.fingerprint).failure()
    assert failure.reason == "ZeroDivisionError: no such luck"
    assert "broken.py" in failure.traceback


def test_a_killed_worker_costs_one_attempt(tmp_path, plugin):
    once = tiny(mixers=[{"name": "broken:KillsOnce", "heads": 2}])
    always = tiny(mixers=[{"name": "broken:Kills", "heads": 2}])
    good = tiny()
    run_all([always, once, good], tmp_path)
    assert status(good, tmp_path) == status(once, tmp_path) == "finished"
    failure = RunFolder(tmp_path / "runs", always.fingerprint).failure()
    assert "its worker died 2 times" in failure.reason


def test_a_run_held_by_another_process_is_waited_for(tmp_path):
    run = tiny()
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    folder.create(run)
    done = threading.Event()

    def sweep():
        execute.execute([run], tmp_path / "runs", device="cpu", workers=0)
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
from mad_efla import execute
from tests.tiny import tiny
if __name__ == "__main__":
    runs = [tiny(seed=s, train__steps=100_000) for s in range(2)]
    try:
        execute.execute(runs, pathlib.Path("runs"), device="cpu", workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_the_driver_stops_the_workers_and_loses_nothing(tmp_path, number):
    (tmp_path / "driver.py").write_text(DRIVER)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    driver = subprocess.Popen(
        [sys.executable, "driver.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}
    )
    folders = [
        RunFolder(tmp_path / "runs", tiny(seed=s, train__steps=100_000).fingerprint)
        for s in range(2)
    ]
    _wait(lambda: all(f.rows()[0] for f in folders))
    driver.send_signal(number)
    code = driver.wait(30)
    assert code == (-9 if number == signal.SIGKILL else 130)
    _wait(lambda: all(f.status() == "interrupted" for f in folders))
    for folder in folders:
        step = folder.load_checkpoint()["step"]
        assert step >= folder.rows()[0][-1].step > 0
        assert "stopped after step" in folder.failure().reason


def _wait(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_cuda_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device; use --device cpu"):
        execute.resolve_device("cuda")
    assert execute.resolve_device("auto") == "cpu"


def test_auto_precision_is_bfloat16_only_where_the_cpu_has_it(monkeypatch):
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(execute, "_cpu_has_bfloat16", lambda has=has: has)
        assert execute.resolve_precision("cpu") == expected


def test_the_environment_names_versions_and_commit():
    found = execute.environment("cpu")
    assert found["torch"] == torch.__version__
    assert found["git_commit"]
