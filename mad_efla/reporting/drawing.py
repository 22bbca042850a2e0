"""The figures of sweeps, drawn in a process of its own: its end gives their memory back."""

import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from mad_efla.execution import processes
from mad_efla.runs.schema import SweepRecord


def draw(out: Path, records: list[SweepRecord]) -> Iterator[str]:
    """Draw what MLflow shows of sweeps, see `figures.artifacts`.

    Args:
        out: The folder of run folders.
        records: Of the sweeps.

    Yields:
        What could not be drawn, and why; the results are there all the same.
    """
    pipe, theirs = processes.context.Pipe(duplex=False)
    process = processes.start(_draw, theirs, out, records)
    theirs.close()
    try:
        while True:
            yield pipe.recv()
    except EOFError:
        process.join()
        if process.exitcode:
            yield f"the process that draws ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
        pipe.close()


def _draw(environment: dict[str, str], pipe: Connection, out: Path, records: list[SweepRecord]) -> None:
    processes.begin(environment, signal.SIG_DFL)
    from mad_efla.reporting.figures import artifacts

    for record in records:
        try:
            artifacts.of_sweep(out, record)
        except Exception as error:  # a plug-in's dynamics, a full disk
            pipe.send(f"{record.task}, plan {record.plan}: not all is drawn: {error!r}")
    pipe.close()
    processes.end()
