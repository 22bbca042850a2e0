"""The points of a plan: what is varied, beside mixers, settings and seeds.

    grid:   {optim.lr: [1e-3, 5e-3], optim.weight_decay: [0, 0.1]}       every combination
    zip:    {model.width: [64, 128], optim.lr: [5e-3, 1e-3]}             side by side
    cells:  [{optim.lr: 1e-3, train.steps: 500}, {optim.lr: 5e-3}]       written out
    sample: {method: sobol, count: 16, seed: 0, over: {optim.lr: {log: [1e-4, 1e-2]}}}

Where a plan has several of them, their points are combined. Each field is varied in one place. A
field of a mixer, `mixers.efla.heads`, is varied of the mixers that it names and of no other.
"""

import itertools
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mad_efla.config import ConfigError, Document, Section, suggest
from mad_efla.plan import fields
from mad_efla.plan.fields import Address, Change, entry_name


class Range(Section):
    """What values are drawn from: one of these.

    Attributes:
        uniform: Low and high.
        log: Low and high, both positive; uniform in the logarithm.
        integer: Low and high, both included.
        choice: The values themselves.
    """

    uniform: tuple[float, float] | None = None
    log: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None
    choice: list[Any] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _is_one_range(self) -> "Range":
        given = {k: v for k, v in self if v is not None}
        if len(given) != 1:
            raise ValueError(f"{sorted(given)} must be one of uniform, log, integer and choice")
        ((kind, bounds),) = given.items()
        if kind != "choice" and not bounds[0] < bounds[1]:
            raise ValueError(f"{kind}={list(bounds)} must rise from low to high")
        if kind == "log" and bounds[0] <= 0:
            raise ValueError(f"log={list(bounds)} must start above zero")
        return self

    def at(self, u: float) -> Any:
        """Return the value at a quantile `u` in [0, 1); real ones have six digits."""
        if self.choice is not None:
            return self.choice[int(u * len(self.choice))]
        if self.integer is not None:
            low, high = self.integer
            return low + int(u * (high - low + 1))
        if self.uniform is not None:
            low, high = self.uniform
            return float(f"{low + u * (high - low):.6g}")
        assert self.log is not None
        low, high = np.log(self.log)
        return float(f"{np.exp(low + u * (high - low)):.6g}")


class Sample(Section):
    """Points drawn from ranges.

    Attributes:
        method: `random`, or `sobol`, whose points fill the ranges evenly.
        count: Points; with `sobol` a power of two, or its points are not even.
        seed: Of the draw; equal seeds give equal points, for every mixer and setting.
        over: Field to range.
    """

    method: Literal["random", "sobol"]
    count: int = Field(ge=1, le=10_000)
    seed: int = Field(0, ge=0, lt=2**32)
    over: dict[str, Range] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_balanced(self) -> "Sample":
        if self.method == "sobol" and self.count & (self.count - 1):
            raise ValueError(f"count={self.count} must be a power of two for sobol")
        return self

    def draw(self) -> list[dict[str, Any]]:
        """Draw the points."""
        if self.method == "sobol":
            from scipy.stats import qmc  # a second of import that most plans do without

            drawn = qmc.Sobol(len(self.over), rng=np.random.default_rng(self.seed))
            quantiles = drawn.random(self.count)
        else:
            quantiles = np.random.default_rng(self.seed).random((self.count, len(self.over)))
        return [
            {field: r.at(float(u)) for (field, r), u in zip(self.over.items(), row, strict=True)} for row in quantiles
        ]


class Search(Section):
    """Points that a sampler proposes one after the other, from what the earlier ones reached.

    Attributes:
        method: `tpe`, the tree-structured Parzen estimator (Bergstra et al. 2011).
        trials: Runs of every mixer at every setting, equally many.
        seed: Of the sampler; with one worker equal seeds give equal trials.
        over: Field to range.
    """

    method: Literal["tpe"]
    trials: int = Field(ge=1, le=1_000)
    seed: int = Field(0, ge=0, lt=2**32)
    over: dict[str, Range] = Field(min_length=1)


class Points(Section):
    """The part of a plan that says what is varied.

    Attributes:
        grid: Field to values; every combination.
        zip: Field to values, all equally many; taken side by side.
        cells: Mappings of field to value, each a point.
        sample: Points drawn from ranges.
        search: Points proposed by a sampler, for exploring; stands alone.
        prune: `hyperband` ends trials early whose validation accuracy lags behind.
        per_mixer: By mixer, fields whose values in `grid` are others for it.
        unmatched: Allow `per_mixer`; the runs then carry the protocol `unmatched`.
    """

    grid: dict[str, list[Any]] = Field(default_factory=dict)
    zip: dict[str, list[Any]] = Field(default_factory=dict)
    cells: list[dict[str, Any]] = Field(default_factory=list)
    sample: Sample | None = None
    search: Search | None = None
    prune: Literal["hyperband"] | None = None
    per_mixer: dict[str, dict[str, list[Any]]] = Field(default_factory=dict)
    unmatched: bool = False


def check(plan: Points, document: Document, mixers: list[Any], task: str) -> None:
    """Refuse what cannot be meant: unknown fields, empty axes, a field varied twice, unmatched grids.

    Args:
        plan: The plan's points.
        document: Where it was read from.
        mixers: The plan's mixers.
        task: The name of the task that is swept.

    Raises:
        ConfigError: With the place and the cure.
    """
    _check_search(plan, document)
    _check_fields(plan, document, mixers, task)
    _check_axes(plan, document)
    _check_per_mixer(plan, document, [entry_name(entry) for entry in mixers])


def points(plan: Points, document: Document, index: int, entry: Any, settled: set[str]) -> list[tuple[Change, ...]]:
    """Return the points of one mixer, as changes to be made to a run.

    Args:
        plan: The plan's points, checked.
        document: Where it was read from, for the places of errors.
        index: The mixer's number in the plan.
        entry: The mixer as the plan has it.
        settled: Fields that `--set` has given a value; they are not varied.
    """
    axes = plan.grid | plan.per_mixer.get(entry_name(entry), {})
    zipped = [dict(zip(plan.zip, row, strict=True)) for row in zip(*plan.zip.values(), strict=True)]
    kinds = [("grid", [{field: value} for value in values]) for field, values in axes.items()]
    kinds += [("zip", zipped), ("cells", plan.cells), ("sample", plan.sample.draw() if plan.sample else [])]
    sources: list[list[tuple[Change, ...]]] = []
    for kind, rows in kinds:
        left: list[tuple[Change, ...]] = []
        for number, row in enumerate(rows):
            changes = tuple(
                Change(field, value, _place(document, kind, number, field))
                for field, value in row.items()
                if field not in settled and _is_meant(field, index, entry)
            )
            if [change[:2] for change in changes] not in [[change[:2] for change in other] for other in left]:
                left.append(changes)
        if left:
            sources.append(left)
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*sources)]


def _is_meant(field: str, index: int, entry: Any) -> bool:
    address = Address.read(field)
    return address is None or bool(address.parts(index, entry))


def _place(document: Document, kind: str, number: int, field: str) -> str:
    return document.place((kind, number, field) if kind == "cells" else (kind, field))


def _fields(plan: Points) -> list[tuple[str, list[str]]]:
    cells = dict.fromkeys(field for cell in plan.cells for field in cell)
    sampled = list(plan.sample.over) if plan.sample else []
    return [
        ("grid", list(plan.grid)),
        ("zip", list(plan.zip)),
        ("cells", list(cells)),
        ("sample", sampled),
        ("search", list(plan.search.over) if plan.search else []),
    ]


def _check_search(plan: Points, document: Document) -> None:
    """A search stands alone, and only a search has trials to prune."""
    if plan.prune and not plan.search:
        raise ConfigError(f"{document.place(('prune',))}: prune={plan.prune} ends trials; it needs a search")
    if plan.search is None:
        return
    if varied := [kind for kind, found in _fields(plan) if found and kind != "search"]:
        raise ConfigError(
            f"{document.place(('search',))}: search proposes all points by itself; take out "
            f"{', '.join(varied)}, or search"
        )
    for field in plan.search.over:
        if Address.read(field):
            raise ConfigError(
                f"{document.place(('search', 'over', field))}: search.over.{field}: a search ranges over what all "
                "mixers share; vary a mixer's own field in grid, or list its forms under mixers"
            )


def _check_fields(plan: Points, document: Document, mixers: list[Any], task: str) -> None:
    """Each varied name is a field, and is varied in one place."""
    seen: dict[str, str] = {}
    for kind, found in _fields(plan):
        for field in found:
            places = [(kind, "over", field)] if kind in ("sample", "search") else [(kind, field)]
            if kind == "cells":
                places = [("cells", number, field) for number, cell in enumerate(plan.cells) if field in cell]
            place = document.place(places[0])
            fields.check_any(field, task, mixers, place)
            if field in seen:
                raise ConfigError(f"{place}: {field} is varied in {seen[field]} and in {kind}; leave one of them")
            seen[field] = kind
    for kind, axes in (("grid", plan.grid), ("zip", plan.zip)):
        for field, values in axes.items():
            for value in values:
                fields.check_inside(field, value, task, document.place((kind, field)))
    for number, cell in enumerate(plan.cells):
        for field, value in cell.items():
            fields.check_inside(field, value, task, document.place(("cells", number, field)))


def _check_axes(plan: Points, document: Document) -> None:
    """No axis is empty, and those that are taken side by side are equally long."""
    for kind, axes in (("grid", plan.grid), ("zip", plan.zip)):
        for field, values in axes.items():
            if not values:
                place = document.place((kind, field))
                raise ConfigError(f"{place}: {kind}.{field}=[] must list at least one value")
    lengths = {field: len(values) for field, values in plan.zip.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"{document.place(('zip',))}: zip must have equally many values, {lengths}")


def _check_per_mixer(plan: Points, document: Document, mixers: list[str]) -> None:
    """Grids of single mixers are called unmatched, and change fields of the grid."""
    if plan.per_mixer and not plan.unmatched:
        raise ConfigError(
            f"{document.place(('per_mixer',))}: per_mixer gives mixers grids of their own, and "
            "then a difference may be the grids'; give all one grid, or say unmatched: true"
        )
    for mixer, axes in plan.per_mixer.items():
        place = document.place(("per_mixer", mixer))
        if mixer not in mixers:
            raise ConfigError(f"{place}: per_mixer.{mixer}: no such mixer{suggest(mixer, mixers)}")
        for field, values in axes.items():
            if field not in plan.grid or not values:
                raise ConfigError(
                    f"{document.place(('per_mixer', mixer, field))}: per_mixer.{mixer}.{field} "
                    f"must list values for a field of grid{suggest(field, list(plan.grid))}"
                )
