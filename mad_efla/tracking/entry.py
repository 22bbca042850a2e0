"""One run in MLflow, of a cell or a sweep, told only what it has not been told.

Nothing is remembered beside MLflow itself: the last step of each metric is asked for once, and only
later steps are sent. So a replay doubles nothing; and where a run went back to its checkpoint and
made steps again, what the first attempt reported stays.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mad_efla.config import digest
from mad_efla.plan.run import RunConfig
from mad_efla.tracking.records import Point, parameters
from mad_efla.tracking.stores import in_time

BATCH = 1000  # metrics in one request, and runs in one answer: the most that MLflow takes
_PARAMETERS = 100  # in one request, likewise


@dataclass
class Entry:
    """A run as MLflow has it.

    Attributes:
        client: MLflow's client.
        run_id: MLflow's name for the run.
        status: RUNNING, FINISHED, FAILED or KILLED.
        deleted: The user deleted it in MLflow; it stays so.
        tags: What it is tagged with.
        metrics: Names of the metrics it had when it was found.
        steps: Last step of each metric; None until `learn`.
        seen: How its folder looked when it was mirrored.
    """

    client: Any
    run_id: str
    status: str
    deleted: bool
    tags: dict[str, str]
    metrics: list[str]
    steps: dict[str, int] | None = None
    seen: object = None

    @classmethod
    def of(cls, client: Any, run: Any) -> "Entry":
        """Take over what MLflow says of a run."""
        return cls(
            client,
            run.info.run_id,
            status=run.info.status,
            deleted=run.info.lifecycle_stage == "deleted",
            tags=dict(run.data.tags),
            metrics=list(run.data.metrics),
        )

    def configure(self, run: RunConfig) -> None:
        """Log every field, as parameters and as `config.json`."""
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in parameters(run).items()]
        for start in range(0, len(params), _PARAMETERS):
            self.client.log_batch(self.run_id, params=params[start : start + _PARAMETERS])
        self.write("config.json", json.dumps(run.model_dump(mode="json"), indent=1))

    def learn(self) -> None:
        """Ask for the last step of each metric."""
        histories = {m: self.client.get_metric_history(self.run_id, m) for m in self.metrics}
        self.steps = {m: max(point.step for point in found) for m, found in histories.items()}

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
            self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
            steps.update((point.name, point.step) for point in batch)

    def tag(self, tags: dict[str, str]) -> None:
        """Set the tags that are not so yet."""
        from mlflow.entities import RunTag

        fresh = {key: text for key, text in tags.items() if self.tags.get(key) != text}
        if fresh:
            self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in fresh.items()])
            self.tags |= fresh

    def write(self, name: str, text: str) -> None:
        """Write an artifact."""
        self.client.log_text(self.run_id, text, name)

    def attach(self, folder: Path) -> None:
        """Upload the figures in a folder, again once they were drawn again."""
        files = sorted(folder.glob("[!.]*"))
        looks = [(f.name, s.st_size, s.st_mtime_ns) for f in files for s in [f.stat()]]
        if not files or self.deleted or self.tags.get("mad.figures") == digest(str(looks)):
            return
        for file in files:
            self.client.log_artifact(self.run_id, str(file), "figures")
        self.tag({"mad.figures": digest(str(looks))})

    def trained_on(self, run: RunConfig, digest: str) -> None:
        """Log the generated data by its digest: equal digests, equal tokens."""
        from mlflow.entities import Dataset, DatasetInput

        made_from = {"task": run.task.model_dump(mode="json"), "seed": run.seed}
        dataset = Dataset(
            name=run.task.name,
            digest=digest,
            source_type="generated",
            source=json.dumps(made_from),
            profile=json.dumps(run.data.model_dump()),
        )
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [])])

    def stand(self, status: str, ended: int) -> None:
        """Set the status; one that ends the run also says when."""
        if self.status == status or self.deleted:
            return
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status, ended)
        self.status = status
