"""How long things take: a training step, mixer beside mixer, the generation of data, and all else.

Of steps only the ratios mean something on a CPU: those of all mixers are interleaved, in one
process, so that whatever else the machine does falls on all of them, and the median of each is
shown, with that of its matrix products alone, in the same rounds. Data is timed in processor
seconds of one core. What a sweep spends beside its training steps is counted inside the runs, and
set against the seconds that its workers had.
"""

import json
import math
import signal
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from rich.table import Table

from mad_efla import data, execute, machine, processes, tracking
from mad_efla.products import Products
from mad_efla.run import RunConfig
from mad_efla.store import RunFolder, SweepRecord, finished, now, write_sweep
from mad_efla.sweep import Setting, Sweep
from mad_efla.train import Loop


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


def _steps(
    environment: dict[str, str], answer: Connection, runs: list[RunConfig], device: str, rounds: int
) -> None:
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
    run: RunConfig,
    loop: Loop,
    products: Products,
    whole: tuple[float, ...],
    part: tuple[float, ...],
) -> StepTime:
    low, middle, high = statistics.quantiles(whole, n=4)
    least, backends = (min(whole), min(part)), tuple(sorted(loop.stepper.backends))
    alone = statistics.median(part)
    return StepTime(run, middle, (high - low) / middle, alone, products.flops, least, backends)


def write_steps(path: Path, times: list[StepTime], device: str) -> None:
    """Append the times of training steps to a file, one JSON object a line, with the machine."""
    found = machine.environment(device)
    with path.open("a") as file:
        for t in times:
            line = {
                "setting": t.run.setting, "task": t.run.task.name, "mixer": t.run.mixer,
                "batch": t.run.train.batch_size, "length": t.run.task.input_length,
                "width": t.run.model.width, "vocabulary": t.run.task.vocabulary,
                "precision": t.run.train.precision, "step_ms": 1e3 * t.seconds,
                "products_ms": 1e3 * t.products, "least_step_ms": 1e3 * t.least[0],
                "least_products_ms": 1e3 * t.least[1], "spread": t.spread,
                "products_gflop": t.flops / 1e9, "backends": t.backends, "machine": found,
            }  # fmt: skip
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


class DataTime(NamedTuple):
    """The time of generating a setting's data.

    Attributes:
        setting: What was generated: all three splits.
        seconds: Processor time, least of the rounds.
        megabytes: Of all arrays.
        ceiling: Share of scored test positions that can be answered.
    """

    setting: Setting
    seconds: float
    megabytes: float
    ceiling: float


def data_times(settings: list[Setting], seed: int, rounds: int) -> Iterator[DataTime]:
    """Generate the data of settings, one after the other, and time it.

    Args:
        settings: What to generate; nothing of it is kept.
        seed: Of the data.
        rounds: How often; more show the machine less disturbed.
    """
    for setting in settings:
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            made = data.make(setting.task, seed, setting.data)
            seconds.append(time.process_time() - start)
        columns = [c for split in data.SPLITS for c in getattr(made, split) if c is not None]
        megabytes = sum(c.nbytes for c in columns) / 1e6
        yield DataTime(setting, min(seconds), megabytes, data.ceiling(setting.task, made))


def data_table(times: Iterable[DataTime]) -> Table:
    """Draw the times of data, a row for each setting, and their sum."""
    table = Table("task", "setting", show_footer=True)
    rows = list(times)
    total = f"{sum(t.seconds for t in rows):.2f}"
    for heading, footer in (
        ("vocabulary", ""), ("tokens", ""), ("training examples", ""), ("MB", ""), ("ceiling", ""),
        ("seconds", total),
    ):  # fmt: skip
        table.add_column(heading, footer, justify="right")
    for (label, task, sizes), seconds, megabytes, ceiling in rows:
        table.add_row(
            task.name, label, str(task.vocabulary), str(task.input_length),
            f"{sizes.train_examples:,}", f"{megabytes:.1f}", f"{ceiling:.4f}", f"{seconds:.3f}",
        )  # fmt: skip
    return table


class Split(NamedTuple):
    """Where the time of a sweep's workers went.

    Attributes:
        runs: How many ran.
        workers: Processes.
        seconds: From the call to its end.
        parts: Worker-seconds by what for; together `workers` x `seconds`.
        driver: Processor seconds of the driver, which mirrors to MLflow meanwhile.
    """

    runs: int
    workers: int
    seconds: float
    parts: dict[str, float]
    driver: float


def overhead(sweeps: list[Sweep], device: str, workers: int) -> Split:
    """Make the runs of sweeps in a folder of their own, mirrored to MLflow, and split the time.

    Args:
        sweeps: Of one call; nothing of them is kept.
        device: `cpu` or `cuda`.
        workers: Worker processes, at least one.
    """
    runs = [run for found in sweeps for run in found.runs]
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        out, uri = Path(scratch) / "runs", f"sqlite:///{scratch}/mlflow.db"
        processes.prepare(device)
        for found in sweeps:
            record = SweepRecord(
                id=found.id, task=found.task, plan=found.plan, protocol=found.protocol,
                command="mad-efla bench overhead", started=now(), ended=None,
                fingerprints=tuple(r.fingerprint for r in found.runs),
            )  # fmt: skip
            write_sweep(out, record)
            stack.enter_context(tracking.Mirror(uri, out, record))
        begun, wall, used = time.perf_counter(), time.time(), time.process_time()
        execute.execute(runs, out, device=device, workers=workers)
        seconds = time.perf_counter() - begun
        driver = time.process_time() - used
        stack.close()
        results = list(finished(out, [r.fingerprint for r in runs]).values())
    starts = sorted(r.ended / 1e3 - r.seconds - wall for r in results)[:workers]
    parts = {"training steps": math.fsum(r.train_seconds for r in results)}
    for what in ("evaluation", "spectrum", "data", "model", "logging", "checkpoint"):
        parts[what] = math.fsum(r.spent.get(what, 0.0) for r in results)
    parts["else in runs"] = math.fsum(r.seconds for r in results) - math.fsum(parts.values())
    parts["workers' start"] = math.fsum(starts)
    # Nothing is left when a worker ends its last run, so these ends are the latest of all.
    ends = sorted(r.ended / 1e3 - wall for r in results)[-len(starts) :]
    idle = math.fsum(seconds - end for end in ends)
    parts["between runs"] = len(starts) * seconds - math.fsum(parts.values()) - idle
    parts["no run left"] = idle
    return Split(len(results), len(starts), seconds, parts, driver)


def split_table(split: Split) -> Table:
    """Draw where the time went, and what a training step's second costs beside it."""
    runs, workers, seconds, parts, driver = split
    title = f"{runs} runs, {workers} workers, {seconds:.1f} s"
    table = Table("", title=title, show_footer=True)
    total, steps = workers * seconds, parts["training steps"]
    beside = math.fsum(parts.values()) - steps
    table.columns[0].footer = "beside the steps"
    for heading, footer in (
        ("worker-seconds", f"{beside:.2f}"),
        ("% of all", f"{100 * beside / total:.2f}"),
        ("% of the training steps", f"{100 * beside / steps:.2f}"),
    ):
        table.add_column(heading, footer, justify="right")
    for what, spent in parts.items():
        table.add_row(
            what, f"{spent:.2f}", f"{100 * spent / total:.2f}", f"{100 * spent / steps:.2f}"
        )
    table.caption = f"the driver used {driver:.1f} s of a processor beside the workers"
    return table
