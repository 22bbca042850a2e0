"""How sweeps stand, read from their folders: from another terminal, or another machine."""

import logging
from pathlib import Path
from typing import NamedTuple

from mad_efla.config import ConfigError
from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.schema import Failure, Row, Status, SweepRecord
from mad_efla.runs.sweeps import read_sweeps

_log = logging.getLogger(__name__)


class SweepStatus(NamedTuple):
    """How a sweep stands.

    Attributes:
        record: Which sweep.
        runs: Its runs; those whose folder is gone are left out.
        counts: Runs by status.
        waiting: Runs that wait for their turn, or for a call that goes on with them.
        running: Runs that some process holds, with the last step they logged.
        failed: Runs that failed, with the reason.
        unreadable: What cannot be read of its runs, in sentences.
    """

    record: SweepRecord
    runs: list[RunConfig]
    counts: dict[Status, int]
    waiting: list[RunConfig]
    running: list[tuple[RunConfig, Row | None]]
    failed: list[tuple[RunConfig, Failure]]
    unreadable: list[str]


def sweep_statuses(out: Path) -> list[SweepStatus]:
    """Read how every sweep under a folder stands, oldest first.

    Raises:
        ConfigError: There is none.
    """
    problems: list[str] = []
    records = read_sweeps(out, problems)
    for problem in problems:
        _log.warning("left out: %s", problem)
    if not records:
        raise ConfigError(f"{out}: holds no sweep; run `mad-efla sweep` first, or name its folder")
    return [_sweep_status(record, out) for record in records]


def find(out: Path, name: str) -> RunFolder:
    """Find a run by the beginning of its name.

    Raises:
        ConfigError: None begins so, or several do.
    """
    known = {f for record in read_sweeps(out) for f in record.fingerprints}
    found = sorted(f for f in known if f.startswith(name))
    if len(found) != 1:
        several = f"{len(found)} runs begin so, give more of its name" if found else "no such run"
        raise ConfigError(f"{name}: {several}; see `mad-efla status {out}`")
    return RunFolder(out, found[0])


def _sweep_status(record: SweepRecord, out: Path) -> SweepStatus:
    counts: dict[Status, int] = {}
    runs, waiting, running, failed, unreadable = [], [], [], [], []
    for fingerprint in record.fingerprints:
        folder = RunFolder(out, fingerprint)
        status = folder.status()
        counts[status] = counts.get(status, 0) + 1
        if not folder.path.exists():
            continue
        failure = folder.failure()
        unreadable += folder.notes
        try:
            run = folder.run()
        except ConfigError as error:
            unreadable.append(str(error))
            continue
        runs.append(run)
        if status == "running":
            rows, _ = folder.rows()
            running.append((run, rows[-1] if rows else None))
        elif status == "failed" and failure:
            failed.append((run, failure))
        elif status in ("waiting", "interrupted"):
            waiting.append(run)
    return SweepStatus(record, runs, counts, waiting, running, failed, unreadable)
