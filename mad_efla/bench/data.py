"""Seconds to generate the data of a task."""

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.table import Table

from mad_efla.plan.expand import Setting
from mad_efla.training import data


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
        ("vocabulary", ""),
        ("tokens", ""),
        ("training examples", ""),
        ("MB", ""),
        ("ceiling", ""),
        ("seconds", total),
    ):
        table.add_column(heading, footer, justify="right")
    for (label, task, sizes), seconds, megabytes, ceiling in rows:
        table.add_row(
            task.name,
            label,
            str(task.vocabulary),
            str(task.input_length),
            f"{sizes.train_examples:,}",
            f"{megabytes:.1f}",
            f"{ceiling:.4f}",
            f"{seconds:.3f}",
        )
    return table
