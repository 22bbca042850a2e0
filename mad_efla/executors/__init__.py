"""Where a sweep's runs run: this machine, a Ray cluster, a Slurm cluster.

An executor settles device and precision before the runs are named, and then makes them. The local
one is `execute.py`; the others hand runs to a scheduler that somebody else wrote and follow the run
folders. A scheduler may start a run twice; its claim decides who makes it, so it is made once.
"""

import math
import os
import time
from collections.abc import Callable
from typing import Protocol

import torch

from mad_efla import execute, machine
from mad_efla.attempt import NO_LIMITS
from mad_efla.config import ConfigError
from mad_efla.execute import Event, OutOfTime, Watch, Work
from mad_efla.run import Limits, RunConfig
from mad_efla.store import RunFolder

NAMES = ("local", "ray", "slurm")
_POLL_SECONDS = 0.5


class Executor(Protocol):
    """What makes runs.

    Attributes:
        device: `cpu` or `cuda`.
        precision: What `train.precision: auto` means there.
        slots: Runs that can be under way at once.
    """

    device: str
    precision: str

    @property
    def slots(self) -> int: ...  # noqa: D102

    def perform(
        self, work: Work, *, watch: Watch = ..., deadline: float = ..., limits: Limits = ...
    ) -> None:
        """Make runs until there is no work left; results and failures are in the folders.

        Args:
            work: Which runs, and where.
            watch: Told what happens.
            deadline: When to stop, by `time.monotonic`.
            limits: How long and how large each run may grow before it is ended as failed.

        Raises:
            KeyboardInterrupt: Asked to stop; what was running is marked interrupted.
            OutOfTime: The deadline passed; likewise.
        """
        ...


def choose(
    name: str, *, device: str = "auto", workers: int | None = None, per_device: int | None = None
) -> Executor:
    """Make the executor that `--executor` names.

    Args:
        name: One of `NAMES`.
        device: `cpu`, `cuda`, or `auto` for what there is.
        workers: Runs at once; none for what there is room for.
        per_device: Runs that share a GPU; none for one.

    Raises:
        ConfigError: It cannot run here, or not so.
    """
    if name == "ray":
        from mad_efla.executors.ray import Ray

        made: Executor = Ray(device, workers, per_device or 1)
    elif name == "slurm":
        from mad_efla.executors.slurm import Slurm

        made = Slurm(device, workers, per_device or 1)
    else:
        made = Local(device, workers, per_device)
    if per_device is not None and made.device != "cuda":
        raise ConfigError(
            f"--per-device {per_device}: says how many runs share a GPU, and the device is "
            f"{made.device}; use --workers"
        )
    return made


class Local:
    """Worker processes of this machine, or this process.

    Args:
        device: As in `choose`.
        workers: Processes; 0 runs everything in this one.
        per_device: As in `choose`; in place of `workers`.
    """

    def __init__(self, device: str, workers: int | None, per_device: int | None):
        self.device = machine.resolve_device(device)
        self.precision = machine.resolve_precision(self.device)
        if workers is not None and per_device is not None:
            raise ConfigError(
                f"--workers {workers} --per-device {per_device}: both say how many run at once; "
                "give one of them"
            )
        if workers is None:
            cuda = self.device == "cuda"
            workers = (per_device or 1) * torch.cuda.device_count() if cuda else cores()
        self.workers = workers

    @property
    def slots(self) -> int:
        """Runs that can be under way at once."""
        return max(self.workers, 1)

    def perform(
        self,
        work: Work,
        *,
        watch: Watch = lambda events: None,
        deadline: float = math.inf,
        limits: Limits = NO_LIMITS,
    ) -> None:
        """See `Executor`; work may find its runs as it goes on."""
        execute.perform(
            work, device=self.device, workers=self.workers, watch=watch, deadline=deadline,
            limits=limits,
        )  # fmt: skip


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def follow(
    work: Work,
    runs: list[RunConfig],
    *,
    ended: Callable[[RunConfig], bool],
    slots: Callable[[], int],
    watch: Watch,
    deadline: float,
) -> None:
    """Watch runs that a scheduler makes, in the order they were handed to it, until all ended.

    Args:
        work: Whose runs they are.
        runs: In that order.
        ended: Asked again and again whether the scheduler is done with a run.
        slots: How many runs can be under way at once; twice as many are looked at.
        watch: Told what happens.
        deadline: When to stop, by `time.monotonic`.

    Raises:
        OutOfTime: The deadline passed.
    """
    waiting = {r.fingerprint: r for r in runs}
    while waiting:
        begun = time.monotonic()
        over = [run for run in waiting.values() if ended(run)]
        for run in over:
            del waiting[run.fingerprint]
        first = list(waiting.values())[: 2 * slots()]
        folders = [(run, RunFolder(work.out, run.fingerprint)) for run in first]
        running = [Event(r, "running", f) for r, f in folders if f.status() == "running"]
        watch([work.ended(run) for run in over] + running)
        if waiting:
            if time.monotonic() > deadline:
                raise OutOfTime
            looked = time.monotonic() - begun  # long where a slow server holds the folders
            time.sleep(max(_POLL_SECONDS, 4 * looked))
