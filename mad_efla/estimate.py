"""How long a sweep will take, from what this machine has been seen to do.

Once runs of a mixer are finished in the folder, their seconds per token are used. Before that, the
arithmetic of a training step (six operations per parameter and token) is set against this machine's
measured speed of a matrix product.
"""

import time
from pathlib import Path
from typing import NamedTuple

import torch

from mad_efla import store
from mad_efla.run import RunConfig

_SHARE_OF_MATRIX_SPEED = 0.25  # seen for the shipped mixers at width 128 on a CPU


class Estimate(NamedTuple):
    """Seconds of one worker.

    Attributes:
        seconds: For all runs that are not done, one after the other.
        done: Runs that are.
        basis: What the estimate rests on.
    """

    seconds: float
    done: int
    basis: str


def estimate(runs: list[RunConfig], out: Path, sizes: dict[str, tuple[int, int]]) -> Estimate:
    """Estimate the time of the runs that have no result under `out` yet.

    Args:
        runs: All runs of a sweep.
        out: The folder of run folders.
        sizes: Parameters and state size by fingerprint.
    """
    results = store.finished(out, [r.fingerprint for r in runs])
    spent: dict[str, tuple[float, int]] = {}
    for run in runs:
        result = results.get(run.fingerprint)
        if result and result.steps:
            seconds, tokens = spent.get(run.mixer, (0.0, 0))
            made = tokens + run.tokens * result.steps // run.steps
            spent[run.mixer] = seconds + result.seconds, made
    waiting = [r for r in runs if r.fingerprint not in results]
    measured = [r for r in waiting if r.mixer in spent]
    guessed = [r for r in waiting if r.mixer not in spent]
    total = sum(r.tokens * spent[r.mixer][0] / spent[r.mixer][1] for r in measured)
    if guessed:
        speed = _operations_per_second(guessed[0].train.precision) * _SHARE_OF_MATRIX_SPEED
        total += sum(6 * sizes[r.fingerprint][0] * r.tokens for r in guessed) / speed
    basis = "from finished runs" if not guessed else "rough: from parameters and matrix speed"
    return Estimate(total, len(results), basis)


def seconds_left(runs: list[RunConfig], out: Path) -> float | None:
    """Estimate the time of one worker for the runs without a result, from the finished ones alone.

    Returns:
        Seconds; None while a mixer that is waited for has no finished run.
    """
    results = store.finished(out, [r.fingerprint for r in runs])
    waiting = {r.mixer for r in runs if r.fingerprint not in results}
    if waiting - {r.mixer for r in runs if r.fingerprint in results}:
        return None
    return estimate(runs, out, {}).seconds


def _operations_per_second(precision: str) -> float:
    """Time a matrix product of a training step's shape, on one thread of the CPU."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.ones(4096, 128, dtype=dtype), torch.ones(128, 512, dtype=dtype)
        best = min(_seconds(a, b) for _ in range(6))
    finally:
        torch.set_num_threads(threads)
    return 2 * 4096 * 128 * 512 / best


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - start
