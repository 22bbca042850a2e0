"""Seconds of training steps, mixer beside mixer, each beside its matrix products alone.

On a CPU only ratios mean something: the steps of all mixers are interleaved in one process, so that
whatever else the machine does falls on all of them, and medians are shown.
"""

import json
import signal
import statistics
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from rich.table import Table

from mad_efla.bench.products import Products
from mad_efla.execution import machine, processes
from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder
from mad_efla.training.loop import Loop


class StepTime(NamedTuple):
    """The time of one training step.

    Attributes:
        run: What was trained.
        seconds: Median over the rounds.
        spread: Interquartile range over the median.
        products: Seconds of its matrix products alone, median over the same rounds.
        flops: Operations of these products.
        least: The least of `seconds` and of `products`, which show the machine least disturbed.
        backends: Backends of operators that ran.
    """

    run: RunConfig
    seconds: float
    spread: float
    products: float
    flops: int
    least: tuple[float, float]
    backends: tuple[str, ...]


def steps(runs: list[RunConfig], device: str, rounds: int) -> list[StepTime]:
    """Time training steps of several runs, interleaved, on one thread of a process like a worker.

    Args:
        runs: What to train; nothing of it is kept.
        device: `cpu` or `cuda`.
        rounds: Timed steps of each, and of its matrix products.

    Raises:
        RuntimeError: The process ended without an answer; what it said is on its standard error.
    """
    answer, other = Pipe(duplex=False)
    process = processes.start(_steps, other, runs, device, rounds, device=device)
    other.close()
    try:
        return answer.recv()
    except EOFError:
        raise RuntimeError("the process that timed the steps ended without an answer") from None
    finally:
        process.join()


def _steps(environment: dict[str, str], answer: Connection, runs: list[RunConfig], device: str, rounds: int) -> None:
    processes.begin(environment, signal.SIG_DFL)
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        loops = [_loop(run, Path(scratch), device) for run in runs]
        for loop in loops * 3:
            loop.train_step()
        taken = [Products() for _ in loops]
        for loop, products in zip(loops, taken, strict=True):
            with products:
                loop.train_step()
            products()
        works = [work for pair in zip(loops, taken, strict=True) for work in pair]
        times = [[_time(work, device) for work in works] for _ in range(rounds)]
        columns = list(zip(*times, strict=True))
        found = [
            _step_time(run, loop, products, *columns[2 * i : 2 * i + 2])
            for i, (run, loop, products) in enumerate(zip(runs, loops, taken, strict=True))
        ]
    answer.send(found)


def _step_time(
    run: RunConfig, loop: Loop, products: Products, whole: tuple[float, ...], part: tuple[float, ...]
) -> StepTime:
    low, middle, high = statistics.quantiles(whole, n=4)
    least, backends = (min(whole), min(part)), tuple(sorted(loop.stepper.backends))
    alone = statistics.median(part)
    return StepTime(run, middle, (high - low) / middle, alone, products.flops, least, backends)


def write_steps(path: Path, times: list[StepTime], device: str) -> None:
    """Append the times of training steps to a file, one JSON object a line, with the machine."""
    found = machine.environment(device)
    with path.open("a", encoding="utf-8") as file:
        for t in times:
            line = {
                "setting": t.run.setting,
                "task": t.run.task.name,
                "mixer": t.run.mixer,
                "batch": t.run.train.batch_size,
                "length": t.run.task.input_length,
                "width": t.run.model.width,
                "vocabulary": t.run.task.vocabulary,
                "precision": t.run.train.precision,
                "step_ms": 1e3 * t.seconds,
                "products_ms": 1e3 * t.products,
                "least_step_ms": 1e3 * t.least[0],
                "least_products_ms": 1e3 * t.least[1],
                "spread": t.spread,
                "products_gflop": t.flops / 1e9,
                "backends": t.backends,
                "machine": found,
            }
            file.write(json.dumps(line) + "\n")


def _loop(run: RunConfig, scratch: Path, device: str) -> Loop:
    folder = RunFolder(scratch, run.fingerprint)
    folder.create(run)
    return Loop(run, folder, torch.device(device))


def _time(work: Loop | Products, device: str) -> float:
    start = time.perf_counter()
    work.train_step() if isinstance(work, Loop) else work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_times(times: list[StepTime]) -> Table:
    """Draw the times of training steps, beside their matrix products and the setting's first."""
    table = Table("setting", "mixer")
    for heading in ("ms per step", "spread", "of it products", "ratio", "tokens per second", "ratio to the first"):
        table.add_column(heading, justify="right")
    first: dict[str, float] = {}
    for run, seconds, spread, products, *_ in times:
        reference = first.setdefault(run.setting, seconds)
        tokens = run.train.batch_size * run.task.input_length
        table.add_row(
            run.setting,
            run.mixer,
            f"{1e3 * seconds:.0f}",
            f"{100 * spread:.0f} %",
            f"{1e3 * products:.0f}",
            f"{seconds / products:.2f}",
            f"{tokens / seconds:,.0f}",
            f"{seconds / reference:.2f}",
        )
    return table
