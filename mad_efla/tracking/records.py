"""What MLflow is told of a run and of a sweep: parameters, numbers, tags, names, tables, notes.

Every field is a parameter, constants too: whoever reads a run, or searches for one, expects it
whole. The versions of code and task, which nobody compares runs by, are tags.

Names follow from what MLflow's page does with them. Sections of charts are sorted by the prefix of
the metric, so what matters less than `test/` has a prefix that comes later. Parallel coordinates
open on the first three parameters in which runs differ, so the mixer's own fields, which another
mixer does not have, are `token_mixer.*` and come behind `optim.lr`, `seed` and `setting`.
"""

import csv
import getpass
import io
import json
import math
import posixpath
import re
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mad_efla.analysis import corruption
from mad_efla.analysis.cells import Cell
from mad_efla.config import digest
from mad_efla.plan.run import RunConfig
from mad_efla.runs.schema import Result, Row, Status, SweepRecord
from mad_efla.tasks._corruptions import NEUTRAL

PRIMARY = "test/token_accuracy"
ACCURACIES = (PRIMARY, "val/token_accuracy")
MLFLOW_STATUS: dict[Status, str] = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "pruned": "KILLED",
}
ARTIFACTS, MISSING, COMPLETE = "mad.artifacts", "missing", "complete"  # the tag on its files, and its values
NOTE = "mlflow.note.content"
_SCORES = ("token_accuracy", "macro_accuracy", "sequence_accuracy", "loss")
_NUMBERS = ("steps_to_90", "steps", "seconds", "parameters", "state_size")


class Point(NamedTuple):
    """One value of a metric; the time is in milliseconds since the epoch."""

    name: str
    value: float
    time: int
    step: int


NAME, VALUE, TAG, TITLE = 250, 6_000, 8_000, 250  # characters that MLflow takes: names, parameters, tags, runs' names


def name(text: str) -> str:
    """Return a name that MLflow takes for a parameter, metric or tag: as it is, if it can be.

    A character that is refused becomes its code point, `@` for example `_u40_`, so that the name can be
    read back and no two names become one. Only where it is too long a digest stands for its end.
    """
    found = re.sub(r"[^\w./: -]|_(?=u[0-9a-f]+_)", _code_point, text) or "_u0_"
    plain = posixpath.normpath(found)
    if plain != found or plain == "." or plain.startswith(("..", "/")):  # as a path it would be another one
        found = re.sub(r"[./]", _code_point, found)
    return found if len(found) <= NAME else f"{found[: NAME - 17]}_{digest(text)}"


def _code_point(found: re.Match[str]) -> str:
    return f"_u{ord(found[0]):x}_"


def cut(text: str, length: int) -> str:
    """Cut a text that is too long, and show that it was cut; the run folder has it whole."""
    return text if len(text) <= length else f"{text[: length - 2]} …"


def fit(tags: dict[str, str]) -> dict[str, str]:
    """Return tags as MLflow takes them."""
    return {name(key): cut(text, TAG) for key, text in tags.items()}


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
    return {name(key): cut(str(value), VALUE) for key, value in flat.items()}


def summary(result: Result) -> dict[str, float]:
    """Return a result's numbers, the primary score first; a run that diverged has no scores."""
    found: dict[str, float | None] = {}
    if result.test:
        found = {f"test/{score}": getattr(result.test, score, None) for score in _SCORES}
    if result.validation:
        found |= {f"val_chosen/{score}": getattr(result.validation, score, None) for score in _SCORES}
    for number in _NUMBERS:
        found[f"total/{number}"] = getattr(result, number)
    for probe, curve in corruption.curves(result).items():
        found[f"test_area/{probe}"] = corruption.mean_accuracy(*curve)
        found[f"test_half/{probe}"] = corruption.half_accuracy_severity(*curve, NEUTRAL.get(probe, 0.0))
    found["total/diverged"] = float(result.status == "diverged")
    return {k: float(v) for k, v in found.items() if v is not None and math.isfinite(v)}


def points(rows: Iterable[Row], result: Result | None) -> list[Point]:
    """Return every value there is of a run: its result's numbers, then its curves.

    Those under corruption have a hundredth of the severity for a step. Of a step that was logged twice
    the later values count.
    """
    found = []
    if result:
        found = [Point(name(k), v, result.ended, 0) for k, v in summary(result).items()]
        for probe in result.probes:
            step = round(100 * probe.severity)
            found.append(Point(name(f"test_under/{probe.name}"), probe.accuracy, result.ended, step))
    curves = {
        (k, row.step): Point(name(k), float(v), row.time, row.step) for row in rows for k, v in row.metrics.items()
    }
    return found + list(curves.values())


def cell_tags(run: RunConfig, owner: str) -> dict[str, str]:
    """Return what a run is found by, and by whom and what it was made.

    Args:
        run: Which run.
        owner: The word of the folder of runs it was made in.
    """
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
    return tags | _source(owner)


def result_tags(result: Result) -> dict[str, str]:
    """Return how a run ended, and in which surroundings."""
    tags = {f"mad.env.{what}": value for what, value in result.environment.items()}
    commit = result.environment.get("git_commit", "").removesuffix("+")
    if re.fullmatch(r"[0-9a-f]{40}", commit):
        tags["mlflow.source.git.commit"] = commit
    tags["mad.data_digest"] = result.data_digest
    for what in ("stopped", "chosen_step"):
        if getattr(result, what) is not None:
            tags[f"mad.{what}"] = str(getattr(result, what))
    if result.state_size is None:  # a metric holds numbers only
        tags["mad.state_size"] = "unknown"
    if result.status == "diverged":
        tags[NOTE] = f"Diverged: {result.stopped}."
    return tags


def names(runs: list[RunConfig]) -> dict[str, str]:
    """Name runs by mixer, setting, the fields in which equally named ones differ, and seed."""
    flat = {r.fingerprint: parameters(r) for r in runs}
    alike: dict[tuple[str, str], list[RunConfig]] = {}
    for run in runs:
        alike.setdefault((run.mixer, run.setting), []).append(run)
    named = {}
    for (mixer, setting), group in alike.items():
        first = flat[group[0].fingerprint]
        varied = [
            key
            for key in first
            if key not in ("seed", "optim.lr_log10") and any(flat[r.fingerprint][key] != first[key] for r in group)
        ]
        for run in group:
            point = [f"{k.split('.')[-1]}={flat[run.fingerprint][k]}" for k in varied]
            named[run.fingerprint] = _title([mixer, setting, *point], f"seed {run.seed}")
    return named


def _title(words: list[str], seed: str) -> str:
    return f"{cut(' '.join(words), TITLE - len(seed) - 1)} {seed}"


def sweep_tags(record: SweepRecord, owner: str) -> dict[str, str]:
    """Return what a sweep is found by; as `cell_tags`."""
    tags = {
        "mad.role": "sweep",
        "mad.sweep": record.id,
        "mad.protocol": record.protocol,
        "mad.task": record.task,
        "mad.plan": record.plan,
        "mad.command": record.command,
    }
    return tags | _source(owner)


def sweep_status(statuses: Counter[Status], *, live: bool) -> str:
    """Return a sweep's status in MLflow, from the counts of its runs by status."""
    if live or statuses["running"]:
        return "RUNNING"
    if statuses["waiting"] + statuses["interrupted"]:
        return "KILLED"
    return "FAILED" if statuses["failed"] else "FINISHED"


def counts(statuses: Counter[Status]) -> str:
    """Write the counts of runs by status: `1 failed, 3 finished`."""
    return ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))


def sweep_points(statuses: Counter[Status], time: int) -> list[Point]:
    """Return the counts of a sweep's runs by status, as metrics."""
    return [Point(f"sweep/{status}", float(statuses[status]), time, 0) for status in MLFLOW_STATUS]


HEADER = (
    "setting",
    "mixer",
    "grid point",
    "seeds",
    "accuracy",
    "low",
    "high",
    "macro accuracy",
    "sequence accuracy",
    "loss",
    "parameters",
    "state size",
    "steps to 90 %",
    "seconds",
    "note",
)
# The columns that fit beside MLflow's own.
_NOTED = ("setting", "mixer", "grid point", "seeds", "accuracy", "low", "high", "loss", "note")


def sweep_note(record: SweepRecord, statuses: Counter[Status], found: list[Cell], verdict: Sequence[str] = ()) -> str:
    """Write a sweep's page: its counts, its verdict, its leaderboard, and the command that made it."""
    rows = [["" if v is None else str(v) for v in row] for row in leaderboard(found)]
    table = [HEADER, ["---"] * len(HEADER), *rows]
    columns = [HEADER.index(c) for c in _NOTED]
    lines = ["| " + " | ".join(row[c] for c in columns) + " |" for row in table]
    said = cut("\n\n".join(verdict), TAG // 2)
    head, foot = f"Protocol {record.protocol}: {counts(statuses)}.\n\n{said}\n\n", f"\n\n`{cut(record.command, 1_000)}`"
    left = 0
    while len(text := head + "\n".join(lines) + _more(left) + foot) > TAG and len(lines) > 2:
        lines.pop()
        left += 1
    return text


def _more(rows: int) -> str:
    return f"\n\n{rows} rows more in leaderboard.csv" if rows else ""


def leaderboard(found: list[Cell]) -> list[list[str | float | None]]:
    """Return the rows of a sweep's table below `HEADER`; accuracies in [0, 1], four digits."""
    rows: list[list[str | float | None]] = []
    for cell in found:
        scores = (*(cell.accuracy or (None,) * 3), cell.macro_accuracy, cell.sequence_accuracy, cell.loss)
        point = ", ".join(f"{k.split('.')[-1]}={v}" for k, v in cell.point.items())
        note = "; ".join(filter(None, (cell.missing, cell.note)))
        numbers = [None if n is None else round(n, 4) for n in scores]
        rows.append(
            [
                cell.setting,
                cell.mixer,
                point,
                len(cell.seeds),
                *numbers,
                cell.parameters,
                "unknown" if cell.state_size is None else cell.state_size,
                cell.steps_to_90,
                round(cell.seconds, 1),
                note,
            ]
        )
    return rows


def leaderboard_csv(found: list[Cell]) -> str:
    """Write all columns of a leaderboard."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *leaderboard(found)])
    return text.getvalue()


def leaderboard_json(found: list[Cell]) -> str:
    """Write a leaderboard as `mlflow.load_table` reads it; numbers are numbers."""
    return json.dumps({"columns": HEADER, "data": leaderboard(found)})


CORRUPTION_HEADER = (
    "setting",
    "mixer",
    "seeds",
    "corruption",
    "clean",
    "area",
    "low",
    "high",
    "halves at",
    "least",
    "largest",
)


def corruption_json(arms: list[corruption.Arm]) -> str:
    """Write what becomes of each mixer under each corruption, as `mlflow.load_table` reads it.

    `area` has Student's interval over seeds, `halves at` the least and largest of them; none where
    accuracy never halves.
    """
    rows = []
    for arm in arms:
        for probe, curve in arm.curves.items():
            halves = [h if math.isfinite(h) else None for h in curve.half]
            label = [arm.setting, arm.mixer, len(arm.runs), probe, arm.clean.mean]
            rows.append([*label, *curve.area, *halves])
    return json.dumps({"columns": CORRUPTION_HEADER, "data": rows})


TABLE_TAG = {"mlflow.loggedArtifacts": '[{"path": "leaderboard.json", "type": "table"}]'}
"""What `mlflow.log_table` tags a run with, so that the page shows its table."""


EXPERIMENT_NOTE = """\
Runs of the task **{task}**, mirrored by mad-efla from its run folders.

A *sweep* is a parent run; its *cells* (tag `mad.role` = `cell`) are one training run each.

| metric | meaning |
|---|---|
| `test/token_accuracy` | the score: right answers on the test split, in [0, 1] |
| `test/macro_accuracy` | the same, averaged over the answers' classes |
| `test/sequence_accuracy` | share of sequences with all answers right |
| `test/loss` | nats per scored token |
| `total/steps_to_90` | first evaluated step with validation accuracy of at least 0.9 |
| `total/state_size` | numbers the mixers carry from token to token |
| `total/diverged` | 1 where the loss stopped being finite |
| `train/...`, `val/...` | curves over steps |
| `test_under/...` | accuracy on corrupted test data; the step is 100 times the severity |
| `test_area/...` | the mean of that curve; `test_half/...` the severity at which it has halved |
| `val_chosen/...` | the validation split under the weights that were scored |
| `spectrum/eigenvalue_mean` | share of the state that a token keeps along its key |
| `spectrum/saturated`, `.../beyond_euler` | share of tokens with x > 4, and with x > 2 |
| `spectrum/horizon_p50` | tokens after which half of the heads have forgotten, at most L/2 |
| `spectrum/horizon_beyond` | share of heads that remember longer than that |
| `spectrum/state_effective_rank` | directions of the state in use at the end of a sequence |
| `spectrum/state_capacity_used` | the same as a share of what the state could hold |
| `spectrum/reach_distance`, `.../reach_entropy` | how far back and how widely attention looks |
| `spectrum/effective_remembrance_p50` | how much the last answer owes to the first half, in [0, 1] |

Scores of different protocols (tag `mad.protocol`) are not comparable. Runs of one folder share the
tag `mad.owner`; the same run made by two people is two runs here.
"""


def _source(owner: str) -> dict[str, str]:
    """Say whose an entry is, and fill the columns that MLflow's own clients fill."""
    return {
        "mad.owner": owner,
        "mad.host": socket.gethostname(),
        ARTIFACTS: MISSING,
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": "mad-efla",
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return "unknown"
