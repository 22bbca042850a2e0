"""Runs in one file that lasts: what they left, weights aside, a row a run, as Parquet.

    records        the sweeps that name the runs, as JSON in the file's metadata
    config         the whole configuration as JSON; its fields as columns of their own, `optim.lr`
    result         how it ended, as JSON; its scores as columns, `test_token_accuracy`
    curves         what it logged: step, time, metric, value
    probes         further test sets: name, severity, accuracy, finite
    environment    what it ran on, as JSON

pandas, DuckDB and R read it as it is. Rows are in the order of fingerprints and nothing in the file
depends on when or where it was written, so equal runs give equal bytes. An archive stands wherever
a folder of runs does.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mad_efla.config import ConfigError, Document
from mad_efla.plan.run import RunConfig, build
from mad_efla.runs.files import write_bytes
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.schema import Failure, Result, Row, Status, SweepRecord

VERSION = 1
SUFFIX = ".parquet"
_PLACES = ("--out", "--tracking-uri", "--data-dir")  # options that name places of a machine
_SCORES = ("loss", "token_accuracy", "macro_accuracy", "sequence_accuracy")
_KEY = b"mad_efla"


class ArchivedRun:
    """A run of an archive, read as `RunFolder` is.

    Attributes:
        fingerprint: Its name.
        path: The archive's.
        notes: None: what can't be read is refused when the archive is opened.
    """

    def __init__(self, path: Path, fingerprint: str, row: Mapping[str, Any]):
        self.path, self.fingerprint, self._row = path, fingerprint, row
        self.notes: list[str] = []
        self.figures = path.with_suffix("") / fingerprint

    def run(self) -> RunConfig:
        """Read the configuration back.

        Raises:
            ConfigError: It names what is not here, or was made by other numbers or other code than these, which
                must not be pooled with what is made now.
        """
        data = json.loads(self._row["config"])
        numbers = data.pop("numbers", None)
        data.pop("task_version", None)
        run = build(Document(data, {(): str(self.path)}, str(self.path)))
        if run.fingerprint != self.fingerprint:
            raise ConfigError(
                f"{self.path}: run {self.fingerprint} was made by another version (numbers={numbers}), where the "
                f"same configuration is {run.fingerprint} now; read it with that version"
            )
        return run

    def result(self) -> Result:
        """Return how it ended."""
        return Result.model_validate_json(self._row["result"])

    def failure(self) -> Failure | None:
        """Return None: runs that failed are in no archive."""
        return None

    def status(self) -> Status:
        """Say how it ended."""
        return self.result().status

    def rows(self, offset: int = 0) -> tuple[list[Row], int]:
        """Return what it logged; everything, whatever the offset."""
        found: dict[tuple[int, int], dict[str, float]] = {}
        for point in self._row["curves"]:
            found.setdefault((point["step"], point["time"]), {})[point["metric"]] = point["value"]
        return [Row(step, time, metrics) for (step, time), metrics in found.items()], offset

    def load_model(self) -> dict[str, Any]:
        """Refuse: weights are in no archive.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self.path}: run {self.fingerprint} is archived without weights; make it again to look")

    def unpack(self, out: Path) -> None:
        """Write it as a run folder, unless one that is done is there; it has no weights."""
        folder = RunFolder(out, self.fingerprint)
        if folder.result() is not None:
            return
        with folder.lock() as held:
            if not held:
                return
            folder.create(self.run())
            folder.append(self.rows()[0])
            folder.finish(self.result())


class Archive:
    """An archive that was read.

    Attributes:
        path: Where it lies.
        records: Its sweeps, oldest first.
        runs: Its runs by fingerprint.
    """

    def __init__(self, path: Path):
        """Read a file.

        Raises:
            ConfigError: It is not there, damaged, no archive of ours, or of a later version.
        """
        from pyarrow import parquet
        from pyarrow.lib import ArrowException

        self.path = path
        try:
            table = parquet.read_table(path)
            about = json.loads((table.schema.metadata or {}).get(_KEY, b"null"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: there is no such archive; `mad-efla archive RUNS --to FILE` writes one"
            ) from None
        except (ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{path}: cannot be read as an archive ({reason}); take a whole copy of it") from None
        if not isinstance(about, dict):
            raise ConfigError(f"{path}: is a table, but no archive of runs; `mad-efla archive` writes those")
        if (version := about["version"]) > VERSION:
            raise ConfigError(f"{path}: is an archive of version {version}, and this mad-efla reads up to {VERSION}")
        self.records = [SweepRecord.model_validate_json(json.dumps(r)) for r in about["records"]]
        self.runs = {row["fingerprint"]: ArchivedRun(path, row["fingerprint"], row) for row in table.to_pylist()}


def write(path: Path, records: Iterable[SweepRecord], runs: Mapping[str, "RunFolder | ArchivedRun"]) -> int:
    """Write an archive; equal runs give equal bytes.

    Args:
        path: The file; replaced whole.
        records: Sweeps that name the runs.
        runs: By fingerprint; those that are not done are left out.

    Returns:
        Runs written.

    Raises:
        ConfigError: None of them is done, or the file can't be written.
    """
    import pyarrow
    from pyarrow import parquet

    rows = [row for fingerprint in sorted(runs) if (row := _row(runs[fingerprint]))]
    if not rows:
        raise ConfigError(f"{path}: none of these runs is done; an archive holds results")
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column([row.get(name) for row in rows], name) for name in names}
    kept = [_public(record) for record in sorted(records, key=lambda r: (r.task, r.plan, r.id))]
    about = {"version": VERSION, "records": [record.model_dump(mode="json") for record in kept]}
    table = pyarrow.table(columns).replace_schema_metadata({_KEY: json.dumps(about, sort_keys=True).encode()})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, sink.getvalue().to_pybytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; name another --to") from None
    return len(rows)


def _row(folder: "RunFolder | ArchivedRun") -> dict[str, Any] | None:
    result = folder.result()
    if result is None:
        return None
    run = folder.run()
    config = run.model_dump(mode="json")
    row: dict[str, Any] = {"fingerprint": folder.fingerprint, "config": json.dumps(config, sort_keys=True)}
    row["result"] = json.dumps(result.model_dump(mode="json"), sort_keys=True)
    row |= {"task": run.task.name, "setting": run.setting, "mixer": run.mixer, "mixer_code": run.mixer_code}
    row |= {"protocol": run.protocol, "seed": run.seed}
    for section in ("task", "data", "model", "optim", "train"):
        row |= {f"{section}.{key}": value for key, value in config[section].items()}
    for split in ("test", "validation"):
        scores = getattr(result, split)
        row |= {f"{split}_{name}": getattr(scores, name, None) for name in _SCORES}
    kept = result.model_dump(
        mode="json", exclude={"test", "validation", "environment", "probes", "spent", "fingerprint"}
    )
    row |= kept | {"environment": json.dumps(result.environment, sort_keys=True)}
    row["probes"] = [probe.model_dump() for probe in result.probes]
    row["curves"] = [
        {"step": r.step, "time": r.time, "metric": metric, "value": float(value)}
        for r in folder.rows()[0]
        for metric, value in r.metrics.items()
    ]
    return row


def _column(values: list[Any], name: str) -> Any:
    """Return a column of one type; values of several types, and nested ones, are JSON."""
    import pyarrow

    if name == "curves":
        fields = {
            "step": pyarrow.int64(),
            "time": pyarrow.int64(),
            "metric": pyarrow.string(),
            "value": pyarrow.float64(),
        }
        return pyarrow.array(values, pyarrow.list_(pyarrow.struct(fields)))
    if name == "probes":
        fields = {"name": pyarrow.string()} | dict.fromkeys(("severity", "accuracy", "finite"), pyarrow.float64())
        return pyarrow.array(values, pyarrow.list_(pyarrow.struct(fields)))
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {int, float} and float in kinds:
        return pyarrow.array([None if v is None else float(v) for v in values], pyarrow.float64())
    if len(kinds) > 1 or kinds & {dict, list}:
        values = [None if v is None else json.dumps(v, sort_keys=True) for v in values]
    return pyarrow.array(values)


def _public(record: SweepRecord) -> SweepRecord:
    """Leave out when it was made, and the places of a machine: paths, addresses with passwords."""
    return record.model_copy(update={"command": public_command(record.command), "started": 0, "ended": 0})


def public_command(command: str) -> str:
    """Leave out where files and records went: paths of a machine, addresses with passwords."""
    words = iter(shlex.split(command))
    kept = []
    for word in words:
        if word in _PLACES:
            next(words, None)
        elif not word.startswith(tuple(f"{p}=" for p in _PLACES)) and word != "--no-tracking":
            kept.append(word)
    return shlex.join(kept)
