"""What accuracy depends on: one field of the setting, the learning rate, the step of a training."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from mad_efla import config
from mad_efla.analysis.cells import Cell
from mad_efla.analysis.leaderboard import TaskScore, leaderboard
from mad_efla.analysis.statistics import Interval, interval
from mad_efla.plan.expand import flatten
from mad_efla.plan.run import RunConfig
from mad_efla.runs.read import Group

_EVALUATIONS = 60  # points of a learning curve at most


class Axis(NamedTuple):
    """A field in which settings differ while all else is equal.

    Attributes:
        field: Of the task or its data, as in `task.seq_len`.
        others: What else tells this axis from others of the same field, as in `vocab_size=8`.
        settings: Values of the field, rising, with the labels of the settings that have them.
    """

    field: str
    others: str
    settings: list[tuple[Any, str]]


def axes(settings: dict[str, RunConfig]) -> Iterator[Axis]:
    """Find the fields of task and data along which settings differ in nothing else.

    Args:
        settings: A run of each setting, by the setting's label.
    """
    flat = {label: _condition_fields(run) for label, run in settings.items()}
    for field in dict.fromkeys(f for fields in flat.values() for f in fields):
        groups: dict[str, dict[Any, str]] = {}
        for label, fields in flat.items():
            if field.split(".")[0] in ("task", "data") and field in fields:
                rest = config.canonical_json({k: v for k, v in fields.items() if k != field})
                groups.setdefault(rest, {})[_plain(fields[field])] = label
        found = [group for group in groups.values() if len(group) > 1]
        for group in found:
            here = flat[next(iter(group.values()))]
            others = [flat[next(iter(other.values()))] for other in found]
            apart = [f for f in here if f != field and any(o.get(f) != here[f] for o in others)]
            told = ", ".join(f"{f.split('.')[-1]}={here[f]}" for f in apart)
            yield Axis(field, told, sorted(group.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _condition_fields(run: RunConfig) -> dict[str, Any]:
    sections = ("task.", "data.", "model.", "train.")
    return {name: value for name, value in flatten(run).items() if name.startswith(sections)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def by_learning_rate(group: Group) -> dict[float, list[TaskScore]]:
    """Score the runs of a group at each learning rate by itself.

    Where points are chosen on seeds of their own, these seeds alone: the others are made at one rate.
    """
    runs = group.runs
    rates = sorted({runs[p.fingerprint].optim.lr for p in group.planned if p.fingerprint in runs})
    return {rate: leaderboard(_at_rate(group, rate)).tasks for rate in rates}


def _at_rate(group: Group, rate: float) -> Group:
    apart = any(p.chooses for p in group.planned)
    kept = [
        p.model_copy(update={"chooses": False})
        for p in group.planned
        if p.fingerprint in group.runs and group.runs[p.fingerprint].optim.lr == rate
        if p.chooses == apart and not p.check
    ]
    return group._replace(planned=kept)


def validation(cell: Cell, group: Group) -> dict[int, Interval]:
    """Average validation accuracy over seeds, by the steps at which some run of a cell has one.

    A run that stopped early keeps its last accuracy, and one that diverged has none left.
    """
    tracks = []
    for run, result in zip(cell.runs, cell.results, strict=True):
        rows, _ = group.folders[run.fingerprint].rows()
        track = {r.step: v for r in rows if (v := r.metrics.get("val/token_accuracy")) is not None}
        if result.status == "diverged":
            track[result.steps] = 0.0
        if track:
            tracks.append(track)
    if not tracks:
        return {}
    first = max(min(track) for track in tracks)
    steps = sorted({step for track in tracks for step in track if step >= first})
    every = math.ceil(len(steps) / _EVALUATIONS)
    kept = steps[::-1][::every][::-1]
    return {at: interval([track[max(s for s in track if s <= at)] for track in tracks]) for at in kept}
