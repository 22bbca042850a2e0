"""The points of a plan: what is varied, beside mixers, settings and seeds.

    grid:   {optim.lr: [1e-3, 5e-3], optim.weight_decay: [0, 0.1]}       every combination
    zip:    {model.width: [64, 128], optim.lr: [5e-3, 1e-3]}             side by side
    cells:  [{optim.lr: 1e-3, train.steps: 500}, {optim.lr: 5e-3}]       written out
    sample: {method: sobol, count: 16, seed: 0, over: {optim.lr: {log: [1e-4, 1e-2]}}}

Where a plan has several of them, their points are combined. Each field is varied in one place.
"""

import itertools
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mad_efla import config
from mad_efla.config import ConfigError, Document, Section, suggest


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


def check(plan: Points, document: Document, mixers: list[str]) -> None:
    """Refuse what cannot be meant: empty axes, a field varied twice, grids that do not match.

    Args:
        plan: The plan's points.
        document: Where it was read from.
        mixers: The names of the plan's mixers, hybrids as `attention+efla`.

    Raises:
        ConfigError: With the place and the cure.
    """
    if plan.prune and not plan.search:
        raise ConfigError(f"{document.place(('prune',))}: prune={plan.prune} ends trials; it needs a search")
    varied = [kind for kind, fields in _fields(plan) if fields and kind != "search"]
    if plan.search and varied:
        raise ConfigError(
            f"{document.place(('search',))}: search proposes all points by itself; take out "
            f"{', '.join(varied)}, or search"
        )
    seen: dict[str, str] = {}
    for kind, fields in _fields(plan):
        for field in fields:
            place = document.place((kind, field))
            if field in seen:
                raise ConfigError(f"{place}: {field} is varied in {seen[field]} and in {kind}; leave one of them")
            seen[field] = kind
    axes = [("grid", f, v) for f, v in plan.grid.items()]
    axes += [("zip", f, v) for f, v in plan.zip.items()]
    for kind, field, values in axes:
        if not values:
            place = document.place((kind, field))
            raise ConfigError(f"{place}: {kind}.{field}=[] must list at least one value")
    lengths = {field: len(values) for field, values in plan.zip.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"{document.place(('zip',))}: zip must have equally many values, {lengths}")
    if plan.per_mixer and not plan.unmatched:
        raise ConfigError(
            f"{document.place(('per_mixer',))}: per_mixer gives mixers grids of their own, and "
            "then a difference may be the grids'; give all one grid, or say unmatched: true"
        )
    for mixer, fields in plan.per_mixer.items():
        place = document.place(("per_mixer", mixer))
        if mixer not in mixers:
            raise ConfigError(f"{place}: per_mixer.{mixer}: no such mixer{suggest(mixer, mixers)}")
        for field, values in fields.items():
            if field not in plan.grid or not values:
                raise ConfigError(
                    f"{document.place(('per_mixer', mixer, field))}: per_mixer.{mixer}.{field} "
                    f"must list values for a field of grid{suggest(field, list(plan.grid))}"
                )


def points(plan: Points, document: Document, mixer: str, settled: set[str]) -> list[tuple[Document, ...]]:
    """Return the points of one mixer, as overrides to be laid over a run.

    Args:
        plan: The plan's points, checked.
        document: Where it was read from, for the places of errors.
        mixer: The mixer's name.
        settled: Fields that `--set` has given a value; they are not varied.
    """
    grid = plan.grid | plan.per_mixer.get(mixer, {})
    sources: list[list[Document]] = [
        [_document({field: value}, document, "grid", field) for value in values]
        for field, values in grid.items()
        if field not in settled
    ]
    zipped = {f: v for f, v in plan.zip.items() if f not in settled}
    drawn = plan.sample.draw() if plan.sample else []
    for kind, rows in (
        ("zip", [dict(zip(zipped, row, strict=True)) for row in zip(*zipped.values(), strict=True)]),
        ("cells", plan.cells),
        ("sample", drawn),
    ):
        left = [{f: v for f, v in row.items() if f not in settled} for row in rows]
        if left:
            sources.append([_document(row, document, kind, next(iter(row), "")) for row in left])
    return list(itertools.product(*sources))


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


def _document(values: dict[str, Any], document: Document, kind: str, field: str) -> Document:
    return config.from_paths(values, document.place((kind, field)))
