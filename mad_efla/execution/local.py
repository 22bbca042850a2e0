"""Runs in worker processes of this machine, or in this process."""

import math

import torch

from mad_efla.config import ConfigError
from mad_efla.execution import machine, pool
from mad_efla.execution.attempt import NO_LIMITS
from mad_efla.execution.queue import RunQueue, Watch
from mad_efla.plan.run import Limits


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
                f"--workers {workers} --per-device {per_device}: both say how many run at once; give one of them"
            )
        if workers is None:
            cuda = self.device == "cuda"
            workers = (per_device or 1) * torch.cuda.device_count() if cuda else machine.cores()
        self.workers = workers

    @property
    def slots(self) -> int:
        """Runs that can be under way at once."""
        return max(self.workers, 1)

    def perform(
        self,
        work: RunQueue,
        *,
        watch: Watch = lambda events: None,
        deadline: float = math.inf,
        limits: Limits = NO_LIMITS,
    ) -> None:
        """See `Executor`; work may find its runs as it goes on."""
        pool.perform(work, device=self.device, workers=self.workers, watch=watch, deadline=deadline, limits=limits)
