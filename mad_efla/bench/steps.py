"""Seconds of training steps, mixer beside mixer."""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from rich.table import Table

from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder
from mad_efla.training.loop import Loop


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


def step_times(times: list[StepTime]) -> Table:
    """Draw the times of training steps, with their ratio to the first of each setting."""
    table = Table("setting", "mixer")
    for heading in ("ms per step", "spread", "tokens per second", "ratio to the first"):
        table.add_column(heading, justify="right")
    first: dict[str, float] = {}
    for run, seconds, spread in times:
        reference = first.setdefault(run.setting, seconds)
        tokens = run.train.batch_size * run.task.input_length
        table.add_row(
            run.setting,
            run.mixer,
            f"{1e3 * seconds:.0f}",
            f"{100 * spread:.0f} %",
            f"{tokens / seconds:,.0f}",
            f"{seconds / reference:.2f}",
        )
    return table
