"""The commands that make runs and follow them: sweep, status, logs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mad_efla.cli.shared import (
    OUT,
    data_dir_option,
    device_option,
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
    from mad_efla.api.sweeping import Mirrored
    from mad_efla.execution.executors import Executor
    from mad_efla.plan.expand import Sweep
    from mad_efla.plan.run import RunConfig
    from mad_efla.training.fits import Fit, Match


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
        help="Whose processes make the runs: this machine's, or a cluster's (Ray, Slurm).",
    ),
    out_option,
    tracking_option,
    click.option("--no-tracking", is_flag=True, help="Leave MLflow alone; `mad-efla sync` can tell it later."),
    log_model_option,
    click.option(
        "--no-figures",
        is_flag=True,
        help="Draw no figures for MLflow at the end; `mad-efla sync --figures` can draw them later.",
    ),
    click.option("--dry-run", is_flag=True, help="Print the runs and an estimate, and stop."),
    click.option(
        "--max-hours", type=click.FloatRange(0, min_open=True), metavar="H", help="Stop after H hours, as Ctrl-C would."
    ),
    click.option(
        "--budget",
        metavar="TIME",
        help="Make as many seeds, then settings, as take TIME (90s, 2m, 1.5h); a longer one goes on from there.",
    ),
    click.option(
        "--known",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        multiple=True,
        metavar="FILE",
        help="An archive: runs that it holds are not made again. Repeatable.",
    ),
    click.option("--retry-failed", is_flag=True, help="Make runs again that failed by an error of their own."),
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
    budget: str | None,
    known: tuple[Path, ...],
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
    if budget is None:
        sweeps = [expand.expand(task, plan, assignments, runner.precision) for task in tasks]
        found = [fits.check(sweep, runner.device) for sweep in sweeps]
    else:
        sweeps, found = _within(budget, tasks, plan, assignments, runner, out)
    if dry_run:
        _dry_run(sweeps, found, out, runner.slots)
        return
    from mad_efla import tracking
    from mad_efla.api.sweeping import Mirrored
    from mad_efla.execution import processes

    if executor == "local" and workers != 0:
        processes.prepare(runner.device)
    uri = None if no_tracking else tracking.resolve_uri(tracking_uri)
    if uri and (problem := tracking.check(uri, dict.fromkeys(found.task for found in sweeps))):
        click.echo(f"warning: {problem}; it is tried again while the runs are made", err=True)
    mirrored = Mirrored(uri, log_models, figures=not no_figures)
    matches = [match for fit in found for match in fit.matches]
    sys.exit(_sweep(sweeps, matches, out, runner, mirrored, known, max_hours, retry_failed))


def _within(
    text: str, tasks: tuple[str, ...], plan: str, assignments: tuple[str, ...], runner: "Executor", out: Path
) -> "tuple[list[Sweep], list[Fit]]":
    """Cut a plan to what fits a budget of time, and say what that is."""
    from mad_efla.execution import budget, costs
    from mad_efla.plan import expand
    from mad_efla.reporting import terminal
    from mad_efla.training import fits

    seconds = budget.parse(text)
    asked = [expand.expand(task, plan, assignments, runner.precision) for task in tasks]
    if any(s.search for s in asked):
        raise ConfigError(f"plan {plan}: --budget needs settings and seeds; a search is bounded by --max-hours")
    own = asked[0].seeds
    if not any(a.startswith("seeds") for a in assignments):
        more = f"seeds={budget.seeds(own, asked[0].choosing)}"
        asked = [expand.expand(task, plan, (*assignments, more), runner.precision) for task in tasks]
    found = [fits.check(sweep, runner.device) for sweep in asked]
    sizes = {f: s for fit in found for f, s in fit.sizes.items()}
    for sweep in asked:
        sizes |= {r.fingerprint: _size_of(r, sweep, sizes) for runs in sweep.measured.values() for r in runs}
    basis: list[str] = []

    def cost(runs: "list[RunConfig]") -> float:
        guess = costs.estimate(runs, out, sizes, runner.slots)
        basis[:] = [guess.basis]
        return guess.seconds

    sweeps, said = budget.fit(asked, len(own), seconds, cost)
    terminal.stderr().print(f"{said} ({basis[0]})", markup=False, highlight=False, soft_wrap=True)
    return sweeps, found


def _dry_run(sweeps: "list[Sweep]", fits: "list[Fit]", out: Path, slots: int) -> None:
    from mad_efla.execution import costs
    from mad_efla.plan import expand
    from mad_efla.reporting import tables, terminal

    console = terminal.stdout()
    runs = []
    for found, fit in zip(sweeps, fits, strict=True):
        runs += found.runs
        for line in (*_notes([found]), *terminal.matches(fit.matches)):
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
    protocols = " and ".join(dict.fromkeys(found.protocol for found in sweeps))
    same = f"protocol {protocols}, precision {runs[0].train.precision}"
    console.print(
        f"{len(runs)} runs, {guess.done} of them done; {same}; "
        f"about {terminal.duration(guess.seconds)} on {slots} workers ({guess.basis})",
        soft_wrap=True,
        highlight=False,
    )


def _notes(sweeps: "list[Sweep]") -> list[str]:
    """Write what is to be said of sweeps before their first run, each once."""
    return [f"note: {note}" for note in dict.fromkeys(note for found in sweeps for note in found.notes)]


def _size_of(run: "RunConfig", found: "Sweep", sizes: dict[str, tuple[int, int | None]]) -> tuple[int, int | None]:
    """Return the size of a measured run's model: that of the run that chooses beside it."""
    alike = next(r for r in found.runs if (r.mixer, r.condition) == (run.mixer, run.condition))
    return sizes[alike.fingerprint]


def _sweep(
    sweeps: "list[Sweep]",
    matches: "list[Match]",
    out: Path,
    runner: "Executor",
    mirrored: "Mirrored",
    known: tuple[Path, ...],
    max_hours: float | None,
    retry_failed: bool,
) -> int:
    """Make what is missing, mirror it, print the verdict and the tables; return the exit status."""
    from mad_efla.api import sweeping
    from mad_efla.reporting import live, terminal

    err = terminal.stderr()
    sweeps, notes = sweeping.prepare(sweeps, out, known)
    said = (*(f"note: {note}" for note in notes), *_notes(sweeps), *terminal.matches(matches))
    for line in dict.fromkeys(said):
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    failed = []

    def show(made: "list[Sweep]") -> None:
        failed.append(_print_results(made, out))

    ended = sweeping.perform(
        sweeps, out, runner, live.Follow, mirrored, then=show, hours=max_hours, retry_failed=retry_failed
    )
    if ended.stopped:
        err.print(ended.stopped, markup=False)
    for warning in ended.warnings:
        err.print(warning, markup=False, highlight=False, soft_wrap=True)
    _print_next(out, mirrored.uri)
    return 130 if ended.stopped else 1 if any(failed) else 0


def _print_results(sweeps: "list[Sweep]", out: Path) -> bool:
    """Print a table for each sweep and what failed; return whether anything did."""
    from mad_efla.analysis import verdict
    from mad_efla.analysis.leaderboard import leaderboard
    from mad_efla.execution.choosing import named
    from mad_efla.reporting import tables, terminal
    from mad_efla.runs.folder import RunFolder, finished
    from mad_efla.runs.read import of_planned

    err, failed = terminal.stderr(), False
    for found in sweeps:
        results = finished(out, [r.fingerprint for r in found.runs])
        board = leaderboard(of_planned(named(found), found.runs, results))
        title = f"{found.task}, plan {found.plan}, protocol {found.protocol}; 95 % intervals over seeds"
        if board.cells or board.checks:
            terminal.say(verdict.sentences(board))
            terminal.show(tables.sweep([*board.cells, *board.checks], title))
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
