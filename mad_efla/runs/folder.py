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

Whole files are replaced atomically. What turns out broken is set aside under a name of its own and
reported, never deleted. One process at a time holds a run, by a claim (`claims.py`): whoever lost
its claim while it slept writes nothing more.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from mad_efla.config import ConfigError, Document
from mad_efla.plan.run import RunConfig, build, check_code
from mad_efla.runs import claims
from mad_efla.runs.files import now, read_json, sync, write_bytes, write_json
from mad_efla.runs.schema import Failure, Result, Row, Status

_READ: dict[str, Any] = {"result.json": Result, "failure.json": Failure}
_BROKEN = "cannot be read; its sweep makes the run again"
_NEWER = "was written by a newer version, with fields that this one does not know; update mad-efla"


class RunFolder:
    """The folder of one run.

    Args:
        out: The folder that holds all runs.
        fingerprint: Which run.

    Attributes:
        notes: Sentences for the user about what cannot be read, and what was set aside.
    """

    def __init__(self, out: Path, fingerprint: str):
        self.fingerprint = fingerprint
        self.path = out / fingerprint
        self.notes: list[str] = []
        self._claim: claims.Claim | None = None

    @property
    def figures(self) -> Path:
        """Where figures of the run are, if any were drawn."""
        return self.path / "figures"

    def create(self, run: RunConfig) -> None:
        """Make the folder and write the configuration into it, unless it is there and whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        config = self.path / "config.json"
        if not isinstance(read_json(config), dict):
            if config.exists():
                self._set_aside(config, "cannot be read; it is written again")
            write_json(config, run.model_dump(mode="json"))

    def run(self) -> RunConfig:
        """Read the configuration back.

        Raises:
            ConfigError: It is missing, broken, or not the one the folder is named after.
        """
        path = self.path / "config.json"
        data = read_json(path)
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
        self._claim = claims.take(self.path)
        try:
            yield self._claim is not None
        finally:
            if self._claim:
                self._claim.release()
                self._claim = None

    def check_claim(self) -> None:
        """Raise `claims.Fenced` if the run was taken over from this process."""
        if self._claim:
            self._claim.check()

    def status(self) -> Status:
        """Say how the run stands, from its files and its lock."""
        result = self.result()
        if result:
            return result.status
        if not self.path.exists():
            return "waiting"
        if claims.is_held(self.path):
            return "running"
        failure = self.failure()
        if failure:
            return failure.kind
        return "interrupted" if (self.path / "metrics.jsonl").exists() else "waiting"

    # -------------------------------------------------------------- results

    def result(self) -> Result | None:
        """Read the result; None, and a note, for one that cannot be read. Nothing is touched."""
        return self._read("result.json", Result)

    def failure(self) -> Failure | None:
        """Read why the last attempt ended without a result; as `result`."""
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
        self, kind: Literal["failed", "interrupted", "pruned"], reason: str, traceback: str, *, transient: bool = False
    ) -> bool:
        """Write why the last attempt ended, under this process's claim, or under one for the moment.

        Returns:
            False where another process holds the run: then nothing is written.
        """
        if self._claim is None:
            with self.lock() as free:
                return free and self.fail(kind, reason, traceback, transient=transient)
        self.check_claim()
        failure = Failure(kind=kind, reason=reason, traceback=traceback, time=now(), transient=transient)
        write_json(self.path / "failure.json", failure.model_dump(mode="json"))
        return True

    def refuse_newer(self) -> None:
        """Make sure that an older version does not take a newer one's files for broken.

        Raises:
            ConfigError: There is a file with fields that this version does not know.
        """
        for name, model in _READ.items():
            if self._examine(name, model)[1] == _NEWER:
                raise ConfigError(f"{self.path / name}: {_NEWER}, or name another --out")

    def quarantine(self) -> None:
        """Set aside what is broken; only whoever holds the run may.

        Raises:
            ConfigError: As `refuse_newer`.
        """
        self.refuse_newer()
        for name, model in _READ.items():
            if self._examine(name, model)[1] == _BROKEN:
                self._set_aside(self.path / name, _BROKEN)

    def _read(self, name: str, model: Any) -> Any:
        found, problem = self._examine(name, model)
        if problem and (note := f"{self.path / name}: {problem}") not in self.notes:
            self.notes.append(note)
        return found

    def _examine(self, name: str, model: Any) -> tuple[Any, str]:
        """Read a file; return what it holds, or what is wrong with it."""
        try:
            found = model.model_validate_json((self.path / name).read_bytes())
        except FileNotFoundError:
            return None, ""
        except OSError as error:
            return None, error.strerror or str(error)
        except ValidationError as error:
            unknown = all(e["type"] == "extra_forbidden" for e in error.errors())
            return None, _NEWER if unknown else _BROKEN
        if getattr(found, "fingerprint", self.fingerprint) != self.fingerprint:
            return None, _BROKEN
        return found, ""

    def _set_aside(self, path: Path, why: str) -> None:
        aside = next(p for i in range(1, 10_000) if not (p := path.with_name(f"{path.name}.broken-{i}")).exists())
        path.rename(aside)
        self.notes.append(f"{path}: {why}; set aside as {aside.name}")

    # -------------------------------------------------------------- metrics

    def append(self, rows: list[Row]) -> None:
        """Append logged steps."""
        self.check_claim()
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
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
        except OSError:
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
            with metrics.open("ab") as file:
                sync(file.fileno())
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
        """Read the scored weights.

        Raises:
            ConfigError: They cannot be read, or the code of a plug-in is not the one they are of.
        """
        check_code(self.run())
        path = self.path / "model.pt"
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # whatever torch makes of a file that is cut
            raise ConfigError(
                f"{path}: cannot be read ({type(error).__name__}); move {self.path} away and run its sweep again"
            ) from None


def finished(out: Path, fingerprints: list[str]) -> dict[str, Result]:
    """Read the results there are, by fingerprint."""
    found = {f: RunFolder(out, f).result() for f in fingerprints}
    return {f: result for f, result in found.items() if result}


def permanently_failed(out: Path, runs: Iterable[RunConfig]) -> set[str]:
    """Name the runs that failed by an error of their own, and would again, or were pruned."""
    found = {r.fingerprint: RunFolder(out, r.fingerprint).failure() for r in runs}
    return {f for f, x in found.items() if x and x.kind != "interrupted" and not x.transient}


def quarantine_broken(out: Path, fingerprints: list[str]) -> list[str]:
    """Set aside what is broken in the folders of runs; return what was found, for the user.

    Raises:
        ConfigError: A newer version wrote there; nothing was touched.
    """
    folders = [RunFolder(out, fingerprint) for fingerprint in fingerprints]
    for folder in folders:
        folder.refuse_newer()
    notes = []
    for folder in folders:
        if folder.path.exists() and folder.result() is None:
            folder.notes.clear()
            with folder.lock() as free:
                if free:
                    folder.quarantine()
                    folder.whole_checkpoint()
        notes += folder.notes
    return notes
