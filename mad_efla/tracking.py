"""MLflow as a mirror of the run folders: the files come first, MLflow can be rebuilt from them.

    task            experiment of that name
    sweep           parent run, tagged mad.role=sweep: leaderboard, counts
    run             child run, tagged mad.role=cell and mad.fingerprint, one per experiment
    RunConfig       parameters (optim.lr, and optim.lr_log10 for axes that know no logarithm)
    metrics.jsonl   curves: train/loss, val/token_accuracy, ...
    Result          test/... and total/..., once, at step 0; tags mad.env.*; the dataset's digest
    config.json     artifact config.json; a failed run adds traceback.txt
    status          running RUNNING, finished and diverged FINISHED, failed FAILED,
                    interrupted KILLED; a run that only waits is not in MLflow yet

Every field is a parameter, constants too: whoever reads a run, or searches for one, expects it
whole. The versions of code and task, which nobody compares runs by, are tags.

Names and order follow from what MLflow's page does with them. Sections of charts are sorted by the
prefix of the metric, so what matters less than `test/` has a prefix that comes later. Parallel
coordinates open on the first three parameters in which runs differ, so the mixer's own fields,
which another mixer does not have, are `token_mixer.*` and come behind `optim.lr`, `seed` and
`setting`. The compare page opens on the metric that was logged first: that is an accuracy.

Nothing is remembered beside MLflow itself. A run that is FINISHED there is complete, because that
status is set last. Of any other, the last step of each metric is asked for once, and only later
steps are sent. So a replay doubles nothing; and where a run went back to its checkpoint and made
steps again, what the first attempt reported stays.

One process writes at a time, held by a lock beside the store. A call to a server is short, retried
twice, and never waited for by training; workers do not import MLflow, and neither does this module
before it is used.
"""

import contextlib
import csv
import fcntl
import getpass
import io
import json
import logging
import math
import os
import re
import socket
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from mad_efla import scores
from mad_efla.config import ConfigError
from mad_efla.run import RunConfig
from mad_efla.store import Failure, Result, RunFolder, Status, SweepRecord, now, read_sweeps

PRIMARY = "test/token_accuracy"
LIVE_SECONDS = 3.0
CLOSE_SECONDS = 20.0
_LONGEST_PAUSE = 60.0
_FIRST = (PRIMARY, "val/token_accuracy")
_PATIENCE = 50  # logged steps held back at most, until there is a first accuracy to log
_BATCH = 1000  # metrics in one request, the most that MLflow takes
_ALL_RUNS = 3  # MLflow's ViewType: deleted ones too
_PORT = 5000
_MLFLOW_STATUS: dict[Status, str] = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")


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


class _Problem(Exception):
    """A store that cannot be used; the text holds value, rule and cure."""


class _Late(Exception):
    """The time is over, or another process has the store."""


def resolve_uri(option: str | None) -> str:
    """Choose the MLflow store: the option, else MLFLOW_TRACKING_URI, else ./mlflow.db.

    Raises:
        ConfigError: It is neither a server nor a database.
    """
    given = option or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    source = "--tracking-uri" if option else "MLFLOW_TRACKING_URI"
    if given.startswith("sqlite:"):
        path = given.removeprefix("sqlite:///")
        if path in (given, "", ":memory:"):
            raise ConfigError(f"{source} {given}: must name a file, as in sqlite:///mlflow.db")
        return f"sqlite:///{Path(path).absolute()}"
    if given.split(":")[0] == "databricks" or (
        "://" in given and not given.startswith(("file:", "."))
    ):
        return given
    raise ConfigError(
        f"{source} {given}: must be a server or a database, as in http://localhost:5000 or "
        "sqlite:///mlflow.db"
    )


def sync(
    uri: str,
    out: Path,
    *,
    fingerprints: Iterable[str] | None = None,
    timeout_s: float | None = None,
) -> SyncReport:
    """Bring MLflow up to date from the run folders; doing it twice changes nothing.

    A run marked RUNNING that no process holds becomes KILLED on the way.

    Args:
        uri: The store, as `resolve_uri` returns it.
        out: The folder of run folders.
        fingerprints: Only these runs; all by default.
        timeout_s: Seconds after which no further call is begun; None for no limit.
    """
    wanted = None if fingerprints is None else set(fingerprints)
    deadline = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
    return _Bridge(uri, out).sync(deadline, wanted=wanted)


class Mirror:
    """Keeps MLflow up to date with a sweep while inside, from one background thread.

    Args:
        uri: The store, as `resolve_uri` returns it.
        out: The folder of run folders.
        record: The sweep, already written.

    Attributes:
        problem: One sentence on why MLflow is not up to date; None if it is.
    """

    def __init__(self, uri: str, out: Path, record: SweepRecord):
        self.problem: str | None = None
        self._bridge = _Bridge(uri, out)
        self._record = record
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Make a last synchronisation, waiting for it no longer than `CLOSE_SECONDS`."""
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self.problem = self._bridge.explain(_Late())

    def _follow(self) -> None:
        pause = 0.0
        with _live(self._bridge.out, self._record.id):
            while not self._stop.wait(pause):
                report = self._bridge.sync(time.monotonic() + CLOSE_SECONDS, only=self._record.id)
                self.problem = report.problem
                failing = min(2 * max(pause, LIVE_SECONDS), _LONGEST_PAUSE)
                pause = failing if report.problem else LIVE_SECONDS
        deadline = time.monotonic() + CLOSE_SECONDS
        self.problem = self._bridge.sync(deadline, only=self._record.id).problem


# ------------------------------------------------------------------ the page


def ui(uri: str, out: Path, host: str, port: int | None, say: Callable[[str], object]) -> None:
    """Open MLflow on a store; for a local one this process becomes its server.

    Args:
        uri: The store, as `resolve_uri` returns it.
        out: The folder of run folders, mirrored first.
        host: Address to listen on.
        port: Port to listen on; None takes 5000 or the next free one.
        say: Prints a line for the user.

    Raises:
        ConfigError: There is no store, it cannot be used, or the port is taken.
    """
    path = _sqlite_path(uri)
    if path and not path.exists() and not read_sweeps(out):
        raise ConfigError(
            f"{path}: no such store, and no sweep in {out}; run `mad-efla sweep` first, or name "
            "the store with --tracking-uri"
        )
    report = sync(uri, out)
    if report.problem:
        raise ConfigError(report.problem)
    newest = [*report.experiments.values()][-1:]
    if _is_server(uri):
        say(deep_link(uri, host, port or _PORT, *newest))
        return
    port = _free_port(host, port)
    say(f"{deep_link(uri, host, port, *newest)}\n(answers in about ten seconds; Ctrl-C ends it)")
    sys.stdout.flush()
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument: it may hold a password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    command += ["--workers", "1", "--artifacts-destination", str(_artifacts(uri))]
    command += ["--uvicorn-opts", "--log-level warning"]
    os.execve(sys.executable, command, environment)


def deep_link(uri: str, host: str, port: int, experiment_id: str | None = None) -> str:
    """Return the address of an experiment's charts: its cells, best first.

    Without it the page lists the sweeps, with their runs folded away.
    """
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    base = _without_password(uri).rstrip("/") if _is_server(uri) else f"http://{shown}:{port}"
    if experiment_id is None:
        return f"{base}/#/experiments?workflowType=machine_learning"
    where = quote("tags.`mad.role` = 'cell'")
    return (
        f"{base}/#/experiments/{experiment_id}/runs?searchFilter={where}"
        f"&orderByKey={quote(f'metrics.`{PRIMARY}`')}&orderByAsc=false"
        "&compareRunsMode=CHART&workflowType=machine_learning"
    )


def _free_port(host: str, wish: int | None) -> int:
    for port in [wish] if wish else range(_PORT, _PORT + 50):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                reason = error.strerror
                continue
        return port
    what = f"--port {wish}" if wish else f"ports {_PORT} to {_PORT + 49}"
    raise ConfigError(f"{what} on {host}: cannot be used ({reason}); choose another with --port")


# ------------------------------------------------------------------ what MLflow is told


def parameters(run: RunConfig) -> dict[str, str]:
    """Return every field of a run by a name that MLflow takes: `optim.lr`, `token_mixer.heads`."""
    flat: dict[str, Any] = {"mixer": run.mixer, "setting": run.setting, "seed": run.seed}
    for section in ("task", "data", "model", "optim", "train"):
        for key, value in getattr(run, section).model_dump().items():
            flat[f"{section}.{key}"] = value
    flat["optim.lr_log10"] = round(math.log10(run.optim.lr), 6)
    alike = all(m == run.mixers[0] for m in run.mixers)
    for index, mixer in enumerate(run.mixers[:1] if alike else run.mixers):
        for key, value in mixer.model_dump().items():
            flat[f"token_mixer.{key}" if alike else f"token_mixer.{index}.{key}"] = value
    return {re.sub(r"[^\w./: -]", "_", key): str(value) for key, value in flat.items()}


def summary(result: Result) -> dict[str, float]:
    """Return a result's numbers, the primary score first; a run that diverged has no scores."""
    found: dict[str, float | None] = {}
    if result.test:
        found = {f"test/{name}": getattr(result.test, name) for name in _SCORES}
    if result.validation:
        found |= {f"val_chosen/{name}": getattr(result.validation, name) for name in _SCORES}
    for name in _NUMBERS:
        found[f"total/{name}"] = getattr(result, name)
    found["total/diverged"] = float(result.status == "diverged")
    return {k: float(v) for k, v in found.items() if v is not None and math.isfinite(v)}


_SCORES = ("token_accuracy", "macro_accuracy", "loss")
_NUMBERS = ("steps_to_90", "steps", "seconds", "parameters", "state_size")


def _cell_tags(run: RunConfig) -> dict[str, str]:
    tags = {
        "mad.role": "cell",
        "mad.fingerprint": run.fingerprint,
        "mad.protocol": run.protocol,
        "mad.mixer": run.mixer,
        "mad.task": run.task.name,
        "mad.setting": run.setting,
        "mad.seed": str(run.seed),
        "mad.task_version": str(run.task_version),
        "mad.numbers": str(run.numbers),
    }
    return tags | _source()


def _source() -> dict[str, str]:
    """Fill the columns that MLflow's own clients fill."""
    return {
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": "mad-efla",
    }


def _result_tags(result: Result) -> dict[str, str]:
    tags = {f"mad.env.{name}": value for name, value in result.environment.items()}
    commit = result.environment.get("git_commit", "").removesuffix("+")
    if re.fullmatch(r"[0-9a-f]{40}", commit):
        tags["mlflow.source.git.commit"] = commit
    tags["mad.data_digest"] = result.data_digest
    for name in ("stopped", "chosen_step"):
        if getattr(result, name) is not None:
            tags[f"mad.{name}"] = str(getattr(result, name))
    return tags


_EXPERIMENT_NOTE = """\
Runs of the task **{task}**, mirrored by mad-efla from its run folders.

A *sweep* is a parent run; its *cells* (tag `mad.role` = `cell`) are one training run each.

| metric | meaning |
|---|---|
| `test/token_accuracy` | the score: right answers on the test split, in [0, 1] |
| `test/macro_accuracy` | the same, averaged over the answers' classes |
| `test/loss` | nats per scored token |
| `total/steps_to_90` | first evaluated step with validation accuracy of at least 0.9 |
| `total/state_size` | numbers the mixers carry from token to token |
| `total/diverged` | 1 where the loss stopped being finite |
| `train/...`, `val/...` | curves over steps |
| `val_chosen/...` | the validation split under the weights that were scored |

Scores of different protocols (tag `mad.protocol`) are not comparable.
"""

_HEADER = (
    "setting", "mixer", "grid point", "seeds", "accuracy", "low", "high", "macro accuracy", "loss",
    "parameters", "state size", "steps to 90 %", "seconds", "missing",
)  # fmt: skip
_SHOWN = ("setting", "mixer", "grid point", "seeds", "accuracy", "low", "high", "loss", "missing")


def _leaderboard(lines: list[scores.Line]) -> list[list[str]]:
    """Return the rows of a sweep's table, as text, below `_HEADER`."""
    rows = []
    for line in lines:
        point = ", ".join(f"{k.split('.')[-1]}={v}" for k, v in line.point.items())
        low_high = line.accuracy or (None, None, None)
        numbers = (*low_high, line.macro_accuracy, line.loss)
        shown = ["" if n is None else f"{n:.4f}" for n in numbers]
        steps = "" if line.steps_to_90 is None else f"{line.steps_to_90:g}"
        rows.append(
            [line.setting, line.mixer, point, str(line.seeds), *shown, str(line.parameters),
             str(line.state_size), steps, f"{line.seconds:.1f}", line.missing]
        )  # fmt: skip
    return rows


def _markdown(rows: list[list[str]]) -> str:
    """Write the columns that fit beside MLflow's own."""
    table = [_HEADER, ["---"] * len(_HEADER), *rows]
    columns = [_HEADER.index(c) for c in _HEADER if c in _SHOWN]
    return "\n".join("| " + " | ".join(row[c] for c in columns) + " |" for row in table)


def _csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_HEADER, *rows])
    return text.getvalue()


def _names(runs: list[RunConfig]) -> dict[str, str]:
    """Name runs by mixer, setting, the fields in which equally named ones differ, and seed."""
    flat = {r.fingerprint: parameters(r) for r in runs}
    alike: dict[tuple[str, str], list[RunConfig]] = {}
    for run in runs:
        alike.setdefault((run.mixer, run.setting), []).append(run)
    names = {}
    for (mixer, setting), group in alike.items():
        first = flat[group[0].fingerprint]
        varied = [
            key
            for key in first
            if key not in ("seed", "optim.lr_log10")
            and any(flat[r.fingerprint][key] != first[key] for r in group)
        ]
        for run in group:
            point = [f"{k.split('.')[-1]}={flat[run.fingerprint][k]}" for k in varied]
            names[run.fingerprint] = " ".join([mixer, setting, *point, f"seed {run.seed}"])
    return names


# ------------------------------------------------------------------ the bridge


@dataclass
class _Known:
    """A run as MLflow has it.

    Attributes:
        steps: Last step of each metric; None until asked for.
        seen: How its folder looked when it was mirrored.
    """

    run_id: str
    status: str
    deleted: bool
    tags: dict[str, str]
    metrics: list[str]
    steps: dict[str, int] | None = None
    seen: object = None


@dataclass
class _Bridge:
    """One store and one folder of runs, and what this process knows about both."""

    uri: str
    out: Path
    client: Any = None
    experiments: dict[str, str] = field(default_factory=dict)
    known: dict[str, _Known] = field(default_factory=dict)  # by fingerprint or sweep id
    runs: dict[str, RunConfig] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    deadline: float = math.inf

    def sync(
        self, deadline: float, *, only: str | None = None, wanted: set[str] | None = None
    ) -> SyncReport:
        """Mirror all sweeps, or only that of id `only`; of them all cells, or those wanted."""
        self.deadline = deadline
        count, problem, notes = 0, None, []
        records = [r for r in read_sweeps(self.out) if only in (None, r.id)]
        try:
            with _mlflow_settings(), self._exclusive():
                self._open()
                for task, record, cells in self._work(records, only is None, notes):
                    if wanted is not None:
                        cells = [f for f in cells if f in wanted]
                    self._experiment(task)
                    count += self._sweep(task, record, cells, notes)
        except Exception as error:  # whatever MLflow does, a sweep goes on
            problem = self.explain(error)
        return SyncReport(count, problem, tuple(dict.fromkeys(notes)), self.experiments)

    def explain(self, error: Exception) -> str:
        """Put into one sentence why MLflow is not up to date, and what helps."""
        later = f"the runs are safe in {self.out}; `mad-efla sync` brings MLflow up to date later"
        where = _without_password(self.uri)
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        if isinstance(error, _Problem):
            return f"{error}; {later}"
        if isinstance(error, _Late):
            return f"MLflow at {where} is not up to date yet, the time was over; {later}"
        if "malformed" in str(error) or "not a database" in str(error):
            return f"{_damaged(self.uri)}; {later}"
        if _is_server(self.uri) and "API request to" in text:
            return f"MLflow at {where} does not answer; {later}"
        return f"MLflow at {where}: {_without_password(text)[:200]}; {later}"

    def _work(
        self, records: list[SweepRecord], loose: bool, notes: list[str]
    ) -> Iterator[tuple[str, SweepRecord | None, list[str]]]:
        """Yield task, sweep and cells; runs that no sweep names come last, by task."""
        for record in records:
            yield record.task, record, list(record.fingerprints)
        if not loose:
            return
        named = {f for record in records for f in record.fingerprints}
        others: dict[str, list[str]] = {}
        for path in sorted(self.out.glob("*/config.json")):
            fingerprint = path.parent.name
            if fingerprint not in named and self._read(fingerprint, notes):
                others.setdefault(self.runs[fingerprint].task.name, []).append(fingerprint)
        for task, cells in others.items():
            yield task, None, cells

    def _read(self, fingerprint: str, notes: list[str]) -> RunConfig | None:
        if fingerprint not in self.runs:
            try:
                self.runs[fingerprint] = RunFolder(self.out, fingerprint).run()
            except ConfigError as error:
                if (self.out / fingerprint).exists():  # else its turn has not come
                    notes.append(str(error))
        return self.runs.get(fingerprint)

    # -------------------------------------------------------------- store

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Be the only process that writes this store, or these runs to a server."""
        path = _sqlite_path(self.uri)
        folder = path.parent if path else self.out
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / (f".{path.name}.lock" if path else ".mlflow.lock")
        with lock.open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._in_time()
                    time.sleep(0.1)
            yield

    def _in_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise _Late

    def _open(self) -> None:
        if self.client is None:
            path = _sqlite_path(self.uri)
            if path:
                _prepare(path)
            from mlflow import MlflowClient

            self.client = MlflowClient(tracking_uri=self.uri)

    def _experiment(self, task: str) -> None:
        """Find or make a task's experiment, and learn which runs it has."""
        if task in self.experiments:
            self.experiments[task] = self.experiments.pop(task)  # the newest sweep's is last
            return
        found = self.client.get_experiment_by_name(task)
        if found is None:
            place = None if _is_server(self.uri) else str(_artifacts(self.uri) / task)
            tags = {
                "mlflow.note.content": _EXPERIMENT_NOTE.format(task=task),
                "mlflow.experimentKind": "custom_model_development",
            }
            identity = self.client.create_experiment(task, artifact_location=place, tags=tags)
        elif found.lifecycle_stage == "deleted":
            raise _Problem(
                f"MLflow experiment {task!r} is deleted; `mlflow experiments restore "
                f"--experiment-id {found.experiment_id}` brings it back"
            )
        else:
            identity = found.experiment_id
        for run in self._search(identity):
            key = run.data.tags.get("mad.fingerprint") or run.data.tags.get("mad.sweep")
            if key and (key not in self.known or self.known[key].deleted):
                self.known[key] = _as_known(run)
        self.experiments[task] = identity

    def _search(self, experiment_id: str, where: str = "") -> list[Any]:
        found, token = [], ""
        while token is not None:
            page = self.client.search_runs(
                [experiment_id], where, _ALL_RUNS, max_results=_BATCH, page_token=token or None
            )
            found += page
            token = page.token or None
        return found

    # -------------------------------------------------------------- sweeps

    def _sweep(
        self, task: str, record: SweepRecord | None, cells: list[str], notes: list[str]
    ) -> int:
        """Mirror a sweep and its cells; return how many are as their folders are."""
        names: dict[str, str] = {}
        parent = self._parent(task, record) if record else None
        count, statuses = 0, Counter()
        for fingerprint in cells:
            self._in_time()
            folder = RunFolder(self.out, fingerprint)
            status = self._status(folder)
            statuses[status] += 1
            if not names and self._unfinished(fingerprint):
                names = _names([r for f in cells if (r := self._read(f, notes))])
            count += self._cell(folder, status, names.get(fingerprint, ""), record, parent, notes)
            notes += folder.notes
        if record and parent and set(cells) == set(record.fingerprints):
            self._summarise(record, parent, statuses, notes)
        return count

    def _unfinished(self, key: str) -> bool:
        return key not in self.known or self.known[key].status != "FINISHED"

    def _status(self, folder: RunFolder) -> Status:
        if folder.fingerprint not in self.results:
            result = folder.result()
            if result is None:
                return folder.status()
            self.results[folder.fingerprint] = result
        return self.results[folder.fingerprint].status

    def _parent(self, task: str, record: SweepRecord) -> _Known:
        if record.id not in self.known:
            tags = {
                "mad.role": "sweep",
                "mad.sweep": record.id,
                "mad.protocol": record.protocol,
                "mad.task": record.task,
                "mad.plan": record.plan,
                "mad.command": record.command,
            }
            self._create(task, record.id, record.plan, record.started, tags | _source())
        return self.known[record.id]

    def _summarise(
        self, record: SweepRecord, parent: _Known, statuses: Counter[Status], notes: list[str]
    ) -> None:
        """Write a sweep's leaderboard, counts and status, if they have changed."""
        live = bool(statuses["running"]) or _is_live(self.out, record.id)
        status = "RUNNING" if live else "FAILED" if statuses["failed"] else "FINISHED"
        if not live and statuses["waiting"] + statuses["interrupted"]:
            status = "KILLED"
        counts = ", ".join(f"{n} {name}" for name, n in sorted(statuses.items()))
        if parent.deleted or (counts, status) == (parent.tags.get("mad.counts"), parent.status):
            return
        runs = [r for f in record.fingerprints if (r := self._read(f, notes))]
        rows = _leaderboard(scores.table(runs, self.results))
        note = f"Protocol {record.protocol}: {counts}.\n\n{_markdown(rows)}\n\n`{record.command}`"
        self.client.set_tag(parent.run_id, "mlflow.note.content", note)
        self.client.log_text(parent.run_id, _csv(rows), "leaderboard.csv")
        if not live:
            at = now()
            values = {name: float(statuses[name]) for name in _MLFLOW_STATUS}
            self._metrics(parent, [(f"sweep/{n}", v, at, 0) for n, v in values.items()])
        self._tag(parent, {"mad.counts": counts})
        self._set_status(parent, status, record.ended or now())

    # -------------------------------------------------------------- cells

    def _cell(
        self, folder: RunFolder, status: Status, name: str, record: SweepRecord | None,
        parent: _Known | None, notes: list[str],
    ) -> bool:  # fmt: skip
        """Mirror one run; return whether MLflow shows it as its folder is."""
        key = folder.fingerprint
        if status == "waiting":
            if key in self.known and self.known[key].status == "RUNNING":
                self._set_status(self.known[key], "KILLED", now())
            return False
        if key in self.known and self.known[key].deleted:
            return False  # by the user, in MLflow; it stays so
        if not self._unfinished(key):
            self._belongs(self.known[key], record)
            return True
        run = self._read(key, notes)
        if run is None:
            return False
        failure = None if key in self.results else folder.failure()
        look = (status, _size(folder), failure)
        known = self._child(run, folder, name, record, parent)
        if known.seen != look:
            self._numbers(known, folder, status)
            self._ending(known, run, status, failure)
            known.seen = look
        self._belongs(known, record)
        return True

    def _child(
        self, run: RunConfig, folder: RunFolder, name: str, record: SweepRecord | None,
        parent: _Known | None,
    ) -> _Known:  # fmt: skip
        """Find or make a run's run, with its configuration, and learn what it has been told."""
        key = run.fingerprint
        if key not in self.known:  # another process may have made it since
            where = f"tags.`mad.fingerprint` = '{key}'"
            for found in self._search(self.experiments[run.task.name], where):
                self.known[key] = _as_known(found)
        if key not in self.known:
            rows, _ = folder.rows()
            result = self.results.get(key)
            started = result.started if result else rows[0].time if rows else now()
            tags = _cell_tags(run)
            if parent and not parent.deleted:
                tags["mlflow.parentRunId"] = parent.run_id
            self._create(run.task.name, key, name or _names([run])[key], started, tags)
        known = self.known[key]
        if known.steps is None:
            self._configuration(known, run)
            known.steps = {m: self._last_step(known, m) for m in known.metrics}
        return known

    def _configuration(self, known: _Known, run: RunConfig) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in parameters(run).items()]
        for start in range(0, len(params), 100):  # the most that one request takes
            self.client.log_batch(known.run_id, params=params[start : start + 100])
        text = json.dumps(run.model_dump(mode="json"), indent=1)
        self.client.log_text(known.run_id, text, "config.json")

    def _numbers(self, known: _Known, folder: RunFolder, status: Status) -> None:
        """Send what MLflow has not been told: the result's numbers, and steps beyond the last."""
        rows, _ = folder.rows()
        points = [(k, v, row.time, row.step) for row in rows for k, v in row.metrics.items()]
        result = self.results.get(folder.fingerprint)
        if result:
            points = [(k, v, result.ended, 0) for k, v in summary(result).items()] + points
        first = [p for p in points if p[0] in _FIRST]
        if status == "running" and not known.steps and not first and len(rows) < _PATIENCE:
            return
        self._metrics(known, first)
        self._metrics(known, points)

    def _ending(
        self, known: _Known, run: RunConfig, status: Status, failure: Failure | None
    ) -> None:
        """Say how a run stands; the status comes last, since it says that all is there."""
        tags = {"mad.status": status}
        result = self.results.get(run.fingerprint)
        if result:
            self._dataset(known, run, result)
            tags |= _result_tags(result)
            if status == "diverged":
                tags["mlflow.note.content"] = f"Diverged: {result.stopped}."
        elif failure:
            tags["mlflow.note.content"] = f"{failure.kind.capitalize()}: {failure.reason}"
            if failure.traceback:
                self.client.log_text(known.run_id, failure.traceback, "traceback.txt")
        self._tag(known, tags)
        ended = result.ended if result else failure.time if failure else now()
        self._set_status(known, _MLFLOW_STATUS[status], ended)

    def _dataset(self, known: _Known, run: RunConfig, result: Result) -> None:
        """Log the generated data by its digest: equal digests, equal tokens."""
        from mlflow.entities import Dataset, DatasetInput

        made_from = {"task": run.task.model_dump(mode="json"), "seed": run.seed}
        dataset = Dataset(
            name=run.task.name,
            digest=result.data_digest,
            source_type="generated",
            source=json.dumps(made_from),
            profile=json.dumps(run.data.model_dump()),
        )
        self.client.log_inputs(known.run_id, [DatasetInput(dataset, [])])

    def _belongs(self, known: _Known, record: SweepRecord | None) -> None:
        """Note which sweeps a run is part of; its parent is the first."""
        if record and f"mad.sweep.{record.id}" not in known.tags:
            self._tag(known, {f"mad.sweep.{record.id}": record.plan})

    # -------------------------------------------------------------- calls

    def _create(self, task: str, key: str, name: str, started: int, tags: dict[str, str]) -> None:
        run = self.client.create_run(self.experiments[task], started, tags, name)
        self.known[key] = _as_known(run)

    def _last_step(self, known: _Known, metric: str) -> int:
        return max(point.step for point in self.client.get_metric_history(known.run_id, metric))

    def _metrics(self, known: _Known, points: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        steps = known.steps if known.steps is not None else {}
        fresh = [p for p in points if p[3] > steps.get(p[0], -1) and math.isfinite(p[1])]
        for start in range(0, len(fresh), _BATCH):
            self._in_time()
            batch = fresh[start : start + _BATCH]
            self.client.log_batch(known.run_id, metrics=[Metric(*point) for point in batch])
            for key, _, _, step in batch:
                steps[key] = step

    def _tag(self, known: _Known, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        fresh = {key: text for key, text in tags.items() if known.tags.get(key) != text}
        if fresh:
            self.client.log_batch(known.run_id, tags=[RunTag(k, v) for k, v in fresh.items()])
            known.tags |= fresh

    def _set_status(self, known: _Known, status: str, ended: int) -> None:
        if known.status == status or known.deleted:
            return
        if status == "RUNNING":
            self.client.update_run(known.run_id, status=status)
        else:
            self.client.set_terminated(known.run_id, status, ended)
        known.status = status


def _as_known(run: Any) -> _Known:
    return _Known(
        run_id=run.info.run_id,
        status=run.info.status,
        deleted=run.info.lifecycle_stage == "deleted",
        tags=dict(run.data.tags),
        metrics=list(run.data.metrics),
    )


def _size(folder: RunFolder) -> int:
    try:
        return (folder.path / "metrics.jsonl").stat().st_size
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def _live(out: Path, sweep: str) -> Iterator[None]:
    """Show other processes that this sweep goes on, by a lock that dies with this one."""
    (out / "sweeps").mkdir(parents=True, exist_ok=True)
    with (out / "sweeps" / f"{sweep}.lock").open("a") as file:
        with contextlib.suppress(BlockingIOError):  # somebody is just asking
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def _is_live(out: Path, sweep: str) -> bool:
    path = out / "sweeps" / f"{sweep}.lock"
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


# ------------------------------------------------------------------ local stores


def _prepare(path: Path) -> None:
    """Make an SQLite store that is not there; refuse one that cannot be used.

    Raises:
        _Problem: It is damaged, no MLflow store, or of another schema.
    """
    if not path.exists() or path.stat().st_size == 0:
        _make(path)
        return
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from mlflow import __file__ as package
    from mlflow import __version__ as version

    found = _schema(path)
    known = ScriptDirectory(str(Path(package).parent / "store" / "db_migrations"))
    if found == known.get_current_head():
        return
    try:
        known.get_revision(found)
    except CommandError:
        raise _Problem(
            f"{path}: its schema {found} is newer than MLflow {version} knows; install the newer "
            "MLflow, or name another store with --tracking-uri"
        ) from None
    raise _Problem(
        f"{path}: its schema {found} is older than MLflow {version} needs; keep a copy and run "
        f"`mlflow db upgrade sqlite:///{path}`"
    )


def _schema(path: Path) -> str:
    """Read which revision of MLflow's schema a database has."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=10)
        ) as database:
            rows = database.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            raise _Problem(
                f"{path}: is a database, but no MLflow store; name another with --tracking-uri"
            ) from None
        raise _Problem(f"{path}: {error}; name another store with --tracking-uri") from None
    except sqlite3.DatabaseError:
        raise _Problem(_damaged(f"sqlite:///{path}")) from None
    return str(rows[0][0]) if rows else "none"


def _damaged(uri: str) -> str:
    return (
        f"{_sqlite_path(uri) or _without_password(uri)}: is damaged, or no SQLite database; move "
        "it away and a new one is made"
    )


def _make(path: Path) -> None:
    """Build a store aside and move it into place: a kill half way leaves nothing ruined.

    The caller holds the lock. MLflow's own way is to migrate in place, which fails when two
    processes do it at once, and leaves a database that no version opens when killed.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    store = SqlAlchemyStore(f"sqlite:///{aside}", str(_artifacts(f"sqlite:///{path}")))
    store.engine.dispose()
    os.replace(aside, path)


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _artifacts(uri: str) -> Path:
    """Return where a local store keeps artifacts: beside the database."""
    path = _sqlite_path(uri)
    return (path.parent if path else Path.cwd()) / "mlartifacts"


# ------------------------------------------------------------------ surroundings


_settings_lock = threading.Lock()
_settings_depth = 0
_settings_before: dict[str, Any] = {}


@contextlib.contextmanager
def _mlflow_settings() -> Iterator[None]:
    """Keep MLflow quick to give up, and quiet, while any thread is inside; then as it was.

    What the user set in the environment stands.
    """
    global _settings_depth
    with _settings_lock:
        _settings_depth += 1
        if _settings_depth == 1:
            fresh = {name: text for name, text in _SETTINGS.items() if name not in os.environ}
            os.environ.update(fresh)
            levels = {name: logging.getLogger(name).level for name in _LOGGERS}
            _settings_before.update(fresh=fresh, levels=levels)
            import mlflow  # noqa: F401  # configures its loggers

            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        with _settings_lock:
            _settings_depth -= 1
            if _settings_depth == 0:
                for name in _settings_before["fresh"]:
                    os.environ.pop(name, None)
                for name, level in _settings_before["levels"].items():
                    logging.getLogger(name).setLevel(level)


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return "unknown"
