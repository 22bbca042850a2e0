"""Where a sweep's time goes."""

import math
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rich.table import Table

from mad_efla import tracking
from mad_efla.execution import pool, processes
from mad_efla.plan.expand import Sweep
from mad_efla.runs.files import now
from mad_efla.runs.folder import finished
from mad_efla.runs.schema import SweepRecord
from mad_efla.runs.sweeps import write_sweep


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
        records = []
        for found in sweeps:
            record = SweepRecord(
                id=found.id,
                task=found.task,
                plan=found.plan,
                protocol=found.protocol,
                command="mad-efla bench overhead",
                started=now(),
                ended=None,
                fingerprints=tuple(r.fingerprint for r in found.runs),
            )
            write_sweep(out, record)
            records.append(record)
        stack.enter_context(tracking.Mirror(uri, out, *records))
        begun, wall, used = time.perf_counter(), time.time(), time.process_time()
        pool.execute(runs, out, device=device, workers=workers)
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
        table.add_row(what, f"{spent:.2f}", f"{100 * spent / total:.2f}", f"{100 * spent / steps:.2f}")
    table.caption = f"the driver used {driver:.1f} s of a processor beside the workers"
    return table
