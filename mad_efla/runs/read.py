"""The one reader of runs, in folders and archives: what can be read, and what cannot, with the reason.

Runs are read by way of the sweeps that name them, since labels come from the sweep that is shown,
and since a run whose folder is gone was planned all the same. Nothing is written or renamed.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mad_efla.config import ConfigError
from mad_efla.plan.run import RunConfig
from mad_efla.runs.archive import SUFFIX, Archive, ArchivedRun
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.schema import Planned, Result, SweepRecord, planned
from mad_efla.runs.sweeps import read_sweeps

_log = logging.getLogger(__name__)


class Unreadable(NamedTuple):
    """A run that cannot be shown, and why."""

    path: Path
    reason: str


class Known(NamedTuple):
    """Runs that were read already, and are not looked at again.

    Attributes:
        runs: Configurations by fingerprint.
        results: Results by fingerprint; a run of `runs` without one is not done.
    """

    runs: dict[str, RunConfig]
    results: dict[str, Result]


NOTHING = Known({}, {})


class Group(NamedTuple):
    """The runs of one plan under one protocol: what a table may show together.

    Attributes:
        plan: The plan's name; empty for runs that no sweep names.
        protocol: The rules that its scores are taken by.
        records: Its sweeps, oldest first.
        planned: Its runs as their sweeps name them, each once.
        runs: Configurations by fingerprint, of those that can be read.
        results: Results by fingerprint, of those that are done.
        folders: Where each run lies, by fingerprint: a folder, or a row of an archive.
        unreadable: Runs that cannot be shown.
    """

    plan: str
    protocol: str
    records: list[SweepRecord]
    planned: list[Planned]
    runs: dict[str, RunConfig]
    results: dict[str, Result]
    folders: dict[str, RunFolder | ArchivedRun]
    unreadable: list[Unreadable]

    @property
    def about(self) -> str:
        """The plan's own sentence."""
        return next((r.about for r in reversed(self.records) if r.about), "")


def load(*places: Path) -> list[Group]:
    """Read every run that the sweeps in some folders and archives are made of; what cannot be read is logged, too.

    Args:
        places: Folders of run folders, and archives. A run that lies in several counts once, as the
            first has it that has its result.

    Returns:
        A group for every plan and protocol, by name.

    Raises:
        ConfigError: There is no sweep, or an archive cannot be read.
    """
    problems: list[str] = []
    sources = [_source(place) for place in places]
    records = [(record, source) for source in sources for record in _records(source, problems)]
    if not records:
        named = ", ".join(map(str, places))
        raise ConfigError(f"{named}: holds no sweep; run `mad-efla sweep` first, or name its folder")
    found: dict[tuple[str, str], list[tuple[SweepRecord, _Source]]] = {}
    for record, source in records:
        found.setdefault((record.plan, record.protocol), []).append((record, source))
    groups = [_group(*key, found[key]) for key in sorted(found)]
    for path, reason in dict.fromkeys(bad for group in groups for bad in group.unreadable):
        problems.append(reason if str(path) in reason else f"{path}: {reason}")
    for problem in problems:
        _log.warning("left out: %s", problem)
    return groups


def of_record(record: SweepRecord, out: Path, known: Known = NOTHING) -> Group:
    """Read the runs of one sweep, except those that are known already."""
    return _group(record.plan, record.protocol, [(record, out)], known)


def of_runs(runs: Iterable[RunConfig], results: dict[str, Result], *, choosing: Iterable[RunConfig] = ()) -> Group:
    """Group runs that are at hand, such as those of a test or of a notebook.

    Args:
        runs: Whose results count.
        results: By fingerprint.
        choosing: Runs that only choose the grid point.
    """
    runs, choosing = list(runs), list(choosing)
    named = [planned(run) for run in runs] + [planned(run, chooses=True) for run in choosing]
    return of_planned(named, [*choosing, *runs], results)


def of_planned(named: Iterable[Planned], runs: Iterable[RunConfig], results: dict[str, Result]) -> Group:
    """Group runs that are at hand, as their sweep names them."""
    every = {run.fingerprint: run for run in runs}
    protocol = next(iter(every.values())).protocol if every else "custom"
    once = {p.fingerprint: p for p in named}
    return Group("", protocol, [], list(once.values()), every, results, {}, [])


_Source = Path | Archive
"""A folder of run folders, or an archive."""


def _source(place: Path) -> _Source:
    return Archive(place) if place.suffix == SUFFIX or place.is_file() else place


def _records(source: _Source, problems: list[str]) -> list[SweepRecord]:
    return source.records if isinstance(source, Archive) else read_sweeps(source, problems)


def _lies(source: _Source, fingerprint: str) -> RunFolder | ArchivedRun:
    """Return where a run lies; of one that an archive lacks, a folder that is not there."""
    if isinstance(source, Archive):
        return source.runs.get(fingerprint) or RunFolder(source.path.with_suffix(""), fingerprint)
    return RunFolder(source, fingerprint)


def _group(plan: str, protocol: str, records: list[tuple[SweepRecord, _Source]], known: Known = NOTHING) -> Group:
    group = Group(plan, protocol, [record for record, _ in records], [], {}, {}, {}, [])
    problems: dict[str, list[Unreadable]] = {}
    seen: dict[str, int] = {}
    for record, source in records:
        named = {p.fingerprint: p for p in record.planned}
        for fingerprint in record.fingerprints:
            if fingerprint not in group.results:  # where it lies in several places, one that has its result
                _read(group, _lies(source, fingerprint), named.get(fingerprint), known, problems)
            entry = named.get(fingerprint)
            if entry is None and fingerprint in group.runs:
                entry = planned(group.runs[fingerprint])
            if entry is None:
                continue
            if fingerprint not in seen:
                seen[fingerprint] = len(group.planned)
                group.planned.append(entry)
            else:  # one sweep's choosing seed, or check, may be another's measured one
                held = group.planned[seen[fingerprint]]
                both = {"chooses": held.chooses and entry.chooses, "check": held.check and entry.check}
                group.planned[seen[fingerprint]] = held.model_copy(update=both)
    group.unreadable.extend(dict.fromkeys(bad for found in problems.values() for bad in found))
    return group


def _read(
    group: Group,
    folder: RunFolder | ArchivedRun,
    entry: Planned | None,
    known: Known,
    problems: dict[str, list[Unreadable]],
) -> None:
    """Read one run into a group, or note why it cannot be read; a folder may be gone.

    A run that was read from another folder stays as it is, unless this folder has its result.
    """
    fingerprint = folder.fingerprint
    group.folders.setdefault(fingerprint, folder)
    run = known.runs.get(fingerprint)
    if run is None and not folder.path.exists():
        return
    try:
        result = known.results.get(fingerprint) if run else folder.result()
        run = run or folder.run()
    except ConfigError as error:
        if fingerprint not in group.runs:
            problems.setdefault(fingerprint, []).append(Unreadable(folder.path, str(error)))
        return
    if fingerprint in group.runs and not result:
        return
    group.folders[fingerprint] = folder
    group.runs[fingerprint] = run.model_copy(update={"setting": entry.setting}) if entry else run
    if result:
        group.results[fingerprint] = result
    problems[fingerprint] = [Unreadable(folder.path, note) for note in folder.notes]
