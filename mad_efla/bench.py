"""How long things take: a training step, mixer beside mixer, and the generation of data.

Of steps only the ratios mean something on a CPU: those of all mixers are interleaved, in one
process, so that whatever else the machine does falls on all of them, and the median of each is
shown. Data is timed in processor seconds of one core.
"""

import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from rich.table import Table

from mad_efla import data
from mad_efla.run import RunConfig
from mad_efla.store import RunFolder
from mad_efla.sweep import Setting
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


class DataTime(NamedTuple):
    """The time of generating a setting's data.

    Attributes:
        setting: What was generated: all three splits.
        seconds: Processor time, least of the rounds.
        megabytes: Of all arrays.
        ceiling: Share of scored test positions that can be answered.
    """

    setting: Setting
    seconds: float
    megabytes: float
    ceiling: float


def data_times(settings: list[Setting], seed: int, rounds: int) -> Iterator[DataTime]:
    """Generate the data of settings, one after the other, and time it.

    Args:
        settings: What to generate; nothing of it is kept.
        seed: Of the data.
        rounds: How often; more show the machine less disturbed.
    """
    for setting in settings:
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            made = data.make(setting.task, seed, setting.data)
            seconds.append(time.process_time() - start)
        columns = [c for split in data.SPLITS for c in getattr(made, split) if c is not None]
        megabytes = sum(c.nbytes for c in columns) / 1e6
        yield DataTime(setting, min(seconds), megabytes, data.ceiling(setting.task, made))


def data_table(times: Iterable[DataTime]) -> Table:
    """Draw the times of data, a row for each setting, and their sum."""
    table = Table("task", "setting", show_footer=True)
    rows = list(times)
    total = f"{sum(t.seconds for t in rows):.2f}"
    for heading, footer in (
        ("vocabulary", ""), ("tokens", ""), ("training examples", ""), ("MB", ""), ("ceiling", ""),
        ("seconds", total),
    ):  # fmt: skip
        table.add_column(heading, footer, justify="right")
    for (label, task, sizes), seconds, megabytes, ceiling in rows:
        table.add_row(
            task.name, label, str(task.vocabulary), str(task.input_length),
            f"{sizes.train_examples:,}", f"{megabytes:.1f}", f"{ceiling:.4f}", f"{seconds:.3f}",
        )  # fmt: skip
    return table
