"""The layers of every run of a request, laid over each other: what a run is built from.

A setting, a mixer, a point of the grid and a seed make a cell each; where a search proposes the
points, a setting and a mixer do.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mad_efla import config
from mad_efla.config import ConfigError, Document, suggest
from mad_efla.plan import grid
from mad_efla.plan.fields import Address, Change
from mad_efla.plan.request import Request, changes


class Cell(NamedTuple):
    """What one run is built from, as documents and changes.

    Attributes:
        document: All layers but the mixers.
        label: The setting's label.
        index: The mixer's number in the plan.
        changes: The grid point, and what `--set` says; later wins.
        seed: The run's seed.
        chooses: Whether the run only chooses a grid point.
        choosing: Whether any run of the sweep does.
        place: Where the seed was written.
        check: Whether the run belongs to `Plan.checks`.
    """

    document: Document
    label: str
    index: int
    changes: tuple[Change, ...]
    seed: int
    chooses: bool
    choosing: bool
    place: str
    check: bool = False


def settings(request: Request) -> list[tuple[str, Document]]:
    """Return the settings of a request: a label, and what it overrides.

    Raises:
        ConfigError: The plan has none for this task, or none of a label that `--set` picks.
    """
    plan, document = request.plan, request.plan_document
    found = changes(request.task_document)
    if plan.settings == "baseline":
        found = found[:1]
    elif isinstance(plan.settings, dict):
        if request.task not in plan.settings:
            raise ConfigError(
                f"{document.place(('settings',))}: settings has none for task {request.task!r}"
                + suggest(request.task, list(plan.settings))
            )
        found = [
            (label, config.from_paths(overrides, document.place(("settings", request.task, label))))
            for label, overrides in plan.settings[request.task].items()
        ]
    if request.labels is None:
        return found
    labels = [label for label, _ in found]
    for label in request.labels:
        if label not in labels:
            raise ConfigError(
                f"--set settings={label}: task {request.task} has no such setting under plan "
                f"{request.name}{suggest(label, labels)}; or write all or baseline, for those of the task file"
            )
    return [(label, setting) for label, setting in found if label in request.labels]


def cells(request: Request) -> Iterator[Cell]:
    """Lay the layers of every run over each other, in the order of the plan."""
    plan, document = request.plan, request.plan_document
    points = [grid.points(plan, document, i, entry, request.settled) for i, entry in enumerate(plan.mixers)]
    choosing = choosing_seeds(request, points)
    seeds = [(seed, True, ("choose", "seeds", i)) for i, seed in enumerate(choosing)]
    seeds += [(seed, False, ("seeds", i)) for i, seed in enumerate(plan.seeds)]
    for label, setting in settings(request):
        laid = config.merge(request.base, setting)
        for index, found in enumerate(points):
            for point, (seed, chooses, path) in itertools.product(found, seeds):
                every = (*point, *request.overrides)
                yield Cell(laid, label, index, every, seed, chooses, bool(choosing), document.place(path))


def checks(request: Request) -> Iterator[Cell]:
    """Lay the layers of the plan's checks: each mixer once, without the grid."""
    plan, document = request.plan, request.plan_document
    if request.labels is not None or document.place(("settings",)).startswith("--set"):
        return  # `--set settings=` asks for others
    for label, overrides in plan.checks.get(request.task, {}).items():
        setting = config.from_paths(overrides, document.place(("checks", request.task, label)))
        laid = config.merge(request.base, setting)
        for index in range(len(plan.mixers)):
            place, changes = document.place(("seeds", 0)), tuple(request.overrides)
            yield Cell(laid, label, index, changes, plan.seeds[0], False, False, place, check=True)


def choosing_seeds(request: Request, points: list[list[tuple[Change, ...]]]) -> list[int]:
    """Return the seeds that choose; none where there is no grid, or `--set` has settled it."""
    plan = request.plan
    if plan.choose is None:
        return []
    place = request.plan_document.place(("choose",))
    if plan.search:
        raise ConfigError(f"{place}: choose needs a grid; a search chooses by itself, take it out")
    if both := sorted(set(plan.choose.seeds) & set(plan.seeds)):
        raise ConfigError(
            f"{place}: choose.seeds={plan.choose.seeds} and seeds={plan.seeds} share {both}; a "
            "seed that chose must not be measured, take others"
        )
    return plan.choose.seeds if any(len(found) > 1 for found in points) else []


def lay(request: Request, cell: Cell, point: Iterable[Change] = ()) -> Document:
    """Return all that one run is built from, its mixers included.

    Args:
        request: What is asked for.
        cell: The run's cell.
        point: What a search proposes beside it.
    """
    own = Document({"seed": cell.seed}, {("seed",): cell.place}, request.plan_document.name)
    found = config.merge(cell.document, own)
    entry, places = request.plan.mixers[cell.index], {}
    proposed = len(cell.changes) - len(request.overrides)  # what `--set` says comes after the point
    for change in (*cell.changes[:proposed], *point, *cell.changes[proposed:]):
        address = Address.read(change.field)
        if address is None:
            found = config.merge(found, config.from_path(tuple(change.field.split(".")), change.value, change.place))
            continue
        for number in address.parts(cell.index, entry):
            places[("mixers", number, address.field)] = change.place
        entry = address.put(cell.index, entry, change.value)
    entries: list[Any] = entry if isinstance(entry, list) else [entry]
    place = request.plan_document.place(("mixers", cell.index))
    places = {("mixers", number): place for number in range(len(entries))} | places
    return config.merge(found, Document({"mixers": entries}, places, request.plan_document.name))
