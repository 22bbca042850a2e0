"""How processes of ours start, and what becomes of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mad_efla.execution import processes
from mad_efla.runs.folder import RunFolder
from tests.execution.test_pool import DRIVER, _wait
from tests.stress import _workers
from tests.tiny import tiny

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def _tell(environment, pipe):
    """Be a process: say what is in the environment, and which signals are blocked."""
    processes.begin(environment, signal.SIG_DFL)
    pipe.send((os.environ.get("A_VARIABLE"), signal.pthread_sigmask(signal.SIG_BLOCK, ())))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("value", ["one", None, "two"])
def test_a_process_has_the_environment_of_its_parent(monkeypatch, value, device):
    if value:
        monkeypatch.setenv("A_VARIABLE", value)
    pipe, theirs = processes.context.Pipe()
    process = processes.start(_tell, theirs, device=device)
    assert pipe.recv() == (value, {signal.SIGINT})
    process.join()
    assert process.exitcode == 0


SHORT_NAMES = """
import os, pathlib, signal, tempfile
from mad_efla.config import ConfigError
from mad_efla.execution import processes
def said(environment, pipe):
    processes.begin(environment, signal.SIG_DFL)
    pipe.send(tempfile.gettempdir())
if __name__ == "__main__":
    pipe, theirs = processes.context.Pipe()
    processes._SHORT = {short}
    try:
        process = processes.start(said, theirs)
        print(pipe.recv(), tempfile.gettempdir())
        process.join()
    except ConfigError as error:
        print(error)
"""


@linux
def test_a_long_tmpdir_is_used_for_all_but_sockets_and_where_there_is_none_for_them_it_is_said(tmp_path, monkeypatch):
    long = tmp_path / ("y" * max(94 - len(str(tmp_path)), 1))
    long.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]))

    def said(short):
        Path("short_names.py").write_text(SHORT_NAMES.format(short=short))
        done = subprocess.run([sys.executable, "short_names.py"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert said(list(processes._SHORT)) == f"{long} {long}"
    assert "set TMPDIR to a shorter folder, or use --workers 0" in said([])


@pytest.fixture
def driver(tmp_path):
    """A sweep of two long runs, both under way, in a process group of its own."""
    (tmp_path / "driver.py").write_text(DRIVER.replace("100_000", "2_000"))
    root = str(Path(__file__).parents[2])
    driver = subprocess.Popen(
        [sys.executable, "driver.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}, start_new_session=True
    )
    driver.folders = [RunFolder(tmp_path / "runs", tiny(seed=s, train__steps=2_000).fingerprint) for s in range(2)]
    _wait(lambda: all(f.rows()[0] for f in driver.folders))
    yield driver
    driver.kill()
    driver.wait()


@linux
def test_a_killed_server_costs_no_run_and_leaves_no_process(driver):
    before = _workers(driver.pid)
    (server,) = {*_workers(driver.pid, and_server=True)} - {*before}
    os.kill(server, signal.SIGKILL)
    assert driver.wait(120) == 0
    assert [f.status() for f in driver.folders] == ["finished"] * 2
    for folder in driver.folders:  # every step is there once
        steps = [row.step for row in folder.rows()[0] if "train/loss" in row.metrics]
        assert steps == sorted(set(steps))
        assert steps[-1] == 2_000
    _wait(lambda: not any(map(_lives, before)))


@linux
def test_a_group_that_is_told_to_end_does_so_after_its_steps(driver):
    before = _workers(driver.pid, and_server=True)
    os.killpg(driver.pid, signal.SIGTERM)
    assert driver.wait(30) == 130
    for folder in driver.folders:
        assert folder.status() == "interrupted"
        assert "stopped after step" in folder.failure().reason
        assert folder.load_checkpoint()["step"] >= folder.rows()[0][-1].step
    assert len(before) == 3
    _wait(lambda: not any(map(_lives, before)))


def _lives(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
