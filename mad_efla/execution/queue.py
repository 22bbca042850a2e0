"""The runs of a call: which is next, and what the end of each teaches."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mad_efla.execution.costs import Costs
from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.schema import Status
from mad_efla.training import data_cache


class Event(NamedTuple):
    """How a run stands: `running`, or the status it has just ended with."""

    run: RunConfig
    status: Status
    folder: RunFolder


Watch = Callable[[list[Event]], None]
"""Called a few times a second with what is running or has just ended."""


class OutOfTime(Exception):
    """The time that was allowed is over; what was running goes on with the next call."""


class RunQueue:
    """The runs that are to be made: which is next, and what each one's end teaches.

    Args:
        runs: What to run.
        out: The folder of run folders.
        costs: What is known of the runs' costs.
    """

    def __init__(self, runs: list[RunConfig], out: Path, costs: Costs):
        self.runs, self.out, self.costs = runs, out, costs
        self.waiting = {r.fingerprint: r for r in runs}
        self._not_before: dict[str, float] = {}
        self.needs = data_cache.Needs(out / data_cache.FOLDER, runs)
        for run in runs:
            RunFolder(out, run.fingerprint).create(run)

    @property
    def total(self) -> int:
        """How many there are to be."""
        return len(self.runs)

    def next(self) -> RunConfig | None:
        """Take the longest that is left; None if there is none, or none just now."""
        now = time.monotonic()
        free = [f for f in self.waiting if self._not_before.get(f, now) <= now]
        return self.waiting.pop(self.costs.longest(free)) if free else None

    def requeue(self, run: RunConfig, later: float = 0.0) -> None:
        """Put a run back that has lost its worker, or that another sweep is making.

        Args:
            run: Which.
            later: Seconds until it is handed out again.
        """
        self.waiting[run.fingerprint] = run
        self._not_before[run.fingerprint] = time.monotonic() + later

    def prune_reason(self, run: RunConfig) -> str:
        """Say why a run under way should be ended; empty to let it go on."""
        del run
        return ""

    def __iter__(self) -> Iterator[RunConfig]:
        """Take one after the other."""
        while run := self.next():
            yield run

    def ended(self, run: RunConfig) -> Event:
        """Take note that a run needs nothing more."""
        folder = RunFolder(self.out, run.fingerprint)
        result = folder.result()
        if result:
            self.costs.observe_result(run.fingerprint, result)
        self.needs.drop(run)
        return Event(run, folder.status(), folder)


def mark_interrupted(runs: list[RunConfig], out: Path) -> None:
    """Mark what was begun and neither ended nor said why, where nobody else holds it."""
    for run in runs:
        folder = RunFolder(out, run.fingerprint)
        if folder.status() != "interrupted" or folder.failure() is not None:
            continue
        with folder.lock() as free:  # another sweep may have gone on with it meanwhile
            if free and folder.result() is None and folder.failure() is None:
                folder.fail("interrupted", "stopped with the sweep", "")
