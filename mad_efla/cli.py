"""The command line: parse, call, print. What is heavy is imported by the command that needs it.

Exit status: 0 everything is done, 1 some run failed, 2 wrong usage, 130 interrupted.
"""

import contextlib
import errno
import functools
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mad_efla.config import ConfigError

if TYPE_CHECKING:
    from mad_efla.executors import Executor
    from mad_efla.spectrum import Diagnosis
    from mad_efla.store import RunFolder, SweepRecord
    from mad_efla.sweep import Sweep

OUT = "runs"


def main() -> None:
    """Run the command line."""
    cli()


def _says_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what the user can mend into lines without a traceback."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ConfigError as error:
            raise click.UsageError(str(error)) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise
            raise click.ClickException(f"{error}; once it can, the same command goes on") from None

    return wrapped


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    return lambda function: functools.reduce(lambda f, o: o(f), reversed(options), function)


_out = click.option(
    "--out", type=click.Path(path_type=Path), default=OUT, show_default=True,
    help="Folder of run folders.",
)  # fmt: skip
_tracking = click.option(
    "--tracking-uri", metavar="URI",
    help="MLflow store; else MLFLOW_TRACKING_URI, else ./mlflow.db.",
)  # fmt: skip
_log_model = click.option(
    "--log-model", "log_models", is_flag=True,
    help="Log the models of finished runs to MLflow, too, for `mlflow.pytorch.load_model`.",
)  # fmt: skip


def _use_data_dir(context: click.Context, option: click.Parameter, folder: Path | None) -> None:
    if folder is not None:
        os.environ["MAD_EFLA_DATA"] = str(folder.absolute())  # so that workers have it, too


_data_dir = click.option(
    "--data-dir", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
    callback=_use_data_dir, expose_value=False,
    help="Folder of data sets, as DIR/mnist/; else MAD_EFLA_DATA.",
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mad-efla")
def cli() -> None:
    """Find out what a sequence mixer can do.

    \b
    mad-efla sweep tasks/recall.yaml     train, compare, log
    mad-efla ui                          look at the runs in MLflow
    """
    if (here := os.getcwd()) not in sys.path:  # a console script has its own folder there instead
        sys.path.append(here)


@cli.command()
@click.argument("tasks", nargs=-1, required=True)
@_options(
    click.option("--plan", default="quick", show_default=True, help="Plan: a path or a name."),
    click.option(
        "--set", "assignments", multiple=True, metavar="FIELD=VALUE",
        help="Override any field, as in optim.lr=0.003. Repeatable.",
    ),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
        help="Where to train.",
    ),
    click.option(
        "--workers", type=click.IntRange(0), metavar="N",
        help="Worker processes, one thread each; 0 trains in this process.  [default: the cores]",
    ),
    click.option(
        "--per-device", type=click.IntRange(1), metavar="N",
        help="Runs that share a GPU, in processes of their own.  [default: 1]",
    ),
    click.option(
        "--executor", type=click.Choice(["local", "ray", "slurm"]), default="local",
        show_default=True, help="Whose processes: this machine's, or a cluster's.",
    ),
    _out,
    _tracking,
    click.option("--no-tracking", is_flag=True, help="Leave MLflow alone; `mad-efla sync` later."),
    _log_model,
    click.option(
        "--no-figures", is_flag=True,
        help="Draw no figures for MLflow at the end; `mad-efla sync --figures` later.",
    ),
    click.option("--dry-run", is_flag=True, help="Print the runs and an estimate, and stop."),
    click.option(
        "--max-hours", type=click.FloatRange(0, min_open=True), metavar="H",
        help="Stop after H hours as Ctrl-C would.",
    ),
    click.option("--retry-failed", is_flag=True, help="Make runs again that failed by an error."),
    _data_dir,
)  # fmt: skip
@_says_errors
def sweep(
    tasks: tuple[str, ...], plan: str, assignments: tuple[str, ...], device: str,
    workers: int | None, per_device: int | None, executor: str, out: Path,
    tracking_uri: str | None, no_tracking: bool, log_models: bool, no_figures: bool,
    dry_run: bool, max_hours: float | None, retry_failed: bool,
) -> None:  # fmt: skip
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
    from mad_efla import executors, sweep

    runner = executors.choose(executor, device=device, workers=workers, per_device=per_device)
    sweeps = [sweep.expand(task, plan, assignments, runner.precision) for task in tasks]
    if dry_run:
        _dry_run(sweeps, out, runner.slots)
        return
    from mad_efla import processes, tracking

    if executor == "local" and workers != 0:
        processes.prepare()
    uri = None if no_tracking else tracking.resolve_uri(tracking_uri)
    told = _Told(uri, log_models, figures=not no_figures)
    sys.exit(_sweep(sweeps, out, runner, told, max_hours, retry_failed))


class _Told(NamedTuple):
    """What MLflow is told of a sweep; nothing without an address."""

    uri: str | None
    log_models: bool
    figures: bool


def _dry_run(sweeps: "list[Sweep]", out: Path, slots: int) -> None:
    from mad_efla import display, estimate, sweep

    console = display.stdout()
    runs = []
    for found in sweeps:
        runs += found.runs
        for line in display.matches(found.matches):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(
            display.runs(found.runs, sweep.differences(found.runs), found.sizes), soft_wrap=True
        )
    sizes = {f: s for w in sweeps for f, s in w.sizes.items()}
    guess = estimate.estimate(runs, out, sizes, slots)
    if search := sweeps[0].search:
        console.print(f"search {search.method}: {search.trials} trials like each of these, "
                      f"over {', '.join(search.over)}")  # fmt: skip
        guess = guess._replace(seconds=guess.seconds * search.trials)
    same = f"protocol {sweeps[0].protocol}, precision {runs[0].train.precision}"
    console.print(
        f"{len(runs)} runs, {guess.done} of them done; {same}; "
        f"about {display.duration(guess.seconds)} on {slots} workers ({guess.basis})",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _sweep(
    sweeps: "list[Sweep]", out: Path, runner: "Executor", told: _Told, max_hours: float | None,
    retry_failed: bool,
) -> int:  # fmt: skip
    """Make what is missing, mirror it, print the tables; return the exit status."""
    from mad_efla import display, estimate, execute, store, tracking

    store.ensure_writable(out)
    err = display.stderr()
    runs = list({r.fingerprint: r for s in sweeps for r in s.runs}.values())
    for note in store.mend(out, [r.fingerprint for r in runs]):
        err.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    for line in dict.fromkeys(line for s in sweeps for line in display.matches(s.matches)):
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    done = store.finished(out, [r.fingerprint for r in runs])
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
            settled = done.keys() | (set() if retry_failed else store.given_up(out, runs))
            waiting = [r for r in runs if r.fingerprint not in settled]
            if sweeps[0].search:
                for found, record in zip(sweeps, records, strict=True):
                    _explore(found, record, out, runner, deadline)
            elif waiting:
                costs = estimate.Costs(runs).read(out)
                with display.Follow(runs, waiting, costs, runner.slots) as follow:
                    runner.perform(
                        execute.Work(waiting, out, costs), watch=follow.update,
                        deadline=deadline, limits=sweeps[0].limits,
                    )  # fmt: skip
        except execute.OutOfTime:
            interrupted = True
            err.print(f"stopped after {max_hours:g} hours; the same command goes on", markup=False)
        except KeyboardInterrupt:
            interrupted = True
            err.print("interrupted: finished runs stay; the same command goes on", markup=False)
        sweeps = [_ended(found, out) for found in sweeps]
        failed = _print_results(sweeps, out)
        if mirrors and told.figures and not interrupted:
            _draw(records, out)
    for problem in filter(None, (m.problem for m in mirrors)):
        err.print(f"warning: {problem}", markup=False, highlight=False, soft_wrap=True)
    _print_next(out, told.uri)
    return 130 if interrupted else 1 if failed else 0


def _explore(
    found: "Sweep", record: "SweepRecord", out: Path, runner: "Executor", deadline: float
) -> None:
    """Make the trials of a sweep that searches."""
    from mad_efla import display, estimate, executors, search

    if not isinstance(runner, executors.Local):
        raise ConfigError(
            f"plan {found.plan}: search proposes a trial when a worker of this machine is free; "
            "use --executor local"
        )
    work = search.Explore(found, record, out, estimate.Costs([]))
    with display.Follow(work.runs, list(work.waiting.values()), work.costs, runner.slots,
                        work.total) as follow:  # fmt: skip
        runner.perform(work, watch=follow.update, deadline=deadline, limits=found.limits)


def _ended(found: "Sweep", out: Path) -> "Sweep":
    """Write that a call has ended; return the sweep with the runs that it has by now."""
    from mad_efla import store

    (record,) = (r for r in store.read_sweeps(out) if r.id == found.id)
    store.write_sweep(out, record.model_copy(update={"ended": store.now()}))
    if not found.search:
        return found
    return found._replace(runs=[store.RunFolder(out, f).run() for f in record.fingerprints])


def _record(found: "Sweep", out: Path) -> "SweepRecord":
    from mad_efla import store

    known = {r.id: r for r in store.read_sweeps(out)}
    fingerprints = tuple(r.fingerprint for r in found.runs)
    if found.search:  # its trials so far, in their order
        fingerprints = known[found.id].fingerprints if found.id in known else ()
    record = store.SweepRecord(
        id=found.id,
        task=found.task,
        plan=found.plan,
        protocol=found.protocol,
        command=shlex.join(["mad-efla", *sys.argv[1:]]),
        fingerprints=fingerprints,
        started=known[found.id].started if found.id in known else store.now(),
        ended=None,
    )
    store.write_sweep(out, record)
    return record


def _print_results(sweeps: "list[Sweep]", out: Path) -> bool:
    """Print a table for each sweep and what failed; return whether anything did."""
    from mad_efla import display, scores, store

    console, err, failed = display.stdout(), display.stderr(), False
    for found in sweeps:
        results = store.finished(out, [r.fingerprint for r in found.runs])
        lines = scores.table(found.runs, results)
        title = f"{found.task}, plan {found.plan}, protocol {found.protocol}"
        if lines:
            console.print(display.results(lines, title))
        absent = [r for r in found.runs if r.fingerprint not in results]
        standing = {r.fingerprint: store.RunFolder(out, r.fingerprint).status() for r in absent}
        if pruned := list(standing.values()).count("pruned"):
            err.print(f"{pruned} of {len(found.runs)} runs were pruned", highlight=False)
        if len(absent) > pruned:
            text = f"{len(absent) - pruned} of {len(found.runs)} runs have no result"
            err.print(text, highlight=False)
        for run in absent:
            folder = store.RunFolder(out, run.fingerprint)
            if standing[run.fingerprint] == "failed":
                failed = True
                text = display.failure(run, folder)
                err.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    return failed


def _draw(records: "list[SweepRecord]", out: Path) -> None:
    """Draw what MLflow shows of sweeps; what cannot be drawn costs a line and nothing else."""
    from mad_efla import display, drawing

    err = display.stderr()
    try:
        for problem in drawing.draw(out, records):
            err.print(f"warning: {problem}", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        err.print("interrupted: `mad-efla sync --figures` draws the rest", markup=False)


def _print_next(out: Path, tracking_uri: str | None) -> None:
    """Say where the results are and what shows them."""
    from mad_efla import display

    console = display.stdout()
    console.print(f"results: {out}", markup=False, highlight=False, soft_wrap=True)
    if tracking_uri is not None:
        # A URI may hold a password; the option as typed is enough to repeat.
        given = "--tracking-uri" in " ".join(sys.argv)
        option = f" --tracking-uri {tracking_uri}" if given and "@" not in tracking_uri else ""
        console.print(f"compare: mad-efla ui{option}", markup=False, soft_wrap=True)


@cli.command()
@_options(
    _out,
    _tracking,
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option(
        "--port", type=click.IntRange(1, 65535), help="Port.  [default: 5000, or a free one]"
    ),
)  # fmt: skip
@_says_errors
def ui(out: Path, tracking_uri: str | None, host: str, port: int | None) -> None:
    """Open MLflow on the runs."""
    from mad_efla import tracking

    tracking.ui(tracking.resolve_uri(tracking_uri), out, host, port, click.echo)


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), default=OUT)
@_says_errors
def status(runs: Path) -> None:
    """Say how the sweeps under RUNS stand: counts, what runs, what failed and why, time left."""
    from mad_efla import display, estimate, status

    console = display.stdout()
    for standing in status.standings(runs):
        costs = estimate.Costs(standing.runs).read(runs)
        for line in display.standing(standing, costs):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@cli.command()
@click.argument("run")
@_out
@_says_errors
def logs(run: str, out: Path) -> None:
    """Print what RUN, or a run whose name begins so, has logged: figures, warnings, a traceback."""
    from mad_efla import display, status

    folder = status.find(out, run)
    for line in display.log(folder):
        click.echo(line)


@cli.command()
@_options(
    _out,
    _tracking,
    _log_model,
    click.option(
        "--figures", is_flag=True,
        help="Draw leaderboards, and the memory of each mixer's best run in each setting.",
    ),
)  # fmt: skip
@_says_errors
def sync(out: Path, tracking_uri: str | None, log_models: bool, figures: bool) -> None:
    """Bring MLflow up to date from the run folders, as after a server was away."""
    from mad_efla import store, tracking

    uri = tracking.resolve_uri(tracking_uri)
    if figures:
        _draw(store.read_sweeps(out), out)
    report = tracking.sync(uri, out, log_models=log_models)
    if report.problem:
        click.echo(f"error: {report.problem}", err=True)
        sys.exit(1)
    click.echo(f"{report.runs} runs are up to date")


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), default=OUT)
@_options(
    click.option("--json", "form", flag_value="json", help="Everything, as JSON."),
    click.option("--csv", "form", flag_value="csv", help="One row per protocol, mixer, task."),
    click.option("--latex", "form", flag_value="latex", help="A booktabs table."),
)
@_says_errors
def score(runs: Path, form: str | None) -> None:
    """Score the sweeps under RUNS: per mixer and task, with intervals and paired differences.

    The grid point is chosen on validation and reported on test; protocols are never mixed.
    """
    from mad_efla import display, export, leaderboard

    boards = leaderboard.leaderboards(*leaderboard.read(runs))
    if not boards:
        raise ConfigError(f"{runs}: holds exploring runs only, which have no score")
    if form:
        write = {"json": export.as_json, "csv": export.as_csv, "latex": export.as_latex}[form]
        click.echo(write(boards), nl=False)
        return
    console = display.stdout()
    for board in boards:
        for table in display.leaderboard(board):
            console.print(table)


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), default=OUT)
@_options(
    click.option(
        "--into", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="Replace the sections of these plans in FILE, and keep the others; else print.",
    ),
    click.option(
        "--readings", type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="Folder with PLAN.md, to be set under the heading of a plan.",
    ),
)  # fmt: skip
@_says_errors
def results(runs: Path, into: Path | None, readings: Path | None) -> None:
    """Write the results page of the sweeps under RUNS: a section per plan, in Markdown.

    \b
    mad-efla results runs --into RESULTS.md --readings sweeps
    """
    from mad_efla import results, store

    found = results.sections(runs, readings)
    if into is None:
        click.echo(results.page(found), nl=False)
        return
    previous = into.read_text() if into.exists() else ""
    store.write_bytes(into, results.page(found, previous).encode())


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), default=OUT)
@_options(
    click.option(
        "--to", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="Where the page goes, its figures beside it.  [default: RUNS/report/index.html]",
    ),
    _data_dir,
)  # fmt: skip
@_says_errors
def report(runs: Path, to: Path | None) -> None:
    """Write the sweeps under RUNS as one HTML page that needs no other file, and its figures.

    Scores with intervals, difficulty, learning curves, memory, learning rates, paired differences,
    spectra of the best runs, what failed, protocol and versions. Figures go beside the page as
    PNG and SVG.

    \b
    mad-efla report runs --to recall.html
    """
    from mad_efla import report

    written = report.write(runs, to or runs / "report" / "index.html")
    click.echo(written[0])


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@_options(
    _out,
    click.option(
        "--to", type=click.Path(path_type=Path, file_okay=False), default="figures",
        show_default=True, help="Folder for the figures; those of the same name are replaced.",
    ),
    click.option("--against", metavar="RUN", help="Show the differences from this run, too."),
    click.option(
        "--examples", type=click.IntRange(1), default=16, show_default=True, metavar="N",
        help="Sequences of the test split to look at.",
    ),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True,
        help="Draws the noise and the replaced token that gains are measured with.",
    ),
    click.option(
        "--log", is_flag=True,
        help="Draw each RUN on a page of its own, too, as an artifact of the run in MLflow.",
    ),
    _tracking,
    _data_dir,
)  # fmt: skip
@_says_errors
def spectrum(
    runs: tuple[str, ...], out: Path, to: Path, against: str | None, examples: int, seed: int,
    log: bool, tracking_uri: str | None,
) -> None:  # fmt: skip
    """Show what trained mixers do with their memory: a table, and figures as PNG and SVG.

    A RUN is named by the beginning of its name, as in `mad-efla status`. Its weights are looked at
    in float32 on the CPU: eigenvalues, horizons, rank of the state, overlap of keys, reach, gain.

    \b
    mad-efla spectrum 135d66 d83b51 --against 1719e0 --to figures
    """
    from mad_efla import display, figures, status
    from mad_efla.figures import spectra

    named = [status.find(out, run) for run in (*filter(None, [against]), *runs)]
    folders = list({folder.fingerprint: folder for folder in named}.values())
    names = spectra.names([folder.run() for folder in folders])
    found = {
        name: spectra.diagnose(folder, examples, seed)
        for name, folder in zip(names, folders, strict=True)
    }
    drawn = spectra.figures(found)
    scalars = {name: diagnosis.scalars() for name, diagnosis in found.items()}
    table = display.spectra(scalars, names[0] if against else None)
    display.stdout().print(table, soft_wrap=True)
    for name, figure in drawn.items():
        for path in figures.save(figure, to / name):
            click.echo(path)
    if log:
        _log_figures(list(zip(folders, found.values(), strict=True)), out, tracking_uri)


def _log_figures(
    looked: "list[tuple[RunFolder, Diagnosis]]", out: Path, tracking_uri: str | None
) -> None:
    from mad_efla import tracking
    from mad_efla.figures import artifacts

    uri = tracking.resolve_uri(tracking_uri)
    for folder, diagnosis in looked:
        for path in artifacts.of_run(folder, diagnosis):
            click.echo(path)
    report = tracking.sync(uri, out, fingerprints=[folder.fingerprint for folder, _ in looked])
    if report.problem:
        raise ConfigError(report.problem)


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), default=OUT)
@_options(
    click.option("--plan", help="Whose runs, where RUNS holds those of several plans."),
    click.option(
        "--mixer", "mixers", multiple=True, metavar="LABEL",
        help="Which, by the label in the tables. Repeatable.  [default: all]",
    ),
    click.option("--corruption", default="intensity", show_default=True, help="By its name."),
    click.option(
        "--severity", type=float, metavar="S",
        help="At which parts are exchanged.  [default: the largest]",
    ),
    click.option(
        "--parts", "groups", multiple=True, metavar="A+B",
        help="Parts exchanged together, as in erase+write. Repeatable.  [default: each alone]",
    ),
    click.option(
        "--examples", type=click.IntRange(1), default=16, show_default=True, metavar="N",
        help="Sequences that are diagnosed.",
    ),
    click.option(
        "--to", type=click.Path(path_type=Path, file_okay=False), default="figures",
        show_default=True, help="Folder for the figures; those of the same name are replaced.",
    ),
    _data_dir,
)  # fmt: skip
@_says_errors
def causes(
    runs: Path, plan: str | None, mixers: tuple[str, ...], corruption: str,
    severity: float | None, groups: tuple[str, ...], examples: int, to: Path,
) -> None:  # fmt: skip
    """Find out why mixers fail on corrupted inputs: what their layers do, which part did it.

    Of each mixer the runs at its chosen grid point, all seeds. Layers of the delta family are taken
    apart: each part is computed from the corrupted input alone, and from the clean one alone.

    \b
    mad-efla causes runs --mixer plain_efla --mixer plain_deltanet --corruption intensity
    """
    from mad_efla import causes, display, figures
    from mad_efla.figures import robustness

    arms = causes.choose(runs, plan, mixers)
    parts = [tuple(name.strip() for name in group.split("+")) for group in groups]
    found = [
        causes.account(runs, arm, corruption, severity, groups=parts, examples=examples)
        for arm in arms
    ]
    for table in display.accounts(found):
        display.stdout().print(table)
    drawn = {f"{corruption}-states": robustness.states(found)}
    if any(account.blames for account in found):
        drawn[f"{corruption}-blame"] = robustness.blame(found)
    for name, figure in drawn.items():
        for path in figures.save(figure, to / name):
            click.echo(path)


@cli.group()
def bench() -> None:
    """Measure this machine, side by side in one process."""


@bench.command("step")
@click.argument("task")
@_options(
    click.option("--plan", default="quick", show_default=True, help="Plan: a path or a name."),
    click.option("--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Override."),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
        help="Where to train.",
    ),
    click.option("--rounds", type=click.IntRange(4), default=10, show_default=True),
    _data_dir,
)  # fmt: skip
@_says_errors
def bench_step(
    task: str, plan: str, assignments: tuple[str, ...], device: str, rounds: int
) -> None:
    """Time a training step of each mixer and setting of a plan on TASK, on one thread.

    \b
    mad-efla bench step recall --set "mixers=[attention, efla, deltanet, mamba2]"
    """
    from mad_efla import bench, display, machine, sweep

    device = machine.resolve_device(device)
    found = sweep.expand(task, plan, assignments, machine.resolve_precision(device))
    shapes = {(r.setting, r.mixer): r for r in reversed(found.runs)}
    times = bench.steps(list(reversed(shapes.values())), device, rounds)
    display.stdout().print(display.step_times(times))


@bench.command("overhead")
@click.argument("task")
@_options(
    click.option("--plan", default="quick", show_default=True, help="Plan: a path or a name."),
    click.option("--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Override."),
    click.option(
        "--workers", type=click.IntRange(1), metavar="N", help="Processes.  [default: the cores]"
    ),
)  # fmt: skip
@_says_errors
def bench_overhead(task: str, plan: str, assignments: tuple[str, ...], workers: int | None) -> None:
    """Sweep TASK under a plan on the CPU, mirrored to MLflow, and print where the time went.

    Nothing of the sweep is kept.

    \b
    mad-efla bench overhead recall --set seeds=[0]
    """
    from mad_efla import bench, display, executors, machine, sweep

    found = sweep.expand(task, plan, assignments, machine.resolve_precision("cpu"))
    split = bench.overhead(found, "cpu", workers or executors.cores())
    display.stdout().print(bench.split_table(split))


@bench.command("device")
@click.argument("tasks", nargs=-1, required=True)
@_options(
    click.option("--plan", default="quick", show_default=True, help="Plan: a path or a name."),
    click.option("--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Override."),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
        help="Where to train.",
    ),
    click.option(
        "--seconds", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
        help="To time each measurement for.",
    ),
    click.option(
        "--at-once", type=click.IntRange(2), multiple=True, default=(2, 4, 8), show_default=True,
        metavar="N", help="Runs to share the device, and to be stacked. Repeatable.",
    ),
    click.option(
        "--to", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="Append the lines to FILE, too.",
    ),
)  # fmt: skip
@_says_errors
def bench_device(
    tasks: tuple[str, ...], plan: str, assignments: tuple[str, ...], device: str, seconds: float,
    at_once: tuple[int, ...], to: Path | None,
) -> None:  # fmt: skip
    """Time training steps of a plan on TASKS in every way to make many runs, as JSON lines.

    One run by each form of the step, several processes that share the device, several runs stacked
    in one program; last, an estimate of the whole plan for each mixer.

    \b
    mad-efla bench device recall --set mixers=[efla] --at-once 4
    """
    import json

    from mad_efla import machine, sweep, throughput

    device = machine.resolve_device(device)
    precision = machine.resolve_precision(device)
    runs = [r for task in tasks for r in sweep.expand(task, plan, assignments, precision).runs]
    for row in throughput.measure(runs, device, seconds, list(at_once)):
        line = json.dumps(row)
        click.echo(line)
        if to is not None:
            to.parent.mkdir(parents=True, exist_ok=True)
            with to.open("a") as file:
                file.write(line + "\n")


@bench.command("data")
@click.argument("tasks", nargs=-1)
@_options(
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
    click.option("--rounds", type=click.IntRange(1), default=1, show_default=True),
    _data_dir,
)  # fmt: skip
@_says_errors
def bench_data(tasks: tuple[str, ...], seed: int, rounds: int) -> None:
    """Time the generation of every setting of TASKS (all that generate), on one core.

    \b
    mad-efla bench data recall fuzzy_recall --rounds 3
    """
    from mad_efla import bench, config, display, sweep
    from mad_efla.tasks import RealTask

    names = tasks or tuple(str(path) for path in config.presets("tasks"))
    settings = [setting for task in names for setting in sweep.settings(task)]
    settings = [s for s in settings if tasks or not isinstance(s.task, RealTask)]
    display.stdout().print(bench.data_table(bench.data_times(settings, seed, rounds)))


@cli.command()
@click.argument("task")
@_options(
    click.option(
        "--out", type=click.Path(path_type=Path, file_okay=False), required=True,
        help="Folder to write to.",
    ),
    click.option(
        "--setting", default="baseline", show_default=True, metavar="LABEL|N|all",
        help="Which: its label, its number in the file (0 is the baseline), or all.",
    ),
    click.option(
        "--split", type=click.Choice(["train", "validation", "test", "all"]), default="all",
        show_default=True,
    ),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
    click.option("--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Override."),
    _data_dir,
)  # fmt: skip
@_says_errors
def data(
    task: str, out: Path, setting: str, split: str, seed: int, assignments: tuple[str, ...]
) -> None:
    """Write the data of TASK as .npz files, for use elsewhere.

    \b
    mad-efla data recall --out data --setting vocab_size=32 --split test
    """
    from mad_efla import data, sweep
    from mad_efla.tasks import Split

    splits: tuple[Split, ...] = tuple(s for s in data.SPLITS if split in (s, "all"))
    for found in sweep.choose(sweep.settings(task, assignments), setting):
        for path in data.save(out, found.task, seed, found.data, found.label, splits):
            click.echo(path)


@cli.command("list")
@click.argument("kind", type=click.Choice(["tasks", "mixers", "plans"]))
@click.option(
    "--at", multiple=True, metavar="width=N",
    help="For mixers: what a layer costs at this width, and at seq_len=N. Repeatable.",
)  # fmt: skip
@_says_errors
def list_(kind: str, at: tuple[str, ...]) -> None:
    """List the tasks, mixers or plans there are, with their fields.

    \b
    mad-efla list mixers --at width=128 --at seq_len=512
    """
    from mad_efla import catalogue, display

    if at and kind != "mixers":
        raise click.UsageError(f"--at {at[0]} is for mixers, not for {kind}")
    display.stdout().print(catalogue.costs(at) if at else catalogue.table(kind))


@cli.command()
@click.argument("name")
@_options(
    click.option("--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Its fields."),
    click.option(
        "--width", type=click.IntRange(1), default=32, show_default=True,
        help="Width of the model that a mixer is built for.",
    ),
    _data_dir,
)  # fmt: skip
@_says_errors
def check(name: str, assignments: tuple[str, ...], width: int) -> None:
    """Check the mixer or task NAME against all that a mixer or task promises.

    NAME is a built-in one, or package.module:Name of your own. Exit status 1 if a promise is
    broken.

    \b
    mad-efla check my_package.decay:Decay --set start=0.5
    """
    from mad_efla import contract, display

    kind, findings = contract.check(name, assignments, width)
    display.stdout().print(display.findings(f"{kind} {name}", findings))
    sys.exit(any(f.broken for f in findings))


@cli.command()
@click.argument("task")
@_options(
    click.option("--examples", type=click.IntRange(1, 100), default=2, show_default=True),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Override."),
    _data_dir,
    click.option(
        "--svg", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="Draw them into FILE instead.",
    ),
)  # fmt: skip
@_says_errors
def show(
    task: str, examples: int, seed: int, assignments: tuple[str, ...], svg: Path | None
) -> None:
    """Print examples of TASK: keys, values, what is scored, and what its solver answers, if any.

    \b
    mad-efla show tasks/recall.yaml --set task.seq_len=32
    mad-efla show recall --set task.seq_len=24 --svg recall.svg
    """
    from mad_efla import catalogue, display

    found = catalogue.examples(task, assignments, seed, examples)
    if svg:
        from mad_efla.figures import tasks

        tasks.save(tasks.picture(Path(task).stem, found), svg)
        click.echo(svg)
        return
    console = display.stdout()
    for block in found:
        for line in display.example(*block, columns=console.width):
            console.print(line, soft_wrap=True)
