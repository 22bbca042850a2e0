"""Brings one store up to date from the run folders.

A run that is FINISHED in MLflow is complete, because that status is set last; its folder is not
read again. The compare page opens on the metric that was logged first: that is an accuracy, for
which the first points of a run wait a little.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mad_efla.analysis import verdict
from mad_efla.analysis.leaderboard import leaderboard
from mad_efla.config import ConfigError
from mad_efla.plan.run import RunConfig
from mad_efla.runs.files import now
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import Known, of_record
from mad_efla.runs.schema import Failure, Result, Status, SweepRecord
from mad_efla.runs.sweeps import read_sweeps, sweep_figures
from mad_efla.tracking import experiments, locks, models, records, stores, uploads
from mad_efla.tracking.entry import Deleted, Entry, fresh_figures
from mad_efla.tracking.problems import explain, in_time, is_refusal, meaning, reason

_PATIENCE = 50  # logged steps held back at most, until there is a first accuracy to log
_FAILURES = ("Failed: ", "Interrupted: ", "Pruned: ")  # how the notes on attempts begin


class SyncReport(NamedTuple):
    """What a synchronisation did.

    Attributes:
        runs: Runs that MLflow now shows as their folders are.
        problem: One sentence on why MLflow is not up to date; None if it is.
        notes: Run folders that could not be read, and what MLflow does not take of others, with the reason.
        experiments: Experiment ids by task, the one with the newest sweep last.
    """

    runs: int
    problem: str | None
    notes: tuple[str, ...]
    experiments: dict[str, str]


def sync(
    uri: str,
    out: Path,
    *,
    fingerprints: Iterable[str] | None = None,
    timeout_s: float | None = None,
    log_models: bool = False,
) -> SyncReport:
    """Bring MLflow up to date from the run folders; doing it twice changes nothing.

    A run marked RUNNING that no process holds becomes KILLED on the way.

    Args:
        uri: The store, as `resolve_uri` returns it.
        out: The folder of run folders.
        fingerprints: Only these runs; all by default.
        timeout_s: Seconds after which no further call is begun; None for no limit.
        log_models: Log the models of finished runs, too.
    """
    wanted = None if fingerprints is None else set(fingerprints)
    deadline = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
    return Bridge(uri, out, log_models).sync(deadline, wanted=wanted)


@dataclass
class Bridge:
    """One store and one folder of runs, and what this process knows about both.

    Attributes:
        uri: The store, as `resolve_uri` returns it.
        out: The folder of run folders.
        log_models: Whether models are logged, too.
        client: MLflow's client, once there is one.
        experiments: Experiment ids by task.
        experiments_known: Tasks whose runs in MLflow were looked at.
        entries: Our runs in MLflow, by fingerprint or sweep id.
        unowned: Runs there that tell no owner, likewise.
        owner: The word of the folder of runs, by which ours are known.
        runs: Configurations read, by fingerprint.
        results: Results read, by fingerprint.
        files: Files that wait until the numbers are told.
        refused: What MLflow does not take of runs, by sentence.
        rejected: Runs that this synchronisation could not tell MLflow of, by its reason.
        problems: What went wrong in this synchronisation.
        notes: What could not be read, and why.
        deadline: Until when this synchronisation may begin another call, by the monotonic clock.
    """

    uri: str
    out: Path
    log_models: bool = False
    client: Any = None
    experiments: dict[str, str] = field(default_factory=dict)
    experiments_known: set[str] = field(default_factory=set)
    entries: dict[str, Entry] = field(default_factory=dict)
    unowned: dict[str, Entry] = field(default_factory=dict)
    owner: str = ""
    runs: dict[str, RunConfig] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    files: uploads.Uploads = field(default_factory=uploads.Uploads)
    refused: dict[str, list[str]] = field(default_factory=dict)
    rejected: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    deadline: float = math.inf

    def sync(self, deadline: float, *, only: set[str] | None = None, wanted: set[str] | None = None) -> SyncReport:
        """Mirror all sweeps, or only those of the ids `only`; of them all cells, or those wanted."""
        self.deadline, self.problems, self.rejected = deadline, [], {}
        self.files.waiting.clear()
        count = 0
        try:
            with stores.mlflow_settings(), locks.exclusive(self.uri, self.out, deadline):
                self.client = self.client or experiments.client(self.uri)
                self.owner = self.owner or locks.owner(self.out)
                for task, sweep, cells in self._work(only):
                    if wanted is not None:
                        cells = [f for f in cells if f in wanted]
                    count += self._sweep(task, sweep, cells)
                self.files.send(deadline)
        except Exception as error:  # whatever MLflow does, a sweep goes on
            self.experiments_known.clear()
            self.problems.append(meaning(error, self.uri).sentence)
        return self._report(count)

    def _report(self, count: int) -> SyncReport:
        rejected = [f"{_some(runs)}: refused by MLflow ({why})" for why, runs in self.rejected.items()]
        problems = [*dict.fromkeys(self.problems), *rejected, *filter(None, [self.files.problem])]
        problem = explain("; ".join(problems), self.out) if problems else None
        refused = [f"{_some(runs)}: {sentence}" for sentence, runs in self.refused.items()]
        self.notes = list(dict.fromkeys(self.notes))
        return SyncReport(count, problem, (*self.notes, *refused), self.experiments)

    def _work(self, only: set[str] | None) -> Iterator[tuple[str, SweepRecord | None, list[str]]]:
        """Yield task, sweep and cells; runs that no sweep names come last, by task.

        Where only some sweeps are wanted, those come, too, that MLflow shows as running and no process is at:
        their driver was killed.
        """
        sweeps = read_sweeps(self.out)
        for sweep in sweeps:
            if only is None or sweep.id in only:
                yield sweep.task, sweep, list(sweep.fingerprints)
        if only is not None:
            for sweep in sweeps:
                entry = self.entries.get(sweep.id)
                running = entry and entry.status == "RUNNING" and not entry.deleted
                if sweep.id not in only and running and not locks.is_live(self.out, sweep.id):
                    yield sweep.task, sweep, list(sweep.fingerprints)
            return
        named = {f for sweep in sweeps for f in sweep.fingerprints}
        others: dict[str, list[str]] = {}
        for path in sorted(self.out.glob("*/config.json")):
            fingerprint = path.parent.name
            if fingerprint not in named and (run := self._read(fingerprint)):
                others.setdefault(run.task.name, []).append(fingerprint)
        for task, cells in others.items():
            yield task, None, cells

    def _read(self, fingerprint: str) -> RunConfig | None:
        if fingerprint not in self.runs:
            try:
                self.runs[fingerprint] = RunFolder(self.out, fingerprint).run()
            except ConfigError as error:
                if (self.out / fingerprint).exists():  # else its turn has not come
                    self.notes.append(str(error))
        return self.runs.get(fingerprint)

    def _read_all(self, fingerprints: Iterable[str]) -> list[RunConfig]:
        return [run for f in fingerprints if (run := self._read(f))]

    def _experiment(self, task: str) -> None:
        """Find or make a task's experiment, and learn which of its runs are ours."""
        if task in self.experiments_known:
            self.experiments[task] = self.experiments.pop(task)  # the newest sweep's is last
            return
        self.experiments.pop(task, None)
        self.experiments[task] = experiments.identify(self.client, self.uri, task)
        for entry in experiments.runs(self.client, self.experiments[task]):
            key = entry.tags.get("mad.fingerprint") or entry.tags.get("mad.sweep")
            owner = entry.tags.get("mad.owner")
            known = self.entries if owner == self.owner else self.unowned if owner is None else None
            if key and known is not None and (key not in known or known[key].deleted):
                known[key] = entry
        self.experiments_known.add(task)

    def _create(self, task: str, key: str, name: str, started: int, tags: dict[str, str]) -> bool:
        run = self.client.create_run(self.experiments[task], started, records.fit(tags), name)
        self.entries[key] = Entry.of(self.client, run)
        return True

    def _adopt(self, key: str, begun: int, ended: int) -> None:
        """Take over a run of ours from before runs had owners: one that began while our folder's did."""
        entry = self.unowned.get(key)
        if key not in self.entries and entry and begun <= entry.started <= ended:
            self.entries[key] = self.unowned.pop(key)
            entry.tag({"mad.owner": self.owner})

    def _sweep(self, task: str, sweep: SweepRecord | None, cells: list[str]) -> int:
        """Mirror a sweep and its cells; return how many are as their folders are."""
        try:
            self._experiment(task)
        except stores.Problem as problem:  # of this experiment; others may be well
            self.problems.append(str(problem))
            return 0
        if sweep:
            self._adopt(sweep.id, sweep.started, sweep.started)
        if sweep and sweep.id not in self.entries:
            tags, title = records.sweep_tags(sweep, self.owner), records.cut(sweep.plan, records.TITLE)
            if not self._told(sweep.id, partial(self._create, task, sweep.id, title, sweep.started, tags)):
                return 0
        names: dict[str, str] = {}
        count, statuses = 0, Counter()
        for fingerprint in cells:
            in_time(self.deadline)
            folder = RunFolder(self.out, fingerprint)
            status = self._status(folder)
            statuses[status] += 1
            if not names and self._unfinished(fingerprint):
                names = records.names(self._read_all(cells))
            count += self._told(fingerprint, partial(self._cell, folder, status, names.get(fingerprint, ""), sweep))
            self.notes += folder.notes
        if sweep and set(cells) == set(sweep.fingerprints):
            self._told(sweep.id, partial(self._summarise, sweep, statuses))
        return count

    def _told(self, key: str, tell: Callable[[], bool]) -> bool:
        """Tell MLflow of one run; what goes wrong with this one leaves the others be."""
        told = False
        try:
            told = tell()
        except Deleted:
            self.entries[key].deleted = True
            self.experiments_known.clear()  # its experiment may be deleted, too
        except OSError as error:
            if error.filename is None or not Path(error.filename).absolute().is_relative_to(self.out.absolute()):
                raise
            self.notes.append(f"{error.filename}: cannot be read ({error.strerror}); its run is left out")
        except Exception as error:
            if not is_refusal(error):
                raise
            self.experiments_known.clear()
            entry = self.entries.get(key)
            self.rejected.setdefault(reason(error, entry.run_id if entry else ""), []).append(key)
        if entry := self.entries.get(key):
            for sentence in entry.refused:
                self.refused.setdefault(sentence, []).append(key)
            entry.refused.clear()
        return told

    def _unfinished(self, key: str) -> bool:
        return key not in self.entries or self.entries[key].status != "FINISHED"

    def _status(self, folder: RunFolder) -> Status:
        if folder.fingerprint not in self.results:
            result = folder.result()
            if result is None:
                return folder.status()
            self.results[folder.fingerprint] = result
        return self.results[folder.fingerprint].status

    def _summarise(self, sweep: SweepRecord, statuses: Counter[Status]) -> bool:
        """Write a sweep's leaderboard, counts and status, if they have changed."""
        entry = self.entries[sweep.id]
        self._figures(entry, sweep_figures(self.out, sweep.id))
        status = records.sweep_status(statuses, live=locks.is_live(self.out, sweep.id))
        counts = records.counts(statuses)
        told = (counts, status) == (entry.tags.get("mad.counts"), entry.status)
        if entry.deleted or (told and entry.tags.get(records.ARTIFACTS) != records.MISSING):
            return True
        self._read_all(sweep.fingerprints)
        board = leaderboard(of_record(sweep, self.out, Known(self.runs, self.results)))
        found = [*board.cells, *board.checks]
        if status != "RUNNING" and not told:
            entry.log(records.sweep_points(statuses, now()), self.deadline)
        note = {records.NOTE: records.sweep_note(sweep, statuses, found, verdict.sentences(board))}
        entry.tag({"mad.counts": counts, records.ARTIFACTS: records.MISSING} | records.TABLE_TAG | note)
        entry.set_status(status, sweep.ended or now())
        self.files.add(entry, partial(uploads.of_sweep, entry, found), completes=True)
        return True

    def _cell(self, folder: RunFolder, status: Status, name: str, sweep: SweepRecord | None) -> bool:
        """Mirror one run; return whether MLflow shows it as its folder is."""
        key = folder.fingerprint
        if key in self.unowned and key not in self.entries:
            self._adopt(key, *_span(folder, self.results.get(key)))
        entry = self.entries.get(key)
        if status == "waiting":
            if entry and entry.status == "RUNNING":
                entry.set_status("KILLED", now())
            return False
        if entry and entry.deleted:
            return False  # by the user, in MLflow; it stays so
        if entry is None or not _complete(entry):
            run = self._read(key)
            if run is None:
                return False
            failure = None if key in self.results else folder.failure()
            look = (status, _size(folder), failure)
            entry = self._child(run, folder, name, sweep)
            if entry.seen != look:
                self._numbers(entry, folder, status)
                self._ending(entry, run, status, failure)
                entry.seen = look
            if entry.tags.get(records.ARTIFACTS) != records.COMPLETE:
                self.files.add(entry, partial(uploads.of_run, entry, run, failure), completes=True)
        if status == "finished":
            self._figures(entry, folder.figures)
            if self.log_models and "mad.model" not in entry.tags and (run := self._read(key)):
                self.files.add(entry, partial(models.log, entry, self.experiments[run.task.name], run, folder))
        if sweep and f"mad.sweep.{sweep.id}" not in entry.tags:  # its parent is the first only
            entry.tag({f"mad.sweep.{sweep.id}": sweep.plan})
        return True

    def _figures(self, entry: Entry, folder: Path) -> None:
        files, look = fresh_figures(entry, folder)
        if files:
            self.files.add(entry, partial(entry.attach, files, look))

    def _child(self, run: RunConfig, folder: RunFolder, name: str, sweep: SweepRecord | None) -> Entry:
        """Find or make a run's run, with its configuration, and learn what it has been told."""
        key, task = run.fingerprint, run.task.name
        if key not in self.entries:  # another process may have made it since
            where = f"tags.`mad.fingerprint` = '{key}' AND tags.`mad.owner` = '{self.owner}'"
            for found in experiments.runs(self.client, self.experiments[task], where):
                self.entries[key] = found
        if key not in self.entries:
            rows, _ = folder.rows()
            result = self.results.get(key)
            started = result.started if result else rows[0].time if rows else now()
            tags = records.cell_tags(run, self.owner)
            if sweep and not self.entries[sweep.id].deleted:
                tags["mlflow.parentRunId"] = self.entries[sweep.id].run_id
            self._create(task, key, name or records.names([run])[key], started, tags)
        entry = self.entries[key]
        if entry.steps is None:
            entry.configure(run)
            entry.learn()
        return entry

    def _numbers(self, entry: Entry, folder: RunFolder, status: Status) -> None:
        """Send the result's numbers and the curves, an accuracy first."""
        rows, _ = folder.rows()
        result = self.results.get(folder.fingerprint)
        try:
            points = records.points(rows, result)
        except (AttributeError, TypeError, ValueError) as error:
            self.notes.append(f"{folder.path / 'metrics.jsonl'}: has lines that are no metrics ({error}); left out")
            points = records.points([], result)
        first = [p for p in points if p.name in records.ACCURACIES]
        if status == "running" and not entry.steps and not first and len(rows) < _PATIENCE:
            return
        entry.log(first, self.deadline)
        entry.log(points, self.deadline)

    def _ending(self, entry: Entry, run: RunConfig, status: Status, failure: Failure | None) -> None:
        """Write a run's status and result; MLflow's own status comes last, since it says that all numbers are there."""
        tags = {"mad.status": status}
        result = self.results.get(run.fingerprint)
        if result:
            entry.trained_on(run, result.data_digest)
            tags |= records.result_tags(result)
        if not failure and _is_outdated(entry):
            entry.untag(records.NOTE)
            tags |= {records.ARTIFACTS: records.MISSING, uploads.OUTDATED: "traceback.txt"}
        if failure:
            tags[records.NOTE] = f"{failure.kind.capitalize()}: {failure.reason}"
            if failure.traceback:
                tags[records.ARTIFACTS] = records.MISSING
        entry.tag(tags)
        ended = result.ended if result else failure.time if failure else now()
        entry.set_status(records.MLFLOW_STATUS[status], ended)


def _complete(entry: Entry) -> bool:
    """Say whether MLflow has all of a run; what earlier versions made had its files before its status."""
    whole = entry.tags.get(records.ARTIFACTS, records.COMPLETE) == records.COMPLETE
    return entry.status == "FINISHED" and whole and not _is_outdated(entry)


def _is_outdated(entry: Entry) -> bool:
    """Say whether a run is said to have failed, of an earlier attempt."""
    return entry.tags.get(records.NOTE, "").startswith(_FAILURES)


def _span(folder: RunFolder, result: Result | None) -> tuple[int, int]:
    """Return when a run was made, in milliseconds since the epoch; nothing where it has not begun."""
    times = [row.time for row in folder.rows()[0]] + ([result.started, result.ended] if result else [])
    return (min(times), max(times)) if times else (0, -1)


def _some(runs: list[str]) -> str:
    more = f" and {len(set(runs)) - 1} more" if len(set(runs)) > 1 else ""
    return f"run {runs[0]}{more}"


def _size(folder: RunFolder) -> int:
    try:
        return (folder.path / "metrics.jsonl").stat().st_size
    except FileNotFoundError:
        return 0
