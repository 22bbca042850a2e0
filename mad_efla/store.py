"""Run folders: what a run leaves on disk, written so that a kill at any moment loses nothing.

    runs/<fingerprint>/
      config.json      the run, complete
      metrics.jsonl    one line per logged step, appended
      checkpoint.pt    where to go on: SHA-256, then a torch file; the one before it beside it
      model.pt         the scored weights
      result.json      written last: a run with a result is done
      failure.json     why the last attempt ended without one
      claim.N          who makes or made it, the highest number last
      figures/         what was drawn of it
    runs/sweeps/<id>.json    which runs a sweep is made of
    runs/sweeps/<id>/        what was drawn of it

Whole files are replaced atomically. What turns out broken is set aside under a name of its own and
reported, never deleted. One process at a time holds a run, by a claim (`lease.py`): whoever lost
its claim while it slept writes nothing more.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, ValidationError

from mad_efla import lease
from mad_efla.config import ConfigError, Document, Section
from mad_efla.run import RunConfig, build

Status = Literal["waiting", "running", "interrupted", "failed", "pruned", "diverged", "finished"]


class Scores(Section):
    """Metrics of one split; accuracies in [0, 1], loss in nats per scored token."""

    loss: float
    token_accuracy: float
    macro_accuracy: float


class ProbeScore(Section):
    """What became of one further test set, see `tasks.Probe`.

    Attributes:
        name: What was done to the test split.
        severity: How much of it.
        accuracy: Token accuracy, in [0, 1]; an answer that is not finite is wrong.
        finite: Share of scored positions with finite logits, in [0, 1].
    """

    name: str
    severity: float
    accuracy: float
    finite: float


class Result(Section):
    """How a run ended.

    Attributes:
        status: `diverged` when the loss stopped being finite; its scores are then None.
        test: Scores of the chosen weights on the test split.
        validation: Their scores on the validation split.
        chosen_step: The step whose weights were scored.
        steps: Optimiser steps made.
        stopped: Why the run ended before its budget, if it did: divergence, or a solved task.
        steps_to_90: First evaluated step with validation token accuracy of at least 0.9.
        ceiling: Share of scored test positions that can be answered at all, in [0, 1].
        parameters: Trained numbers.
        state_size: Numbers carried between tokens at the task's length, all layers.
        seconds: Wall time spent training and evaluating, all attempts.
        train_seconds: The part of it inside training steps.
        spent: Parts of the rest: data, model, evaluation, spectrum, logging, checkpoint.
        data_digest: Hash of the generated data.
        probes: How the chosen weights do on what the task tests beside its test split.
        environment: Backends, device, threads, library versions, git commit.
        started: Milliseconds since the epoch.
        ended: Milliseconds since the epoch.
    """

    fingerprint: str
    status: Literal["finished", "diverged"]
    test: Scores | None
    validation: Scores | None
    chosen_step: int | None
    steps: int
    stopped: str | None
    steps_to_90: int | None
    ceiling: float = 1.0
    parameters: int
    state_size: int
    seconds: float
    train_seconds: float
    spent: dict[str, float] = Field(default_factory=dict)
    data_digest: str
    probes: tuple[ProbeScore, ...] = ()
    environment: dict[str, str]
    started: int
    ended: int


class Failure(Section):
    """Why an attempt ended without a result.

    Attributes:
        kind: Whether it failed, was stopped, or was ended early by a search.
        reason: In a line.
        traceback: Of the error; empty where there was none.
        time: Milliseconds since the epoch.
        transient: Whether the cause lies outside of the run: memory, disk, a killed worker.
    """

    kind: Literal["failed", "interrupted", "pruned"]
    reason: str
    traceback: str
    time: int
    transient: bool = False


class Row(NamedTuple):
    """One logged step: metrics by name, and when (milliseconds since the epoch)."""

    step: int
    time: int
    metrics: dict[str, float]


class RunFolder:
    """The folder of one run.

    Args:
        out: The folder that holds all runs.
        fingerprint: Which run.

    Attributes:
        notes: Sentences for the user about what was found broken and set aside.
    """

    def __init__(self, out: Path, fingerprint: str):
        self.fingerprint = fingerprint
        self.path = out / fingerprint
        self.notes: list[str] = []
        self._claim: lease.Claim | None = None

    @property
    def figures(self) -> Path:
        """Where figures of the run are, if any were drawn."""
        return self.path / "figures"

    def create(self, run: RunConfig) -> None:
        """Make the folder and write the configuration into it, if it is not there."""
        self.path.mkdir(parents=True, exist_ok=True)
        config = self.path / "config.json"
        if not config.exists():
            write_json(config, run.model_dump(mode="json"))

    def run(self) -> RunConfig:
        """Read the configuration back.

        Raises:
            ConfigError: It is missing, broken, or not the one the folder is named after.
        """
        path = self.path / "config.json"
        data = _read_json(path)
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: cannot be read; run its sweep again to restore it")
        numbers = data.pop("numbers", None)
        data.pop("task_version", None)
        run = build(Document(data, {(): str(path)}, str(path)))
        if run.fingerprint != self.fingerprint:
            raise ConfigError(
                f"{path}: describes run {run.fingerprint}, not {self.fingerprint}; written by "
                f"another version (numbers={numbers}); move the folder away"
            )
        return run

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Hold the run while inside; yields False if another process holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim = lease.take(self.path)
        try:
            yield self._claim is not None
        finally:
            if self._claim:
                self._claim.release()
                self._claim = None

    def check_claim(self) -> None:
        """Raise `lease.Fenced` if the run was taken over from this process."""
        if self._claim:
            self._claim.check()

    def status(self) -> Status:
        """Say how the run stands, from its files and its lock."""
        result = self.result()
        if result:
            return result.status
        if not self.path.exists():
            return "waiting"
        if lease.is_held(self.path):
            return "running"
        failure = self.failure()
        if failure:
            return failure.kind
        return "interrupted" if (self.path / "metrics.jsonl").exists() else "waiting"

    # -------------------------------------------------------------- results

    def result(self) -> Result | None:
        """Read the result; a broken one is set aside and the run counts as not done."""
        return self._read("result.json", Result)

    def failure(self) -> Failure | None:
        """Read why the last attempt ended without a result."""
        return self._read("failure.json", Failure)

    def begin(self) -> None:
        """Forget how the last attempt ended; a new one starts."""
        self.check_claim()
        (self.path / "failure.json").unlink(missing_ok=True)
        for left in self.path.glob(".*.partial"):  # by a process that was killed
            left.unlink(missing_ok=True)

    def finish(self, result: Result) -> None:
        """Write the result; from here on the run is done."""
        self.check_claim()
        write_json(self.path / "result.json", result.model_dump(mode="json"))
        for name in ("failure.json", "checkpoint.pt", "checkpoint.previous.pt"):
            (self.path / name).unlink(missing_ok=True)

    def fail(
        self,
        kind: Literal["failed", "interrupted", "pruned"],
        reason: str,
        traceback: str,
        *,
        transient: bool = False,
    ) -> None:
        """Write why this attempt ended."""
        self.check_claim()
        failure = Failure(
            kind=kind, reason=reason, traceback=traceback, time=now(), transient=transient
        )
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "failure.json", failure.model_dump(mode="json"))

    def _read(self, name: str, model: Any) -> Any:
        path = self.path / name
        if not path.exists():
            return None
        try:
            found = model.model_validate_json(path.read_bytes())
            if getattr(found, "fingerprint", self.fingerprint) == self.fingerprint:
                return found
        except (ValidationError, ValueError):
            pass
        self._set_aside(path, "cannot be read; the run is made again")
        return None

    def _set_aside(self, path: Path, why: str) -> None:
        aside = next(
            p
            for i in range(1, 10_000)
            if not (p := path.with_name(f"{path.name}.broken-{i}")).exists()
        )
        path.rename(aside)
        self.notes.append(f"{path}: {why}; set aside as {aside.name}")

    # -------------------------------------------------------------- metrics

    def append(self, rows: list[Row]) -> None:
        """Append logged steps."""
        self.check_claim()
        with (self.path / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(row._asdict(), separators=(",", ":")) + "\n" for row in rows)

    def rows(self, offset: int = 0) -> tuple[list[Row], int]:
        """Read the complete lines from a byte offset.

        Returns:
            The rows, and the offset behind them.
        """
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                file.seek(offset)
                raw = file.read()
        except FileNotFoundError:
            return [], 0
        whole = raw[: raw.rfind(b"\n") + 1]
        rows = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, TypeError):  # a torn line is cut off on resume
                rows.append(Row(**json.loads(line)))
        return rows, offset + len(whole)

    # -------------------------------------------------------------- checkpoints

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write where to go on, keeping the previous checkpoint until this one is safe."""
        self.check_claim()
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            with metrics.open("a") as file:
                os.fsync(file.fileno())
        length = metrics.stat().st_size if metrics.exists() else 0
        buffer = io.BytesIO()
        torch.save(state | {"metrics_bytes": length}, buffer)
        raw = buffer.getvalue()
        current = self.path / "checkpoint.pt"
        if current.exists():
            os.replace(current, self.path / "checkpoint.previous.pt")
        write_bytes(current, hashlib.sha256(raw).digest() + raw)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole, and cut the metrics back to it."""
        raw = self.whole_checkpoint()
        state = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu") if raw else None
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            with metrics.open("r+b") as file:
                file.truncate(state["metrics_bytes"] if state else 0)
        return state

    def whole_checkpoint(self) -> bytes | None:
        """Read the newest checkpoint whose checksum is right; set broken ones aside."""
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            path = self.path / name
            if path.exists():
                raw = path.read_bytes()
                if hashlib.sha256(raw[32:]).digest() == raw[:32]:
                    return raw[32:]
                self._set_aside(path, "is broken; the run goes on from before it")
        return None

    def save_model(self, weights: dict[str, torch.Tensor]) -> None:
        """Write the scored weights."""
        self.check_claim()
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        write_bytes(self.path / "model.pt", buffer.getvalue())

    def load_model(self) -> dict[str, torch.Tensor]:
        """Read the scored weights."""
        return torch.load(self.path / "model.pt", weights_only=True, map_location="cpu")


def finished(out: Path, fingerprints: list[str]) -> dict[str, Result]:
    """Read the results there are, by fingerprint."""
    found = {f: RunFolder(out, f).result() for f in fingerprints}
    return {f: result for f, result in found.items() if result}


def given_up(out: Path, runs: Iterable[RunConfig]) -> set[str]:
    """Name the runs that failed by an error of their own, and would again, or were pruned."""
    found = {r.fingerprint: RunFolder(out, r.fingerprint).failure() for r in runs}
    return {f for f, x in found.items() if x and x.kind != "interrupted" and not x.transient}


def mend(out: Path, fingerprints: list[str]) -> list[str]:
    """Set aside what is broken in the folders of runs; return what was found, for the user."""
    notes = []
    for fingerprint in fingerprints:
        folder = RunFolder(out, fingerprint)
        if folder.path.exists() and folder.result() is None:
            with folder.lock() as free:
                if free:
                    folder.whole_checkpoint()
        notes += folder.notes
    return notes


# ------------------------------------------------------------------ sweeps


class SweepRecord(Section):
    """Which runs a sweep is made of.

    Attributes:
        id: Hash of what defines it.
        task: The task's name: the MLflow experiment.
        plan: The plan's name.
        protocol: The protocol of its runs.
        command: What the user typed.
        fingerprints: Its runs, in the order of the plan.
        started: Milliseconds since the epoch, of the first call.
        ended: Of the last call's end; None while it runs or after a kill.
    """

    id: str
    task: str
    plan: str
    protocol: str
    command: str
    fingerprints: tuple[str, ...]
    started: int
    ended: int | None


def write_sweep(out: Path, record: SweepRecord) -> None:
    """Write a sweep's record."""
    (out / "sweeps").mkdir(parents=True, exist_ok=True)
    write_json(out / "sweeps" / f"{record.id}.json", record.model_dump(mode="json"))


def sweep_figures(out: Path, identity: str) -> Path:
    """Say where figures of a sweep are, if any were drawn."""
    return out / "sweeps" / identity


def read_sweeps(out: Path) -> list[SweepRecord]:
    """Read the records of all sweeps under `out`, oldest first; unreadable ones are left out."""
    records = []
    for path in (out / "sweeps").glob("*.json"):
        with contextlib.suppress(ValidationError, ValueError):
            records.append(SweepRecord.model_validate_json(path.read_bytes()))
    return sorted(records, key=lambda r: (r.started, r.id))


# ------------------------------------------------------------------ files


def ensure_writable(out: Path) -> None:
    """Make the folder for runs.

    Raises:
        ConfigError: It cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{secrets.token_hex(8)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror}); choose another folder"
        ) from None


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file atomically."""
    write_bytes(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, raw: bytes) -> None:
    """Replace a file atomically: afterwards it is the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def now() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
