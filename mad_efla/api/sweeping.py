"""Make what a sweep lacks, mirror it in MLflow, and say how it ended; nothing here prints.

The command and `mad_efla.sweep` both go through `perform`, so that they leave the same files.
"""

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from mad_efla.config import ConfigError
from mad_efla.execution.choosing import decided, named
from mad_efla.execution.costs import Costs
from mad_efla.execution.executors import Executor
from mad_efla.execution.queue import OutOfTime, RunQueue, Watch
from mad_efla.plan.expand import Sweep
from mad_efla.plan.run import RunConfig
from mad_efla.reporting import drawing
from mad_efla.runs.archive import Archive
from mad_efla.runs.files import ensure_writable, now
from mad_efla.runs.folder import RunFolder, finished, permanently_failed, quarantine_broken
from mad_efla.runs.schema import SweepRecord
from mad_efla.runs.sweeps import read_sweeps, write_sweep

Follow = Callable[..., AbstractContextManager[Any]]
"""Made as `reporting.live.Follow`; what it gives has `update`, which is told what happens."""


class Mirrored(NamedTuple):
    """What MLflow is told of a sweep; nothing without an address.

    Attributes:
        uri: Of the store; None for none.
        log_models: Log the models of finished runs.
        figures: Draw figures at the end.
    """

    uri: str | None = None
    log_models: bool = False
    figures: bool = False


class Ended(NamedTuple):
    """How a call ended.

    Attributes:
        sweeps: With all runs that they have by now.
        stopped: Why it stopped before its end, in a sentence; empty if it did not.
        warnings: What the user has to know beside the runs, a line each.
    """

    sweeps: list[Sweep]
    stopped: str
    warnings: list[str]


def prepare(sweeps: list[Sweep], out: Path, known: Sequence[Path] = ()) -> tuple[list[Sweep], list[str]]:
    """Make the folder ready, unpack what is known of the runs, and add those that earlier calls have chosen.

    Args:
        sweeps: As the plan has them.
        out: The folder of run folders.
        known: Archives; what they hold of these runs is not made again.

    Returns:
        The sweeps, and notes on what was set aside because it could not be read.

    Raises:
        ConfigError: The folder can't be written.
    """
    ensure_writable(out)
    wanted = {r.fingerprint for s in sweeps for own in (s.runs, *s.measured.values()) for r in own}
    for path in known:
        held = Archive(path).runs
        for fingerprint in sorted(wanted & held.keys()):
            held[fingerprint].unpack(out)
    sweeps = [decided(sweep, out) for sweep in sweeps]
    return sweeps, quarantine_broken(out, [r.fingerprint for r in _runs(sweeps)])


def perform(
    sweeps: list[Sweep],
    out: Path,
    runner: Executor,
    follow: Follow,
    mirrored: Mirrored,
    *,
    then: Callable[[list[Sweep]], object] = lambda sweeps: None,
    hours: float | None = None,
    retry_failed: bool = False,
) -> Ended:
    """Make the runs that have no result yet; killed or stopped, the next call goes on.

    Args:
        sweeps: As `prepare` returns them.
        out: The folder of run folders.
        runner: Where the runs run.
        follow: What is told of progress.
        mirrored: What MLflow is told.
        then: Called when the runs have ended, before figures are drawn.
        hours: When to stop, as Ctrl-C would; None for never.
        retry_failed: Make runs again that failed by an error.
    """
    records = [record(sweep, out) for sweep in sweeps]
    deadline = math.inf if hours is None else time.monotonic() + 3600 * hours
    stopped, warnings = "", []
    with contextlib.ExitStack() as stack:
        mirror = None
        if mirrored.uri is not None:
            from mad_efla import tracking

            mirror = stack.enter_context(tracking.Mirror(mirrored.uri, out, *records, log_models=mirrored.log_models))
        try:
            if sweeps[0].search:
                for sweep, own in zip(sweeps, records, strict=True):
                    _explore(sweep, own, out, runner, follow, deadline, retry_failed)
            else:
                _make(sweeps, out, runner, follow, deadline, retry_failed)
                if any(sweep.measured for sweep in sweeps):
                    sweeps = [decided(sweep, out) for sweep in sweeps]
                    records = [record(sweep, out) for sweep in sweeps]
                    _make(sweeps, out, runner, follow, deadline, retry_failed=False)
        except OutOfTime:
            stopped = f"stopped after {hours:g} hours; the same command goes on"
        except KeyboardInterrupt:
            stopped = "interrupted: finished runs stay; the same command goes on"
        sweeps = [_end(sweep, out) for sweep in sweeps]
        then(sweeps)
        if mirror and mirrored.figures and not stopped:
            try:
                warnings += [f"warning: {problem}" for problem in drawing.draw(out, records)]
            except KeyboardInterrupt:
                warnings.append("interrupted: `mad-efla sync --figures` draws the rest")
    if mirror:
        warnings += mirror.said()
    return Ended(sweeps, stopped, warnings)


def record(sweep: Sweep, out: Path) -> SweepRecord:
    """Write what a sweep is made of, as it is known now, beside its runs."""
    known = {r.id: r for r in read_sweeps(out)}
    fingerprints = tuple(r.fingerprint for r in sweep.runs)
    if sweep.search:  # its trials so far, in their order
        fingerprints = known[sweep.id].fingerprints if sweep.id in known else ()
    found = SweepRecord(
        id=sweep.id,
        task=sweep.task,
        plan=sweep.plan,
        protocol=sweep.protocol,
        about=sweep.about,
        command=shlex.join(["mad-efla", *sys.argv[1:]]).encode("utf-8", "replace").decode(),  # names may be any bytes
        fingerprints=fingerprints,
        planned=() if sweep.search else named(sweep),
        started=known[sweep.id].started if sweep.id in known else now(),
        ended=None,
    )
    write_sweep(out, found)
    return found


def _runs(sweeps: list[Sweep]) -> list[RunConfig]:
    return list({r.fingerprint: r for sweep in sweeps for r in sweep.runs}.values())


def _make(
    sweeps: list[Sweep], out: Path, runner: Executor, follow: Follow, deadline: float, retry_failed: bool
) -> None:
    runs = _runs(sweeps)
    settled = set(finished(out, [r.fingerprint for r in runs]))
    if not retry_failed:
        settled |= permanently_failed(out, runs)
    waiting = [r for r in runs if r.fingerprint not in settled]
    if waiting:
        costs = Costs(runs).read(out)
        with follow(runs, waiting, costs, runner.slots) as shown:
            _perform(runner, RunQueue(waiting, out, costs), shown.update, deadline, sweeps[0])


def _explore(
    sweep: Sweep, own: SweepRecord, out: Path, runner: Executor, follow: Follow, deadline: float, retry_failed: bool
) -> None:
    """Make the trials of a sweep that searches."""
    from mad_efla.execution import search
    from mad_efla.execution.local import Local

    if not isinstance(runner, Local):
        raise ConfigError(
            f"plan {sweep.plan}: search proposes a trial when a worker of this machine is free; use --executor local"
        )
    work = search.Explore(sweep, own, out, Costs([]), retry_failed=retry_failed)
    with follow(work.runs, list(work.waiting.values()), work.costs, runner.slots, work.total) as shown:
        _perform(runner, work, shown.update, deadline, sweep)


def _perform(runner: Executor, work: RunQueue, watch: Watch, deadline: float, sweep: Sweep) -> None:
    runner.perform(work, watch=watch, deadline=deadline, limits=sweep.limits)


def _end(sweep: Sweep, out: Path) -> Sweep:
    """Write that a call has ended; return the sweep with the runs that it has by now."""
    (own,) = (r for r in read_sweeps(out) if r.id == sweep.id)
    write_sweep(out, own.model_copy(update={"ended": now()}))
    if not sweep.search:
        return sweep
    return sweep._replace(runs=[RunFolder(out, f).run() for f in own.fingerprints])
