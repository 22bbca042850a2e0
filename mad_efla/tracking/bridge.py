"""Brings one store up to date from the run folders.

A run that is FINISHED in MLflow is complete, because that status is set last; its folder is not
read again. The compare page opens on the metric that was logged first: that is an accuracy, for
which the first points of a run wait a little.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mad_efla.analysis import cells as analysis
from mad_efla.analysis import corruption
from mad_efla.config import ConfigError
from mad_efla.plan.run import RunConfig
from mad_efla.runs.files import now
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import Known, of_record
from mad_efla.runs.schema import Failure, Result, Status, SweepRecord
from mad_efla.runs.sweeps import read_sweeps, sweep_figures
from mad_efla.tracking import models, records, stores
from mad_efla.tracking.entry import BATCH, Entry

_PATIENCE = 50  # logged steps held back at most, until there is a first accuracy to log
_ALL_RUNS = 3  # MLflow's ViewType: deleted ones too


class SyncReport(NamedTuple):
    """What a synchronisation did.

    Attributes:
        runs: Runs that MLflow now shows as their folders are.
        problem: One sentence on why MLflow is not up to date; None if it is.
        notes: Run folders that could not be read, and why.
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
        entries: Runs in MLflow, by fingerprint or sweep id.
        runs: Configurations read, by fingerprint.
        results: Results read, by fingerprint.
        notes: What this synchronisation could not read, and why.
        deadline: Until when this synchronisation may begin another call, by the monotonic clock.
    """

    uri: str
    out: Path
    log_models: bool = False
    client: Any = None
    experiments: dict[str, str] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    runs: dict[str, RunConfig] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    deadline: float = math.inf

    def sync(self, deadline: float, *, only: str | None = None, wanted: set[str] | None = None) -> SyncReport:
        """Mirror all sweeps, or only that of id `only`; of them all cells, or those wanted."""
        self.deadline, self.notes = deadline, []
        count, problem = 0, None
        sweeps = [r for r in read_sweeps(self.out) if only in (None, r.id)]
        try:
            with stores.mlflow_settings(), stores.exclusive(self.uri, self.out, deadline):
                self._open()
                for task, sweep, cells in self._work(sweeps, loose=only is None):
                    if wanted is not None:
                        cells = [f for f in cells if f in wanted]
                    self._experiment(task)
                    count += self._sweep(task, sweep, cells)
        except Exception as error:  # whatever MLflow does, a sweep goes on
            problem = stores.explain(error, self.uri, self.out)
        return SyncReport(count, problem, tuple(dict.fromkeys(self.notes)), self.experiments)

    def _open(self) -> None:
        if self.client is None:
            path = stores.sqlite_path(self.uri)
            if path:
                stores.prepare(path)
            from mlflow import MlflowClient

            self.client = MlflowClient(tracking_uri=self.uri)

    def _work(self, sweeps: list[SweepRecord], *, loose: bool) -> Iterator[tuple[str, SweepRecord | None, list[str]]]:
        """Yield task, sweep and cells; `loose` runs, that no sweep names, come last, by task."""
        for sweep in sweeps:
            yield sweep.task, sweep, list(sweep.fingerprints)
        if not loose:
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
        """Find or make a task's experiment, and learn which runs it has."""
        if task in self.experiments:
            self.experiments[task] = self.experiments.pop(task)  # the newest sweep's is last
            return
        found = self.client.get_experiment_by_name(task)
        if found is None:
            local = None if stores.is_server(self.uri) else str(stores.artifacts(self.uri) / task)
            tags = {
                "mlflow.note.content": records.EXPERIMENT_NOTE.format(task=task),
                "mlflow.experimentKind": "custom_model_development",
            }
            identity = self.client.create_experiment(task, artifact_location=local, tags=tags)
        elif found.lifecycle_stage == "deleted":
            raise stores.Problem(
                f"MLflow experiment {task!r} is deleted; `mlflow experiments restore "
                f"--experiment-id {found.experiment_id}` brings it back"
            )
        else:
            identity = found.experiment_id
        for entry in self._search(identity):
            key = entry.tags.get("mad.fingerprint") or entry.tags.get("mad.sweep")
            if key and (key not in self.entries or self.entries[key].deleted):
                self.entries[key] = entry
        self.experiments[task] = identity

    def _search(self, experiment_id: str, where: str = "") -> list[Entry]:
        found, token = [], ""
        while token is not None:
            page = self.client.search_runs(
                [experiment_id], where, _ALL_RUNS, max_results=BATCH, page_token=token or None
            )
            found += [Entry.of(self.client, run) for run in page]
            token = page.token or None
        return found

    def _create(self, task: str, key: str, name: str, started: int, tags: dict[str, str]) -> None:
        run = self.client.create_run(self.experiments[task], started, tags, name)
        self.entries[key] = Entry.of(self.client, run)

    def _sweep(self, task: str, sweep: SweepRecord | None, cells: list[str]) -> int:
        """Mirror a sweep and its cells; return how many are as their folders are."""
        if sweep and sweep.id not in self.entries:
            tags = records.sweep_tags(sweep)
            self._create(task, sweep.id, sweep.plan, sweep.started, tags)
        names: dict[str, str] = {}
        count, statuses = 0, Counter()
        for fingerprint in cells:
            stores.in_time(self.deadline)
            folder = RunFolder(self.out, fingerprint)
            status = self._status(folder)
            statuses[status] += 1
            if not names and self._unfinished(fingerprint):
                names = records.names(self._read_all(cells))
            count += self._cell(folder, status, names.get(fingerprint, ""), sweep)
            self.notes += folder.notes
        if sweep and set(cells) == set(sweep.fingerprints):
            self._summarise(sweep, statuses)
        return count

    def _unfinished(self, key: str) -> bool:
        return key not in self.entries or self.entries[key].status != "FINISHED"

    def _status(self, folder: RunFolder) -> Status:
        if folder.fingerprint not in self.results:
            result = folder.result()
            if result is None:
                return folder.status()
            self.results[folder.fingerprint] = result
        return self.results[folder.fingerprint].status

    def _summarise(self, sweep: SweepRecord, statuses: Counter[Status]) -> None:
        """Write a sweep's leaderboard, counts and status, if they have changed."""
        entry = self.entries[sweep.id]
        entry.attach(sweep_figures(self.out, sweep.id))
        status = records.sweep_status(statuses, live=stores.is_live(self.out, sweep.id))
        counts = records.counts(statuses)
        if entry.deleted or (counts, status) == (entry.tags.get("mad.counts"), entry.status):
            return
        self._read_all(sweep.fingerprints)
        found = analysis.cells(of_record(sweep, self.out, Known(self.runs, self.results)))
        note = records.sweep_note(sweep, statuses, found)
        self.client.set_tag(entry.run_id, "mlflow.note.content", note)
        entry.write("leaderboard.csv", records.leaderboard_csv(found))
        entry.write("leaderboard.json", records.leaderboard_json(found))
        if probed := corruption.arms(found):
            entry.write("corruption.json", records.corruption_json(probed))
        if status != "RUNNING":
            entry.log(records.sweep_points(statuses, now()), self.deadline)
        entry.tag({"mad.counts": counts} | records.TABLE_TAG)
        entry.stand(status, sweep.ended or now())

    def _cell(self, folder: RunFolder, status: Status, name: str, sweep: SweepRecord | None) -> bool:
        """Mirror one run; return whether MLflow shows it as its folder is."""
        key = folder.fingerprint
        entry = self.entries.get(key)
        if status == "waiting":
            if entry and entry.status == "RUNNING":
                entry.stand("KILLED", now())
            return False
        if entry and entry.deleted:
            return False  # by the user, in MLflow; it stays so
        if entry is None or entry.status != "FINISHED":
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
        if status == "finished":
            entry.attach(folder.figures)
            if self.log_models and (run := self._read(key)):
                models.log(entry, self.experiments[run.task.name], run, folder)
        if sweep and f"mad.sweep.{sweep.id}" not in entry.tags:  # its parent is the first only
            entry.tag({f"mad.sweep.{sweep.id}": sweep.plan})
        return True

    def _child(self, run: RunConfig, folder: RunFolder, name: str, sweep: SweepRecord | None) -> Entry:
        """Find or make a run's run, with its configuration, and learn what it has been told."""
        key, task = run.fingerprint, run.task.name
        if key not in self.entries:  # another process may have made it since
            for found in self._search(self.experiments[task], f"tags.`mad.fingerprint` = '{key}'"):
                self.entries[key] = found
        if key not in self.entries:
            rows, _ = folder.rows()
            result = self.results.get(key)
            started = result.started if result else rows[0].time if rows else now()
            tags = records.cell_tags(run)
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
        points = records.points(rows, self.results.get(folder.fingerprint))
        first = [p for p in points if p.name in records.ACCURACIES]
        if status == "running" and not entry.steps and not first and len(rows) < _PATIENCE:
            return
        entry.log(first, self.deadline)
        entry.log(points, self.deadline)

    def _ending(self, entry: Entry, run: RunConfig, status: Status, failure: Failure | None) -> None:
        """Say how a run stands; the status comes last, since it says that all is there."""
        tags = {"mad.status": status}
        result = self.results.get(run.fingerprint)
        if result:
            entry.trained_on(run, result.data_digest)
            tags |= records.result_tags(result)
        elif failure:
            tags["mlflow.note.content"] = f"{failure.kind.capitalize()}: {failure.reason}"
            if failure.traceback:
                entry.write("traceback.txt", failure.traceback)
        entry.tag(tags)
        ended = result.ended if result else failure.time if failure else now()
        entry.stand(records.MLFLOW_STATUS[status], ended)


def _size(folder: RunFolder) -> int:
    try:
        return (folder.path / "metrics.jsonl").stat().st_size
    except FileNotFoundError:
        return 0
