"""Where a sweep's runs run: this machine, a Ray cluster, a Slurm cluster.

An executor settles device and precision before the runs are named, and then makes them. The local
one is `local.py`; the others hand runs to a scheduler that somebody else wrote and follow the run
folders. A scheduler may start a run twice; its claim decides who makes it, so it is made once.
"""

from typing import Protocol

from mad_efla.config import ConfigError
from mad_efla.execution.local import Local
from mad_efla.execution.queue import RunQueue, Watch
from mad_efla.plan.run import Limits

NAMES = ("local", "ray", "slurm")


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

    def perform(self, work: RunQueue, *, watch: Watch = ..., deadline: float = ..., limits: Limits = ...) -> None:
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


def choose(name: str, *, device: str = "auto", workers: int | None = None, per_device: int | None = None) -> Executor:
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
        from mad_efla.execution.ray import Ray

        made: Executor = Ray(device, workers, per_device or 1)
    elif name == "slurm":
        from mad_efla.execution.slurm import Slurm

        made = Slurm(device, workers, per_device or 1)
    else:
        made = Local(device, workers, per_device)
    if per_device is not None and made.device != "cuda":
        raise ConfigError(
            f"--per-device {per_device}: says how many runs share a GPU, and the device is {made.device}; use --workers"
        )
    return made
