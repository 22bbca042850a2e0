"""How long a training step takes, mixer beside mixer, in one process.

Only the ratios mean something on a CPU: the steps of all mixers are interleaved, so that whatever
else the machine does falls on all of them, and the median of each is shown.
"""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from mad_efla.run import RunConfig
from mad_efla.store import RunFolder
from mad_efla.train import Loop


class StepTime(NamedTuple):
    """The time of one training step.

    Attributes:
        run: What was trained.
        seconds: Median over the rounds.
        spread: Interquartile range over the median.
    """

    run: RunConfig
    seconds: float
    spread: float


def steps(runs: list[RunConfig], device: str, rounds: int) -> list[StepTime]:
    """Time training steps of several runs, interleaved, on one thread.

    Args:
        runs: What to train; nothing of it is kept.
        device: `cpu` or `cuda`.
        rounds: Timed steps of each.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as scratch:
            loops = [_loop(run, Path(scratch), device) for run in runs]
            for loop in loops * 3:
                loop.train_step()
            times = [[_time(loop, device) for loop in loops] for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    found = []
    for run, column in zip(runs, zip(*times, strict=True), strict=True):
        low, middle, high = statistics.quantiles(column, n=4)
        found.append(StepTime(run, middle, (high - low) / middle))
    return found


def _loop(run: RunConfig, scratch: Path, device: str) -> Loop:
    folder = RunFolder(scratch, run.fingerprint)
    folder.create(run)
    return Loop(run, folder, torch.device(device))


def _time(loop: Loop, device: str) -> float:
    start = time.perf_counter()
    loop.train_step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
