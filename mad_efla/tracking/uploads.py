"""Files for MLflow: after the numbers, and apart from them.

Numbers go to MLflow's database, files to a place of their own, which may be out of reach where the
database is not: a bucket without credentials, another machine's folder, a network that swallows what is
sent. So files wait here until all numbers are told, each is waited for no longer than a while, and where
several in a row fail the others wait until later. A tag of the run says whether its files are all there.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from mad_efla.analysis import corruption
from mad_efla.analysis.cells import Cell
from mad_efla.plan.run import RunConfig
from mad_efla.runs.schema import Failure
from mad_efla.tracking import records
from mad_efla.tracking.entry import Deleted, Entry
from mad_efla.tracking.problems import in_time, reason, within
from mad_efla.tracking.stores import without_password

OUTDATED = "mad.outdated"  # a tag: which file of an earlier attempt is still there
_SECONDS = 30.0  # for the files of one run
_IN_A_ROW = 3  # failures, after which the place is taken for unreachable
_PAUSE_SECONDS = 60.0  # until it is tried again


@dataclass
class Uploads:
    """Files that wait to be sent.

    Attributes:
        waiting: Which runs they are of, and what sends them.
        again: When files may be sent again, by the monotonic clock.
        problem: One sentence on why files are missing; None if none are.
    """

    waiting: list[tuple[Entry, Callable[[], object], bool]] = field(default_factory=list)
    again: float = 0.0
    problem: str | None = None

    def add(self, entry: Entry, send: Callable[[], object], *, completes: bool = False) -> None:
        """Let files wait.

        Args:
            entry: Their run.
            send: Sends them.
            completes: Whether the run then has all its files, and is to be tagged so.
        """
        if not entry.deleted:
            self.waiting.append((entry, send, completes))

    def send(self, deadline: float) -> None:
        """Send what waits.

        Raises:
            Late: The deadline has passed.
        """
        waiting, self.waiting = self.waiting, []
        if time.monotonic() < self.again:
            return
        self.problem, failures = None, 0
        for entry, send, completes in waiting:
            in_time(deadline)
            try:
                within(_SECONDS, send)
                failures = 0
                if completes:
                    entry.tag({records.ARTIFACTS: records.COMPLETE})
            except Deleted:
                entry.deleted = True
            except Exception as error:  # packages, credentials, disks: whatever its store raises
                failures += 1
                self.problem = self.problem or _sentence(entry, error)
                if failures == _IN_A_ROW:
                    break
        self.again = time.monotonic() + _PAUSE_SECONDS if self.problem else 0.0


def of_run(entry: Entry, run: RunConfig, failure: Failure | None) -> None:
    """Write a run's files, and take away those that no longer hold."""
    entry.write("config.json", json.dumps(run.model_dump(mode="json"), indent=1))
    if failure and failure.traceback:
        entry.write("traceback.txt", failure.traceback)
    elif name := entry.tags.get(OUTDATED):
        entry.withdraw(name)
    entry.untag(OUTDATED)


def of_sweep(entry: Entry, found: list[Cell]) -> None:
    """Write a sweep's tables."""
    entry.write("leaderboard.csv", records.leaderboard_csv(found))
    entry.write("leaderboard.json", records.leaderboard_json(found))
    if probed := corruption.arms(found):
        entry.write("corruption.json", records.corruption_json(probed))


def _sentence(entry: Entry, error: Exception) -> str:
    place = str(PurePosixPath(entry.place).parents[1]) if entry.place.startswith("/") else entry.place
    return (
        f"MLflow has the numbers but not all files: {without_password(place)} cannot be written from here "
        f"({reason(error)}); make it reachable, with the packages and credentials that it needs"
    )
