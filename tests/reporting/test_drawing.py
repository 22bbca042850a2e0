"""The process that draws."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from mad_efla.reporting import drawing
from mad_efla.runs.sweeps import read_sweeps, sweep_figures
from tests.cli.test_cli import SWEEP, call
from tests.execution.test_pool import _wait
from tests.stress import _workers


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_a_killed_process_is_told_and_the_next_one_draws(files):
    call(*SWEEP)
    records = read_sweeps(Path("runs"))
    page = sweep_figures(Path("runs"), records[0].id) / "leaderboard.png"
    told = []
    before = {*_workers(os.getpid())}
    thread = threading.Thread(target=lambda: told.extend(drawing.draw(Path("runs"), records)))
    thread.start()
    _wait(lambda: {*_workers(os.getpid())} - before)
    (process,) = {*_workers(os.getpid())} - before
    os.kill(process, signal.SIGKILL)
    thread.join()
    assert told == ["the process that draws ended with status -9"]
    assert not page.exists()
    assert not list(drawing.draw(Path("runs"), records))
    assert page.exists()
