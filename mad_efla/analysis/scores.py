"""From runs to a table: the best of the grid, chosen on validation, reported on test.

For each setting and mixer the grid point with the highest mean validation accuracy over seeds is
chosen; what is shown is its test accuracy, averaged over seeds, with an interval. A diverged run
counts as zero on either split, and is named in the table.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from mad_efla.config import canonical_json
from mad_efla.plan.run import RunConfig
from mad_efla.runs.schema import Result


class Interval(NamedTuple):
    """A mean and what it may be: the 95 % Student interval over seeds, None for a single one."""

    mean: float
    low: float | None
    high: float | None


class Line(NamedTuple):
    """One row of a sweep's table.

    Attributes:
        setting: The setting's label.
        mixer: The mixer's label.
        point: Grid fields of the chosen point, empty if there was no grid.
        seeds: Runs the score is made of, diverged ones included.
        accuracy: Test token accuracy; None where every run diverged.
        macro_accuracy: Mean test macro accuracy.
        loss: Mean test loss, nats per scored token.
        parameters: Trained numbers.
        state_size: Numbers carried between tokens.
        steps_to_90: Median step at which validation accuracy reached 0.9; None if most did not.
        seconds: Mean wall time of a run.
        missing: What is not there: `1 diverged`, `1 failed`, `2 missing`.
    """

    setting: str
    mixer: str
    point: dict[str, object]
    seeds: int
    accuracy: Interval | None
    macro_accuracy: float | None
    loss: float | None
    parameters: int
    state_size: int
    steps_to_90: float | None
    seconds: float
    missing: str


def table(runs: Iterable[RunConfig], results: dict[str, Result]) -> list[Line]:
    """Summarise runs, best first within each setting.

    Args:
        runs: All runs of a sweep, in the order of the plan.
        results: Results by fingerprint; a run without one is counted as missing.
    """
    groups: dict[tuple[str, str], dict[str, list[RunConfig]]] = {}
    for run in runs:
        points = groups.setdefault((run.setting, run.mixer), {})
        points.setdefault(point_key(run), []).append(run)
    order = list(dict.fromkeys(setting for setting, _ in groups))
    lines = [_line(points, results) for points in groups.values()]
    lines = [line for line in lines if line is not None]
    return sorted(lines, key=lambda m: (order.index(m.setting), -(m.accuracy or (-1.0,))[0]))


def interval(values: list[float], confidence: float = 0.95) -> Interval:
    """Return the mean of accuracies with its Student interval, cut to [0, 1]."""
    from scipy import stats  # a second of import that `mad-efla --help` does without

    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * spread / len(values) ** 0.5
    return Interval(mean, max(mean - half, 0.0), min(mean + half, 1.0))


def point_key(run: RunConfig) -> str:
    """Name what is left of a run without its seed: its point of the grid."""
    return canonical_json({k: v for k, v in run.model_dump().items() if k != "seed"})


def choose(
    points: dict[str, list[RunConfig]], results: dict[str, Result]
) -> tuple[str, dict[int, Result]] | None:
    """Choose a point of the grid: the key of the best, and its results by seed.

    Best is the highest mean validation accuracy over seeds, a diverged run counting as zero. Of
    equals the lowest mean validation loss of the runs that ended, then the plan's first.

    Args:
        points: The runs of every point of one mixer and setting.
        results: Results by fingerprint; None is returned if the points have none.
    """
    best = None
    for key, runs in points.items():
        found = {r.seed: results[r.fingerprint] for r in runs if r.fingerprint in results}
        if not found:
            continue
        ended = [r.validation for r in found.values() if r.validation]
        loss = math.fsum(v.loss for v in ended) / len(ended) if ended else math.inf
        merit = (validation(list(found.values())), -loss)
        if best is None or merit > best[0]:
            best = merit, key, found
    return best and best[1:]


def best_runs(
    runs: Iterable[RunConfig], results: dict[str, Result]
) -> dict[tuple[str, str], RunConfig]:
    """Name for each setting and mixer one run: at the chosen grid point the best on validation.

    Only finished runs count, and of a sweep of one task.
    """
    grids: dict[tuple[str, str], dict[str, list[RunConfig]]] = {}
    for run in runs:
        points = grids.setdefault((run.setting, run.mixer), {})
        points.setdefault(point_key(run), []).append(run)
    best = {}
    for cell, points in grids.items():
        chosen = choose(points, results)
        if chosen is None:
            continue
        key, by_seed = chosen
        whole = [r for r in points[key] if r.seed in by_seed and by_seed[r.seed].validation]
        if whole:
            best[cell] = max(whole, key=lambda r: validation([by_seed[r.seed]]))
    return best


def validation(found: list[Result]) -> float:
    """Return the mean validation accuracy by which a grid point is chosen; divergence is zero."""
    return math.fsum(r.validation.token_accuracy if r.validation else 0.0 for r in found) / len(
        found
    )


def test_accuracy(result: Result) -> float:
    """Return a run's test accuracy; a run that diverged answers nothing."""
    return result.test.token_accuracy if result.test else 0.0


def _line(points: dict[str, list[RunConfig]], results: dict[str, Result]) -> Line | None:
    chosen = choose(points, results)
    if chosen is None:
        return None
    best, by_seed = chosen
    found, runs = list(by_seed.values()), points[best]
    ended = [r.test for r in found if r.test]
    everything = [r for runs in points.values() for r in runs]
    return Line(
        setting=runs[0].setting,
        mixer=runs[0].mixer,
        point=_chosen(runs[0], everything),
        seeds=len(found),
        accuracy=interval([test_accuracy(r) for r in found]) if ended else None,
        macro_accuracy=_mean([t.macro_accuracy for t in ended]),
        loss=_mean([t.loss for t in ended]),
        parameters=found[0].parameters,
        state_size=found[0].state_size,
        steps_to_90=_median([r.steps_to_90 for r in found]),
        seconds=_mean([r.seconds for r in found]) or 0.0,
        missing=_missing(everything, results),
    )


def _chosen(run: RunConfig, everything: list[RunConfig]) -> dict[str, object]:
    """Return the fields in which the grid points differ, at the chosen one."""
    flat = {
        f"{section}.{key}": value
        for section in ("data", "model", "optim", "train")
        for key, value in getattr(run, section).model_dump().items()
    }
    return {
        name: value
        for name, value in flat.items()
        if any(getattr(getattr(r, name.split(".")[0]), name.split(".")[1]) != value
               for r in everything)
    }  # fmt: skip


def _missing(runs: list[RunConfig], results: dict[str, Result]) -> str:
    absent = sum(r.fingerprint not in results for r in runs)
    diverged = sum(
        results[r.fingerprint].status == "diverged" for r in runs if r.fingerprint in results
    )
    counts = {"diverged": diverged, "missing": absent}
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _median(values: list[int | None]) -> float | None:
    """Return the median, with None above every number."""
    ordered = sorted(math.inf if v is None else v for v in values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return None if math.isinf(middle) else middle
