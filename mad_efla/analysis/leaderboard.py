"""The MAD score: per task the mean over settings, per mixer the mean over tasks, with intervals.

For each setting, mixer and task the grid point is chosen by validation accuracy averaged over
seeds, and its test accuracy is what counts. The reference's rule, best of the grid on test, stands
beside it under its own name. Protocols are never mixed: each gets scores of its own.

Legend: a cell is one (task, setting, mixer) with a value per seed.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mad_efla.analysis import scores
from mad_efla.analysis.scores import Interval
from mad_efla.config import ConfigError, canonical_json, digest
from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder, finished
from mad_efla.runs.schema import Result
from mad_efla.runs.sweeps import read_sweeps

RESAMPLES = 9_999


class TaskScore(NamedTuple):
    """A mixer on a task.

    Attributes:
        mixer: The mixer's label.
        task: The task's name.
        accuracy: Mean over settings of test token accuracy at the chosen grid point, with a 95 %
            bootstrap interval over settings and seeds; None where no run ended.
        best_on_test: The reference's rule: the same, with the grid point chosen on the test split.
        of_ceiling: Accuracy over what can be answered at all, mean over settings.
        settings: Settings scored.
        missing: What is not there: `2 of 66 runs missing, 1 diverged`; empty if nothing.
    """

    mixer: str
    task: str
    accuracy: Interval | None
    best_on_test: float | None
    of_ceiling: float | None
    settings: int
    missing: str


class MixerScore(NamedTuple):
    """A mixer over all tasks.

    Attributes:
        mixer: The mixer's label.
        average: Mean over tasks, with an interval; None unless every task has a score.
        rank: Mean rank over tasks, 1 is best; ties share.
        complete: Whether every run of every task is there.
    """

    mixer: str
    average: Interval | None
    rank: float | None
    complete: bool


class Difference(NamedTuple):
    """Two mixers on the same tasks, settings and seeds.

    Attributes:
        first: Label of one.
        second: Label of the other.
        mean: Mean of first minus second, with a 95 % bootstrap interval over the pairs.
        pairs: (task, setting, seed) triples both have.
        p: Wilcoxon signed-rank test that the differences are symmetric about zero.
        p_corrected: The same, Benjamini and Hochberg's correction over all pairs of mixers.
    """

    first: str
    second: str
    mean: Interval
    pairs: int
    p: float
    p_corrected: float


class Leaderboard(NamedTuple):
    """All scores of one protocol."""

    protocol: str
    tasks: list[TaskScore]
    mixers: list[MixerScore]
    differences: list[Difference]


class _Cell(NamedTuple):
    """Test accuracies by seed at the chosen point, and what goes with them."""

    chosen: dict[int, float]
    best_on_test: float
    ceiling: float


Key = tuple[str, str, str]  # mixer, task, setting


def read(out: Path) -> tuple[list[RunConfig], dict[str, Result]]:
    """Read every run that a sweep under `out` is made of, and the results there are.

    Raises:
        ConfigError: There is no sweep.
    """
    records = read_sweeps(out)
    if not records:
        raise ConfigError(f"{out}: holds no sweep; run `mad-efla sweep` first, or name its folder")
    fingerprints = list(dict.fromkeys(f for r in records for f in r.fingerprints))
    folders = [RunFolder(out, f) for f in fingerprints]
    runs = [folder.run() for folder in folders if folder.path.exists()]
    return runs, finished(out, fingerprints)


def leaderboards(runs: Iterable[RunConfig], results: dict[str, Result]) -> list[Leaderboard]:
    """Score runs, one leaderboard per protocol; equal input gives equal output.

    Exploring runs have none: their points were proposed from what earlier ones reached, so that no
    two mixers were given the same.
    """
    by_protocol: dict[str, list[RunConfig]] = {}
    for run in runs:
        if run.protocol != "exploring":
            by_protocol.setdefault(run.protocol, []).append(run)
    return [_leaderboard(p, found, results) for p, found in sorted(by_protocol.items())]


def _leaderboard(protocol: str, runs: list[RunConfig], results: dict[str, Result]) -> Leaderboard:
    groups = _group(runs)
    cells = {key: cell for key, points in groups.items() if (cell := _cell(points, results))}
    mixers = sorted({key[0] for key in groups})
    tasks = sorted({key[1] for key in groups})
    table = [
        _task_score(mixer, task, groups, cells, results)
        for task, mixer in itertools.product(tasks, mixers)
        if any(key[:2] == (mixer, task) for key in groups)
    ]
    ranked = [_mixer_score(mixer, tasks, cells, table) for mixer in mixers]
    ranked.sort(key=lambda m: (m.rank is None, m.rank or 0.0, m.mixer))
    return Leaderboard(protocol, table, ranked, _differences(mixers, cells))


def _group(runs: list[RunConfig]) -> dict[Key, dict[str, list[RunConfig]]]:
    """Group runs by mixer, task and setting, then by grid point.

    Runs that share a label but differ in task, data, model or budget are different settings; the
    label then carries a digest, so that nothing is pooled that was not made alike.
    """
    conditions: dict[tuple[str, str], dict[str, None]] = {}
    for run in runs:
        conditions.setdefault((run.task.name, run.setting), {})[condition(run)] = None
    groups: dict[Key, dict[str, list[RunConfig]]] = {}
    for run in runs:
        several = len(conditions[run.task.name, run.setting]) > 1
        setting = f"{run.setting} [{condition(run)[:4]}]" if several else run.setting
        points = groups.setdefault((run.mixer, run.task.name, setting), {})
        points.setdefault(scores.point_key(run), []).append(run)
    return groups


def condition(run: RunConfig) -> str:
    """Digest what makes runs alike: task, data, model and budget."""
    parts = [getattr(run, s).model_dump() for s in ("task", "data", "model", "train")]
    return digest(canonical_json(parts))


def _cell(points: dict[str, list[RunConfig]], results: dict[str, Result]) -> _Cell | None:
    chosen = scores.choose(points, results)
    if chosen is None:
        return None
    found = chosen[1]
    tests = [
        [scores.test_accuracy(results[r.fingerprint]) for r in runs if r.fingerprint in results]
        for runs in points.values()
    ]
    return _Cell(
        chosen={seed: scores.test_accuracy(result) for seed, result in sorted(found.items())},
        best_on_test=max(_mean(t) for t in tests if t),
        ceiling=_mean([r.ceiling for r in found.values()]),
    )


def _task_score(
    mixer: str,
    task: str,
    groups: dict[Key, dict[str, list[RunConfig]]],
    cells: dict[Key, _Cell],
    results: dict[str, Result],
) -> TaskScore:
    keys = [key for key in groups if key[:2] == (mixer, task)]
    found = [cells[key] for key in keys if key in cells]
    runs = [r for key in keys for point in groups[key].values() for r in point]
    means = [_mean(list(c.chosen.values())) for c in found]
    return TaskScore(
        mixer=mixer,
        task=task,
        accuracy=_two_level([list(c.chosen.values()) for c in found]) if found else None,
        best_on_test=_mean([c.best_on_test for c in found]) if found else None,
        of_ceiling=_mean([m / c.ceiling for m, c in zip(means, found, strict=True)])
        if found
        else None,
        settings=len(found),
        missing=_missing(runs, results),
    )


def _missing(runs: list[RunConfig], results: dict[str, Result]) -> str:
    absent = sum(r.fingerprint not in results for r in runs)
    diverged = sum(
        results[r.fingerprint].status == "diverged" for r in runs if r.fingerprint in results
    )
    parts = [f"{absent} of {len(runs)} runs missing"] * bool(absent)
    return ", ".join(parts + [f"{diverged} diverged"] * bool(diverged))


def _mixer_score(
    mixer: str, tasks: list[str], cells: dict[Key, _Cell], table: list[TaskScore]
) -> MixerScore:
    own = [t for t in table if t.mixer == mixer]
    have = [t for t in own if t.accuracy]
    ranks = [_rank(t, [o for o in table if o.task == t.task and o.accuracy]) for t in have]
    values = [
        [list(c.chosen.values()) for key, c in cells.items() if key[:2] == (mixer, task)]
        for task in tasks
    ]
    whole = len(have) == len(tasks)
    return MixerScore(
        mixer=mixer,
        average=_over_tasks(values) if whole else None,
        rank=_mean(ranks) if whole else None,
        complete=whole and not any("missing" in t.missing for t in own),
    )


def _rank(score: TaskScore, rivals: list[TaskScore]) -> float:
    values = [-r.accuracy.mean for r in rivals if r.accuracy]
    ranks = stats.rankdata(values)
    return float(ranks[[r.mixer for r in rivals].index(score.mixer)])


def _differences(mixers: list[str], cells: dict[Key, _Cell]) -> list[Difference]:
    found = []
    for first, second in itertools.combinations(mixers, 2):
        pairs = [
            a.chosen[seed] - b.chosen[seed]
            for (mixer, task, setting), a in sorted(cells.items())
            if mixer == first and (b := cells.get((second, task, setting)))
            for seed in a.chosen.keys() & b.chosen.keys()
        ]
        if len(pairs) > 1:
            p = _wilcoxon(pairs)
            found.append(Difference(first, second, _bootstrap(np.array(pairs)), len(pairs), p, p))
    if not found:
        return []
    corrected = stats.false_discovery_control([d.p for d in found])
    return [d._replace(p_corrected=float(p)) for d, p in zip(found, corrected, strict=True)]


def _wilcoxon(pairs: list[float]) -> float:
    found: Any = stats.wilcoxon(pairs) if any(pairs) else None  # scipy refuses all zeros
    return float(found.pvalue) if found else 1.0


# ------------------------------------------------------------------ intervals


def _bootstrap(values: np.ndarray) -> Interval:
    """Return the mean with its percentile bootstrap interval."""
    mean = float(values.mean())
    if np.ptp(values) == 0:  # scipy has no interval for a constant
        return Interval(mean, mean, mean)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def _two_level(settings: list[list[float]]) -> Interval:
    """Return the mean of settings' means; the interval resamples settings, and seeds in each."""
    return _resampled(lambda rng: _resample(settings, rng), _mean([_mean(s) for s in settings]))


def _over_tasks(tasks: list[list[list[float]]]) -> Interval:
    """Return the mean of task scores; tasks are fixed, their settings and seeds resampled."""
    mean = _mean([_mean([_mean(s) for s in settings]) for settings in tasks])
    return _resampled(lambda rng: np.mean([_resample(s, rng) for s in tasks], axis=0), mean)


def _resample(settings: list[list[float]], rng: np.random.Generator) -> np.ndarray:
    """Draw the score of a task again, RESAMPLES times: settings first, then seeds in each."""
    means = np.stack(
        [
            np.array(seeds)[rng.integers(0, len(seeds), (RESAMPLES, len(seeds)))].mean(axis=1)
            for seeds in settings
        ]
    )
    drawn = rng.integers(0, len(settings), (RESAMPLES, len(settings)))
    return means[drawn, np.arange(RESAMPLES)[:, None]].mean(axis=1)


def _resampled(draw: Callable[[np.random.Generator], np.ndarray], mean: float) -> Interval:
    low, high = np.quantile(draw(np.random.default_rng(0)), [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
