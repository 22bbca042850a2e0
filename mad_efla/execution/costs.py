"""What runs cost: seconds of one worker, learned from the runs that have finished.

    alike      a finished run that differs in seed and optimiser only: the mean of their seconds
    rate       else seconds per token of the same mixer, at the nearest shape that was seen
    median     else the median of the rates that were seen of other mixers
    guess      with nothing seen at all: the arithmetic of a training step (six operations per
               parameter and token) against this machine's measured speed of a matrix product

Tokens are those trained on, and those evaluated at a third, since nothing goes backward there.
"""

import functools
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import finished
from mad_efla.runs.schema import Result

_SHARE_OF_MATRIX_SPEED = 0.25  # seen for the shipped mixers at width 128 on a CPU

_Point = tuple[str, tuple[float, ...]]  # a mixer and a shape


class _Kind(NamedTuple):
    """What a run's cost depends on."""

    alike: str
    point: _Point
    steps: int
    tokens: float


class Costs:
    """The costs of runs, better known with every run that finishes.

    Args:
        runs: The runs of a sweep.
    """

    def __init__(self, runs: Iterable[RunConfig]):
        self._kinds = {run.fingerprint: _kind(run) for run in runs}
        self._alike: dict[str, tuple[float, int]] = {}  # seconds, runs
        self._spent: dict[_Point, tuple[float, float]] = {}  # seconds, tokens
        self._pace: dict[_Point, float] = {}  # seconds per token of runs under way
        self._rates: dict[_Point, float | None] = {}  # what was looked up since the last lesson

    def add(self, run: RunConfig) -> None:
        """Take in a run that was not known before."""
        self._kinds[run.fingerprint] = _kind(run)

    def read(self, out: Path) -> "Costs":
        """Learn from the results there are under `out`."""
        for fingerprint, result in finished(out, list(self._kinds)).items():
            self.observe_result(fingerprint, result)
        return self

    def observe_result(self, fingerprint: str, result: Result) -> None:
        """Learn from a run that has finished."""
        kind = self._kinds[fingerprint]
        seconds, count = self._alike.get(kind.alike, (0.0, 0))
        self._alike[kind.alike] = seconds + result.seconds, count + 1
        seconds, tokens = self._spent.get(kind.point, (0.0, 0.0))
        made = kind.tokens * result.steps / kind.steps
        self._spent[kind.point] = seconds + result.seconds, tokens + made
        self._rates.clear()

    def observe_rate(self, fingerprint: str, tokens_per_second: float) -> None:
        """Take the pace of a run under way, for as long as none of its kind has finished."""
        self._pace[self._kinds[fingerprint].point] = 1 / tokens_per_second
        self._rates.clear()

    def seconds(self, fingerprint: str) -> float | None:
        """Return the cost of a whole run; None while nothing at all has been seen."""
        kind = self._kinds[fingerprint]
        if kind.alike in self._alike:
            seconds, count = self._alike[kind.alike]
            return seconds / count
        if kind.point not in self._rates:
            self._rates[kind.point] = self._rate(kind.point)
        rate = self._rates[kind.point]
        return None if rate is None else rate * kind.tokens

    def longest(self, fingerprints: Iterable[str]) -> str:
        """Name the run that costs most; by its tokens, while nothing has been seen."""

        def cost(fingerprint: str) -> float:
            seconds = self.seconds(fingerprint)
            return self.tokens(fingerprint) if seconds is None else seconds

        return max(fingerprints, key=cost)

    def seconds_left(self, waiting: Iterable[str], under_way: Mapping[str, float], workers: int) -> float | None:
        """Return the seconds until all runs have ended; None while nothing has been seen.

        Args:
            waiting: Runs that have not begun.
            under_way: Runs that have, and the share of each that is done.
            workers: How many run at a time.
        """
        found = [(self.seconds(f), 0.0) for f in waiting]
        found += [(self.seconds(f), share) for f, share in under_way.items()]
        parts = [seconds * (1 - share) for seconds, share in found if seconds is not None]
        if len(parts) < len(found):
            return None
        return max(math.fsum(parts) / max(workers, 1), max(parts, default=0.0))

    def is_seen(self, fingerprint: str) -> bool:
        """Tell whether a run of the same mixer has been seen."""
        mixer = self._kinds[fingerprint].point[0]
        return any(mixer == name for name, _ in (*self._spent, *self._pace))

    def tokens(self, fingerprint: str) -> float:
        """Return what a run's cost is proportional to."""
        return self._kinds[fingerprint].tokens

    def _rate(self, point: _Point) -> float | None:
        seen = self._pace | {p: s / t for p, (s, t) in self._spent.items() if t}
        mixer, shape = point
        same = {p[1]: rate for p, rate in seen.items() if p[0] == mixer}
        if same:
            return same[min(same, key=lambda other: math.dist(other, shape))]
        return statistics.median(seen.values()) if seen else None


def _kind(run: RunConfig) -> _Kind:
    train, data, length = run.train, run.data, run.task.input_length
    looked_at = data.validation_examples + data.test_examples * (train.select_split == "test")
    evaluated = -(-run.steps // run.eval_every) * looked_at * length
    sizes = length, run.task.vocabulary, run.model.width, run.model.depth, train.batch_size
    return _Kind(
        alike=f"{run.task!r} {data!r} {run.model!r} {run.mixers!r} {train!r}",
        point=(run.mixer, tuple(math.log2(size) for size in sizes)),
        steps=run.steps,
        tokens=run.tokens + evaluated / 3,
    )


class Estimate(NamedTuple):
    """Seconds until the runs of a sweep have ended.

    Attributes:
        seconds: Of all workers together at it.
        done: Runs that have ended before.
        basis: What the estimate rests on.
    """

    seconds: float
    done: int
    basis: str


def estimate(runs: list[RunConfig], out: Path, sizes: Mapping[str, tuple[int, int | None]], workers: int) -> Estimate:
    """Estimate the time of the runs that have no result under `out` yet.

    Args:
        runs: All runs of a sweep.
        out: The folder of run folders.
        sizes: Parameters and state size by fingerprint; a state may be unknown.
        workers: How many run at a time.
    """
    costs = Costs(runs)
    results = finished(out, [r.fingerprint for r in runs])
    for fingerprint, result in results.items():
        costs.observe_result(fingerprint, result)
    waiting = [r for r in runs if r.fingerprint not in results]
    left = costs.seconds_left([r.fingerprint for r in waiting], {}, workers)
    if left is None:
        speed = _operations_per_second(waiting[0].train.precision) * _SHARE_OF_MATRIX_SPEED
        guesses = [6 * sizes[r.fingerprint][0] * costs.tokens(r.fingerprint) for r in waiting]
        left = max(math.fsum(guesses) / max(workers, 1), max(guesses)) / speed
        return Estimate(left, 0, "rough: from parameters and matrix speed")
    basis = "from finished runs"
    if not all(costs.is_seen(r.fingerprint) for r in waiting):
        basis = "rough: from finished runs of other mixers"
    return Estimate(left, len(results), basis)


@functools.cache
def _operations_per_second(precision: str) -> float:
    """Time a matrix product of a training step's shape, on one thread of the CPU."""
    import torch  # seconds of import that nothing else here needs

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.ones(4096, 128, dtype=dtype), torch.ones(128, 512, dtype=dtype)
        best = math.inf
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 2 * 4096 * 128 * 512 / best
