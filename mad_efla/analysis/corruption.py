"""Curves under corruption: per mixer the accuracy over severity, its area, and where it halves.

The grid point is chosen on clean validation data, as everywhere; what is shown is its seeds'
accuracy on the corrupted test split. Per corruption and seed, with c the accuracy at the neutral
severity s_0 and s_1 the largest severity,

    area     mean accuracy from s_0 to s_1, by the trapezoidal rule, in [0, 1]
    half     the first severity beyond s_0 at which accuracy is c / 2, between two severities of the
             grid by a straight line; inf where it stays above to the end of the grid

An accuracy never falls to zero, only to guessing, so a curve that ends at 10 % of ten classes has
lost everything. A run that diverged answers nothing: its curves are zero and its halves s_0.
"""

import itertools
import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from mad_efla.analysis.cells import Cell
from mad_efla.analysis.statistics import Interval, interval
from mad_efla.plan.run import RunConfig
from mad_efla.runs.schema import ProbeScore, Result
from mad_efla.tasks._corruptions import NEUTRAL


class Half(NamedTuple):
    """Severity at which accuracy halves: median over seeds, least and largest; inf is never."""

    median: float
    least: float
    largest: float


class CorruptionCurve(NamedTuple):
    """A mixer under one corruption.

    Attributes:
        severities: Rising.
        accuracy: At each, with Student's interval over seeds.
        area: With the same.
        half: See above.
        finite: Least share of finite answers, over severities and seeds.
    """

    severities: list[float]
    accuracy: list[Interval]
    area: Interval
    half: Half
    finite: float


class Arm(NamedTuple):
    """A mixer at its chosen grid point.

    Attributes:
        task: The task's name.
        setting: The setting's label.
        mixer: The mixer's label.
        runs: One per seed, those that are done.
        clean: Accuracy on the test split as it is.
        mean_area: Mean of the areas over all corruptions.
        curves: By corruption.
    """

    task: str
    setting: str
    mixer: str
    runs: list[RunConfig]
    clean: Interval
    mean_area: Interval
    curves: dict[str, CorruptionCurve]


def arms(found: Iterable[Cell]) -> list[Arm]:
    """Summarise the cells that were probed, in their order; none where none was.

    Args:
        found: As `cells.cells` returns them.
    """
    return [arm for cell in found if (arm := _arm(cell))]


def _arm(cell: Cell) -> Arm | None:
    grids = next((grid(r) for r in cell.results if r.probes), None)
    if grids is None:
        return None
    areas = [[mean_accuracy(s, c) for s, c in curves(r, grids).values()] for r in cell.results]
    return Arm(
        task=cell.task,
        setting=cell.setting,
        mixer=cell.mixer,
        runs=cell.runs,
        clean=interval(list(cell.values().values())),
        mean_area=interval([math.fsum(a) / len(a) for a in areas]),
        curves={name: _curve(name, grids, cell.results) for name in grids},
    )


def _curve(name: str, grids: dict[str, list[float]], seeds: list[Result]) -> CorruptionCurve:
    severities = grids[name]
    each = [curves(r, grids)[name].accuracy for r in seeds]
    halves = [half_accuracy_severity(severities, c, NEUTRAL.get(name, 0.0)) for c in each]
    finite = [p.finite for r in seeds for p in r.probes if p.name == name]
    return CorruptionCurve(
        severities=severities,
        accuracy=[interval(list(at)) for at in zip(*each, strict=True)],
        area=interval([mean_accuracy(severities, c) for c in each]),
        half=Half(statistics.median_low(halves), min(halves), max(halves)),
        finite=min(finite, default=0.0),
    )


# ------------------------------------------------------------------ one run


class SeedCurve(NamedTuple):
    """Accuracies of one run over rising severities."""

    severities: list[float]
    accuracy: list[float]


def grid(result: Result) -> dict[str, list[float]]:
    """Return the severities that a run was probed at, by corruption, in the order of the task."""
    found: dict[str, list[float]] = {}
    for probe in result.probes:
        found.setdefault(probe.name, []).append(probe.severity)
    return found


def curves(result: Result, grids: dict[str, list[float]] | None = None) -> dict[str, SeedCurve]:
    """Return a run's curves; zeros over `grids` for a run that diverged."""
    if not result.probes:
        return {name: SeedCurve(s, [0.0] * len(s)) for name, s in (grids or {}).items()}
    found: dict[str, list[ProbeScore]] = {}
    for probe in result.probes:
        found.setdefault(probe.name, []).append(probe)
    return {
        name: SeedCurve([p.severity for p in probes], [p.accuracy for p in probes]) for name, probes in found.items()
    }


def mean_accuracy(severities: list[float], accuracy: list[float]) -> float:
    """Return the mean accuracy over the range of severities; see above."""
    if len(severities) == 1:
        return accuracy[0]
    steps = itertools.pairwise(zip(severities, accuracy, strict=True))
    total = math.fsum((s1 - s0) * (a0 + a1) / 2 for (s0, a0), (s1, a1) in steps)
    return total / (severities[-1] - severities[0])


def half_accuracy_severity(severities: list[float], accuracy: list[float], neutral: float) -> float:
    """Return the severity at which accuracy halves, inf where it does not; see above.

    Args:
        severities: Rising.
        accuracy: At each, in [0, 1].
        neutral: The severity that changes nothing; lower ones are left out.
    """
    beyond = [(s, a) for s, a in zip(severities, accuracy, strict=True) if s >= neutral]
    wanted = beyond[0][1] / 2
    if wanted == 0:
        return neutral
    for (s0, a0), (s1, a1) in itertools.pairwise(beyond):
        if a1 <= wanted:
            return s0 + (s1 - s0) * (a0 - wanted) / (a0 - a1)
    return math.inf
