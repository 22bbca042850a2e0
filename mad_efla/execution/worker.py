"""Worker processes: each makes one run at a time, as its driver says."""

import contextlib
import functools
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mad_efla.execution import processes
from mad_efla.execution.attempt import LimitMonitor, attempt
from mad_efla.plan.run import Limits, RunConfig
from mad_efla.runs.folder import RunFolder


class Worker:
    """A worker process, seen from the driver.

    Args:
        out: The folder of run folders.
        device: `cpu` or `cuda`.
        about: Of the surroundings, for results.
        limits: Of every run.

    Attributes:
        pipe: Runs go out; `began` and `ended` or `elsewhere` come back, or what a full disk says.
        process: The worker's process.
        run: What it makes; None while it is idle.
        monitor: How long and how large its run has grown, from when it began.
        kill_reason: Why it was killed by us.
        pruned: Whether its run was told to end.
    """

    def __init__(self, out: Path, device: str, about: dict[str, str], limits: Limits):
        self._limits = limits
        self.run: RunConfig | None = None
        self.monitor: LimitMonitor | None = None
        self.kill_reason, self.pruned = "", False
        self.pipe, theirs = processes.context.Pipe()
        self.process = processes.start(_serve, theirs, out, device, about, limits, device=device)
        theirs.close()

    def hand(self, run: RunConfig) -> None:
        """Give it a run; if it is dead by now, its end will be seen."""
        self.run, self.monitor, self.pruned = run, None, False
        with contextlib.suppress(OSError):
            self.pipe.send(("run", run.fingerprint))

    def prune(self, reason: str) -> None:
        """Tell its run to end after the step it is at."""
        self.pruned = True
        with contextlib.suppress(OSError):
            self.pipe.send(("prune", reason))

    def poll_messages(self) -> list[Any]:
        """Return what it has said of the ends of runs, and measure those that began."""
        said = []
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                said.append(self.pipe.recv())
        if "began" in said:
            self.monitor = LimitMonitor(self._limits, self.process.pid)
        return [word for word in said if word != "began"]


def _serve(
    environment: dict[str, str], pipe: Connection, out: Path, device: str, about: dict[str, str], limits: Limits
) -> None:
    """Make runs until the driver has no more, says stop, or is dead."""
    asked: list[int] = []
    pruned: list[str] = []
    processes.begin(environment, lambda number, frame: asked.append(number))
    torch.set_num_threads(1)

    def prune_reason() -> str:
        try:
            while not pruned and pipe.poll():
                pruned.append(pipe.recv()[1])
        except (EOFError, OSError):
            asked.append(0)  # the driver is dead, or has given us up
        return pruned[0] if pruned else ""

    with contextlib.suppress(EOFError, OSError):  # the pipe is closed
        while not asked:
            word, text = pipe.recv()
            if word == "prune":  # it had ended before it heard of it
                continue
            pruned.clear()
            folder = RunFolder(out, text)
            try:
                with (folder.path / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
                    began = functools.partial(pipe.send, "began")
                    made = attempt(folder, device, about, lambda: bool(asked), limits, prune_reason, began, wait=False)
                pipe.send("ended" if made else "elsewhere")
            except OSError as error:  # not even the failure could be written
                pipe.send(error)
    processes.end()
