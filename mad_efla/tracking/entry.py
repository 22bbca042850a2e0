"""One run in MLflow, of a cell or a sweep, told only what it has not been told.

Nothing is remembered beside MLflow itself: the last step of each metric is asked for once, and only
later steps are sent. So a replay doubles nothing; and where a run went back to its checkpoint and
made steps again, what the first attempt reported stays.

What MLflow refuses costs only itself: a batch that is refused is sent in halves, down to the item.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mad_efla.config import digest
from mad_efla.plan.run import RunConfig
from mad_efla.tracking import records
from mad_efla.tracking.problems import in_time, is_refusal, reason
from mad_efla.tracking.records import Point

BATCH = 1000  # metrics in one request, and runs in one answer: the most that MLflow takes
_PARAMETERS = 100  # in one request, likewise


class Deleted(Exception):
    """The user has deleted the run in MLflow."""


@dataclass
class Entry:
    """A run as MLflow has it.

    Attributes:
        client: MLflow's client.
        run_id: MLflow's name for the run.
        status: RUNNING, FINISHED, FAILED or KILLED.
        deleted: The user deleted it in MLflow; it stays so.
        started: When it started, in milliseconds since the epoch.
        place: Where its artifacts are.
        tags: What it is tagged with.
        metrics: Names of the metrics it had when it was found.
        steps: Last step of each metric; None until `learn`.
        seen: How its folder looked when it was mirrored.
        refused: Sentences on what MLflow does not take of it.
    """

    client: Any
    run_id: str
    status: str
    deleted: bool
    started: int
    place: str
    tags: dict[str, str]
    metrics: list[str]
    steps: dict[str, int] | None = None
    seen: object = None
    refused: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, client: Any, run: Any) -> "Entry":
        """Take over what MLflow says of a run."""
        return cls(
            client,
            run.info.run_id,
            status=run.info.status,
            deleted=run.info.lifecycle_stage == "deleted",
            started=run.info.start_time or 0,
            place=run.info.artifact_uri or "",
            tags=dict(run.data.tags),
            metrics=list(run.data.metrics),
        )

    def configure(self, run: RunConfig) -> None:
        """Log every field as a parameter."""
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in records.parameters(run).items()]
        for start in range(0, len(params), _PARAMETERS):
            self._send("params", params[start : start + _PARAMETERS])

    def learn(self) -> None:
        """Ask for the last step of each metric."""
        histories = {m: self.client.get_metric_history(self.run_id, m) for m in self.metrics}
        self.steps = {m: max(point.step for point in found) for m, found in histories.items() if found}

    def log(self, points: list[Point], deadline: float) -> None:
        """Log what is beyond the last steps, and finite.

        Raises:
            Late: The deadline has passed.
        """
        from mlflow.entities import Metric

        steps = {} if self.steps is None else self.steps
        fresh = [p for p in points if p.step > steps.get(p.name, -1) and math.isfinite(p.value)]
        for start in range(0, len(fresh), BATCH):
            in_time(deadline)
            batch = fresh[start : start + BATCH]
            self._send("metrics", [Metric(*point) for point in batch])
            steps.update((point.name, point.step) for point in batch)

    def tag(self, tags: dict[str, str]) -> None:
        """Set the tags that are not so yet."""
        from mlflow.entities import RunTag

        fresh = {key: text for key, text in records.fit(tags).items() if self.tags.get(key) != text}
        if fresh and not self.deleted:
            self._send("tags", [RunTag(k, v) for k, v in fresh.items()])
            self.tags |= fresh

    def untag(self, name: str) -> None:
        """Take a tag away."""
        if self.tags.pop(name, None) is not None:
            self.client.delete_tag(self.run_id, name)

    def _send(self, kind: str, items: Sequence[Any]) -> None:
        """Send a batch; of one that is refused, all but the items that are.

        Raises:
            Deleted: The run is no longer there.
        """
        try:
            self.client.log_batch(self.run_id, **{kind: items})
        except Exception as error:
            if not is_refusal(error):
                raise
            self.check()
            if len(items) == 1:
                self.refused.append(f"{kind[:-1]} {items[0].key!r} is refused by MLflow ({reason(error, self.run_id)})")
                return
            half = len(items) // 2
            self._send(kind, items[:half])
            self._send(kind, items[half:])

    def check(self) -> None:
        """Raise `Deleted` if the run is no longer there."""
        try:
            if self.client.get_run(self.run_id).info.lifecycle_stage == "active":
                return
        except Exception as error:
            if not is_refusal(error):
                raise
        raise Deleted

    def attempt(self, what: str, call: Callable[[], object]) -> None:
        """Make a call for one item; if MLflow refuses it, note that and go on."""
        try:
            call()
        except Exception as error:
            if not is_refusal(error):
                raise
            self.check()
            self.refused.append(f"{what} is refused by MLflow ({reason(error, self.run_id)})")

    def write(self, name: str, text: str) -> None:
        """Write an artifact."""
        self.client.log_text(self.run_id, text, name)

    def withdraw(self, name: str) -> None:
        """Delete an artifact, if it is there; where none can be deleted, say in it that it no longer holds."""
        if name not in [file.path for file in self.client.list_artifacts(self.run_id)]:
            return
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        try:
            get_artifact_repository(self.place, tracking_uri=self.client.tracking_uri).delete_artifacts(name)
        except Exception:  # a store that only adds, or a role that may not delete
            self.write(name, "It was of an earlier attempt; the run has gone on since.\n")

    def attach(self, files: list[Path], look: str) -> None:
        """Upload figures, and note how they look."""
        for file in files:
            self.client.log_artifact(self.run_id, str(file), "figures")
        self.tag({"mad.figures": look})

    def trained_on(self, run: RunConfig, digest: str) -> None:
        """Log the generated data by its digest: equal digests, equal tokens."""
        from mlflow.entities import Dataset, DatasetInput

        made_from = {"task": run.task.model_dump(mode="json"), "seed": run.seed}
        dataset = Dataset(
            name=run.task.name[:500],
            digest=digest[:36],
            source_type="generated",
            source=json.dumps(made_from)[:65_535],
            profile=json.dumps(run.data.model_dump()),
        )
        self.attempt("its data set", lambda: self.client.log_inputs(self.run_id, [DatasetInput(dataset, [])]))

    def set_status(self, status: str, ended: int) -> None:
        """Set the status; one that ends the run also says when."""
        if self.status == status or self.deleted:
            return
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status, ended)
        self.status = status


def fresh_figures(entry: Entry, folder: Path) -> tuple[list[Path], str]:
    """Return the figures in a folder, and a digest of their looks; none that MLflow has as they are."""
    files = sorted(folder.glob("[!.]*"))
    look = digest(str([(f.name, s.st_size, s.st_mtime_ns) for f in files for s in [f.stat()]]))
    return ([], look) if entry.tags.get("mad.figures") == look else (files, look)
