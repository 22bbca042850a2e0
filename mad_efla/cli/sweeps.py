"""The commands that make runs and follow them: sweep, status, logs."""

import contextlib
import math
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from mad_efla.cli.shared import (
    OUT,
    data_dir_option,
    device_option,
    draw,
    log_model_option,
    options,
    out_option,
    plan_option,
    says_errors,
    set_option,
    tracking_option,
)
from mad_efla.config import ConfigError

if TYPE_CHECKING:
    from mad_efla.execution.executors import Executor
    from mad_efla.plan.expand import Sweep
    from mad_efla.plan.run import RunConfig
    from mad_efla.runs.schema import SweepRecord
    from mad_efla.training.fits import Fit, Match


class _Told(NamedTuple):
    """What MLflow is told of a sweep; nothing without an address."""

    uri: str | None
    log_models: bool
    figures: bool


@click.command()
@click.argument("tasks", nargs=-1, required=True)
@options(
    plan_option,
    set_option,
    device_option,
    click.option(
        "--workers",
        type=click.IntRange(0),
        metavar="N",
        help="Worker processes, one thread each; 0 trains in this process.  [default: the cores]",
    ),
    click.option(
        "--per-device",
        type=click.IntRange(1),
        metavar="N",
        help="Runs that share a GPU, in processes of their own.  [default: 1]",
    ),
    click.option(
        "--executor",
        type=click.Choice(["local", "ray", "slurm"]),
        default="local",
        show_default=True,
        help="Whose processes: this machine's, or a cluster's.",
    ),
    out_option,
    tracking_option,
    click.option("--no-tracking", is_flag=True, help="Leave MLflow alone; `mad-efla sync` later."),
    log_model_option,
    click.option(
        "--no-figures", is_flag=True, help="Draw no figures for MLflow at the end; `mad-efla sync --figures` later."
    ),
    click.option("--dry-run", is_flag=True, help="Print the runs and an estimate, and stop."),
    click.option(
        "--max-hours", type=click.FloatRange(0, min_open=True), metavar="H", help="Stop after H hours as Ctrl-C would."
    ),
    click.option("--retry-failed", is_flag=True, help="Make runs again that failed by an error."),
    data_dir_option,
)
@says_errors
def sweep(
    tasks: tuple[str, ...],
    plan: str,
    assignments: tuple[str, ...],
    device: str,
    workers: int | None,
    per_device: int | None,
    executor: str,
    out: Path,
    tracking_uri: str | None,
    no_tracking: bool,
    log_models: bool,
    no_figures: bool,
    dry_run: bool,
    max_hours: float | None,
    retry_failed: bool,
) -> None:
    """Train every mixer of a plan on TASKS and show who learned what.

    Runs that are done already are not made again; what was interrupted goes on, as does what failed
    for want of memory, disk or a worker. What failed by an error of its own waits for
    --retry-failed.

    \b
    mad-efla sweep tasks/recall.yaml
    mad-efla sweep recall --plan mad --dry-run
    mad-efla sweep recall --set mixers=[efla] --set optim.lr=0.003
    mad-efla sweep recall --plan mad --executor ray
    """
    from mad_efla.execution import executors
    from mad_efla.plan import expand
    from mad_efla.training import fits

    runner = executors.choose(executor, device=device, workers=workers, per_device=per_device)
    sweeps = [expand.expand(task, plan, assignments, runner.precision) for task in tasks]
    found = [fits.check(sweep) for sweep in sweeps]
    if dry_run:
        _dry_run(sweeps, found, out, runner.slots)
        return
    from mad_efla import tracking
    from mad_efla.execution import processes

    if executor == "local" and workers != 0:
        processes.prepare(runner.device)
    uri = None if no_tracking else tracking.resolve_uri(tracking_uri)
    told = _Told(uri, log_models, figures=not no_figures)
    matches = [match for fit in found for match in fit.matches]
    sys.exit(_sweep(sweeps, matches, out, runner, told, max_hours, retry_failed))


def _dry_run(sweeps: "list[Sweep]", fits: "list[Fit]", out: Path, slots: int) -> None:
    from mad_efla.execution import costs
    from mad_efla.plan import expand
    from mad_efla.reporting import tables, terminal

    console = terminal.stdout()
    runs = []
    for found, fit in zip(sweeps, fits, strict=True):
        runs += found.runs
        for line in terminal.matches(fit.matches):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        terminal.show(tables.runs(found.runs, expand.differences(found.runs), fit.sizes))
    sizes = {f: s for fit in fits for f, s in fit.sizes.items()}
    for found in sweeps:
        if found.measured:
            of_cell = {key[:3]: own for key, own in found.measured.items()}
            seeds = [run.seed for run in next(iter(of_cell.values()))]
            more = [run for own in of_cell.values() for run in own]
            sizes |= {run.fingerprint: _size_of(run, found, sizes) for run in more}
            runs += more
            console.print(
                f"these choose, on seeds {list(found.choosing)}; then the chosen point of each of "
                f"{len(of_cell)} cells on seeds {seeds}: {len(more)} runs more",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    guess = costs.estimate(runs, out, sizes, slots)
    if search := sweeps[0].search:
        console.print(
            f"search {search.method}: {search.trials} trials like each of these, over {', '.join(search.over)}"
        )
        guess = guess._replace(seconds=guess.seconds * search.trials)
    same = f"protocol {sweeps[0].protocol}, precision {runs[0].train.precision}"
    console.print(
        f"{len(runs)} runs, {guess.done} of them done; {same}; "
        f"about {terminal.duration(guess.seconds)} on {slots} workers ({guess.basis})",
        soft_wrap=True,
        highlight=False,
    )


def _size_of(run: "RunConfig", found: "Sweep", sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Return the size of a measured run's model: that of the run that chooses beside it."""
    alike = next(r for r in found.runs if (r.mixer, r.condition) == (run.mixer, run.condition))
    return sizes[alike.fingerprint]


def _sweep(
    sweeps: "list[Sweep]",
    matches: "list[Match]",
    out: Path,
    runner: "Executor",
    told: _Told,
    max_hours: float | None,
    retry_failed: bool,
) -> int:
    """Make what is missing, mirror it, print the tables; return the exit status."""
    from mad_efla import tracking
    from mad_efla.execution.choosing import decided
    from mad_efla.execution.queue import OutOfTime
    from mad_efla.reporting import terminal
    from mad_efla.runs.files import ensure_writable
    from mad_efla.runs.folder import quarantine_broken

    ensure_writable(out)
    err = terminal.stderr()
    sweeps = [decided(s, out) for s in sweeps]
    runs = list({r.fingerprint: r for s in sweeps for r in s.runs}.values())
    for note in quarantine_broken(out, [r.fingerprint for r in runs]):
        err.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    for line in dict.fromkeys(terminal.matches(matches)):
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    records = [_record(s, out) for s in sweeps]
    interrupted, deadline = False, math.inf
    if max_hours is not None:
        deadline = time.monotonic() + 3600 * max_hours
    with contextlib.ExitStack() as stack:
        mirrors = [
            stack.enter_context(tracking.Mirror(told.uri, out, record, log_models=told.log_models))
            for record in records
            if told.uri is not None
        ]
        try:
            if sweeps[0].search:
                for found, record in zip(sweeps, records, strict=True):
                    _explore(found, record, out, runner, deadline, retry_failed)
            else:
                _make(sweeps, out, runner, deadline, retry_failed)
                if any(found.measured for found in sweeps):
                    sweeps = [decided(found, out) for found in sweeps]
                    records = [_record(found, out) for found in sweeps]
                    _make(sweeps, out, runner, deadline, retry_failed=False)
        except OutOfTime:
            interrupted = True
            err.print(f"stopped after {max_hours:g} hours; the same command goes on", markup=False)
        except KeyboardInterrupt:
            interrupted = True
            err.print("interrupted: finished runs stay; the same command goes on", markup=False)
        sweeps = [_ended(found, out) for found in sweeps]
        failed = _print_results(sweeps, out)
        if mirrors and told.figures and not interrupted:
            draw(records, out)
    for problem in filter(None, (m.problem for m in mirrors)):
        err.print(f"warning: {problem}", markup=False, highlight=False, soft_wrap=True)
    _print_next(out, told.uri)
    return 130 if interrupted else 1 if failed else 0


def _make(sweeps: "list[Sweep]", out: Path, runner: "Executor", deadline: float, retry_failed: bool) -> None:
    """Make the runs of sweeps that have no result yet."""
    from mad_efla.execution.costs import Costs
    from mad_efla.execution.queue import RunQueue
    from mad_efla.reporting import live
    from mad_efla.runs.folder import finished, permanently_failed

    runs = list({r.fingerprint: r for s in sweeps for r in s.runs}.values())
    settled = set(finished(out, [r.fingerprint for r in runs]))
    if not retry_failed:
        settled |= permanently_failed(out, runs)
    waiting = [r for r in runs if r.fingerprint not in settled]
    if waiting:
        costs = Costs(runs).read(out)
        with live.Follow(runs, waiting, costs, runner.slots) as follow:
            runner.perform(
                RunQueue(waiting, out, costs), watch=follow.update, deadline=deadline, limits=sweeps[0].limits
            )


def _explore(
    found: "Sweep", record: "SweepRecord", out: Path, runner: "Executor", deadline: float, retry_failed: bool
) -> None:
    """Make the trials of a sweep that searches."""
    from mad_efla.execution import costs, search
    from mad_efla.execution.local import Local
    from mad_efla.reporting import live

    if not isinstance(runner, Local):
        raise ConfigError(
            f"plan {found.plan}: search proposes a trial when a worker of this machine is free; use --executor local"
        )
    work = search.Explore(found, record, out, costs.Costs([]), retry_failed=retry_failed)
    with live.Follow(work.runs, list(work.waiting.values()), work.costs, runner.slots, work.total) as follow:
        runner.perform(work, watch=follow.update, deadline=deadline, limits=found.limits)


def _ended(found: "Sweep", out: Path) -> "Sweep":
    """Write that a call has ended; return the sweep with the runs that it has by now."""
    from mad_efla.runs.files import now
    from mad_efla.runs.folder import RunFolder
    from mad_efla.runs.sweeps import read_sweeps, write_sweep

    (record,) = (r for r in read_sweeps(out) if r.id == found.id)
    write_sweep(out, record.model_copy(update={"ended": now()}))
    if not found.search:
        return found
    return found._replace(runs=[RunFolder(out, f).run() for f in record.fingerprints])


def _record(found: "Sweep", out: Path) -> "SweepRecord":
    from mad_efla.runs.files import now
    from mad_efla.runs.schema import SweepRecord, planned
    from mad_efla.runs.sweeps import read_sweeps, write_sweep

    known = {r.id: r for r in read_sweeps(out)}
    fingerprints = tuple(r.fingerprint for r in found.runs)
    if found.search:  # its trials so far, in their order
        fingerprints = known[found.id].fingerprints if found.id in known else ()
    record = SweepRecord(
        id=found.id,
        task=found.task,
        plan=found.plan,
        protocol=found.protocol,
        about=found.about,
        command=shlex.join(["mad-efla", *sys.argv[1:]]).encode("utf-8", "replace").decode(),  # names may be any bytes
        fingerprints=fingerprints,
        planned=() if found.search else tuple(planned(r, chooses=r.seed in found.choosing) for r in found.runs),
        started=known[found.id].started if found.id in known else now(),
        ended=None,
    )
    write_sweep(out, record)
    return record


def _print_results(sweeps: "list[Sweep]", out: Path) -> bool:
    """Print a table for each sweep and what failed; return whether anything did."""
    from mad_efla.analysis.cells import cells
    from mad_efla.reporting import tables, terminal
    from mad_efla.runs.folder import RunFolder, finished
    from mad_efla.runs.read import of_runs

    err, failed = terminal.stderr(), False
    for found in sweeps:
        results = finished(out, [r.fingerprint for r in found.runs])
        choosing = [r for r in found.runs if r.seed in found.choosing]
        measured = [r for r in found.runs if r.seed not in found.choosing]
        shown = cells(of_runs(measured, results, choosing=choosing))
        title = f"{found.task}, plan {found.plan}, protocol {found.protocol}; 95 % intervals over seeds"
        if shown:
            terminal.show(tables.sweep(shown, title))
        absent = [r for r in found.runs if r.fingerprint not in results]
        standing = {r.fingerprint: RunFolder(out, r.fingerprint).status() for r in absent}
        if pruned := list(standing.values()).count("pruned"):
            err.print(f"{pruned} of {len(found.runs)} runs were pruned", highlight=False)
        if len(absent) > pruned:
            text = f"{len(absent) - pruned} of {len(found.runs)} runs have no result"
            err.print(text, highlight=False)
        for run in absent:
            folder = RunFolder(out, run.fingerprint)
            if standing[run.fingerprint] == "failed":
                failed = True
                text = terminal.failure(run, folder)
                err.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    return failed


def _print_next(out: Path, tracking_uri: str | None) -> None:
    """Say where the results are and what shows them."""
    from mad_efla.reporting import terminal

    console = terminal.stdout()
    console.print(f"results: {out}", markup=False, highlight=False, soft_wrap=True)
    if tracking_uri is not None:
        # A URI may hold a password; the option as typed is enough to repeat.
        given = "--tracking-uri" in " ".join(sys.argv)
        option = f" --tracking-uri {tracking_uri}" if given and "@" not in tracking_uri else ""
        console.print(f"compare: mad-efla ui{option}", markup=False, soft_wrap=True)


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), default=OUT)
@says_errors
def status(runs: Path) -> None:
    """Say how the sweeps under RUNS stand: counts, what runs, what failed and why, time left."""
    from mad_efla.execution import costs
    from mad_efla.reporting import terminal
    from mad_efla.runs import status

    found = status.sweep_statuses(runs)
    costs = costs.Costs(r for standing in found for r in standing.runs).read(runs)
    lines = [line for standing in found for line in terminal.standing(standing)]
    for line in (*lines, *filter(None, [terminal.left(found, costs)])):
        terminal.stdout().print(line, markup=False, highlight=False, soft_wrap=True)


@click.command()
@click.argument("run")
@out_option
@says_errors
def logs(run: str, out: Path) -> None:
    """Print what RUN, or a run whose name begins so, has logged: figures, warnings, a traceback."""
    from mad_efla.reporting import terminal
    from mad_efla.runs import status

    folder = status.find(out, run)
    for line in terminal.log(folder):
        click.echo(line)
