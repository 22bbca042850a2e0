"""The commands that read runs: score, results, report, spectrum, causes."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mad_efla.cli.shared import OUT, data_dir_option, options, out_option, says_errors, tracking_option
from mad_efla.config import ConfigError

if TYPE_CHECKING:
    from mad_efla.runs.folder import RunFolder
    from mad_efla.spectrum import Diagnosis


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@options(
    click.option("--json", "form", flag_value="json", help="Everything, as JSON."),
    click.option("--csv", "form", flag_value="csv", help="One row per protocol, mixer, task."),
    click.option("--latex", "form", flag_value="latex", help="A booktabs table."),
)
@says_errors
def score(runs: tuple[Path, ...], form: str | None) -> None:
    """Score the sweeps under RUNS, folders of runs: per mixer and task, with paired differences.

    Per mixer there are means over settings with intervals over seeds, and ranks. Of every two mixers
    it is said whether other seeds would show the same difference, and whether the settings agree.
    The grid point is chosen on validation and reported on test; protocols are never mixed.
    """
    from mad_efla.analysis.leaderboard import leaderboards
    from mad_efla.reporting import export, tables, terminal
    from mad_efla.runs.read import load

    runs = runs or (Path(OUT),)
    boards = leaderboards(load(*runs))
    if not boards:
        raise ConfigError(f"{', '.join(map(str, runs))}: holds exploring runs only, which have no score")
    if form:
        write = {"json": export.as_json, "csv": export.as_csv, "latex": export.as_latex}[form]
        click.echo(write(boards), nl=False)
        return
    for board in boards:
        for table in (tables.tasks(board), tables.mixers(board), tables.pairs(board)):
            terminal.show(table)


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), default=OUT)
@options(
    click.option(
        "--into",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Replace the sections of these plans in FILE, and keep the others; else print.",
    ),
    click.option(
        "--readings",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="Folder with PLAN.md, to be set under the heading of a plan.",
    ),
)
@says_errors
def results(runs: Path, into: Path | None, readings: Path | None) -> None:
    """Write the results page of the sweeps under RUNS: a section per plan, in Markdown.

    \b
    mad-efla results runs --into RESULTS.md --readings sweeps
    """
    from mad_efla.reporting import results
    from mad_efla.runs.files import write_bytes

    found = results.sections(runs, readings)
    if into is None:
        click.echo(results.into(found), nl=False)
        return
    # Decoded so that every byte, of whichever encoding and line ends, comes back as it was.
    previous = into.read_bytes().decode("utf-8", "surrogateescape") if into.exists() else ""
    write_bytes(into, results.into(found, previous).encode("utf-8", "surrogateescape"))


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), default=OUT)
@options(
    click.option(
        "--to",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Where the page goes, its figures beside it.  [default: RUNS/report/index.html]",
    ),
    data_dir_option,
)
@says_errors
def report(runs: Path, to: Path | None) -> None:
    """Write the sweeps under RUNS as one HTML page that needs no other file, and its figures.

    Scores with intervals, difficulty, learning curves, memory, learning rates, paired differences,
    spectra of the best runs, what failed, protocol and versions. Figures go beside the page as
    PNG and SVG.

    \b
    mad-efla report runs --to recall.html
    """
    from mad_efla.reporting import report
    from mad_efla.runs.files import ensure_writable

    to = to or runs / "report" / "index.html"
    ensure_writable(to.parent, "--to")
    written = report.write(runs, to)
    click.echo(written[0])


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@options(
    out_option,
    click.option(
        "--to",
        type=click.Path(path_type=Path, file_okay=False),
        default="figures",
        show_default=True,
        help="Folder for the figures; those of the same name are replaced.",
    ),
    click.option("--against", metavar="RUN", help="Also show the differences from this run."),
    click.option(
        "--examples",
        type=click.IntRange(1),
        default=16,
        show_default=True,
        metavar="N",
        help="Sequences of the test split to look at.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Draws the noise and the replaced token that gains are measured with.",
    ),
    click.option(
        "--log", is_flag=True, help="Also draw each RUN on a page of its own, as an artifact of the run in MLflow."
    ),
    tracking_option,
    data_dir_option,
)
@says_errors
def spectrum(
    runs: tuple[str, ...],
    out: Path,
    to: Path,
    against: str | None,
    examples: int,
    seed: int,
    log: bool,
    tracking_uri: str | None,
) -> None:
    """Show what trained mixers do with their memory: a table, and figures as PNG and SVG.

    A RUN is named by the beginning of its name, as in `mad-efla status`. Its weights are looked at
    in float32 on the CPU: eigenvalues, horizons, rank of the state, overlap of keys, reach, gain.

    \b
    mad-efla spectrum 135d66 d83b51 --against 1719e0 --to figures
    """
    from mad_efla.reporting import figures, tables, terminal
    from mad_efla.reporting.figures import spectra
    from mad_efla.runs import status

    named = [status.find(out, run) for run in (*filter(None, [against]), *runs)]
    folders = list({folder.fingerprint: folder for folder in named}.values())
    looked = []
    for folder in folders:
        try:
            looked.append((folder, spectra.diagnose(folder, examples, seed)))
        except ConfigError as error:
            if len(folders) == 1 or (against and folder is folders[0]):
                raise
            click.echo(f"left out: {error}", err=True)
    if len(looked) <= bool(against):
        raise ConfigError(f"{' '.join(runs)}: none of them can be looked at")
    names = spectra.names([folder.run() for folder, _ in looked])
    found = {name: diagnosis for name, (_, diagnosis) in zip(names, looked, strict=True)}
    drawn = spectra.figures(found)
    scalars = {name: diagnosis.scalars() for name, diagnosis in found.items()}
    table = tables.spectra(scalars, names[0] if against else None)
    terminal.show(table)
    for name, figure in drawn.items():
        for path in figures.save(figure, to / name):
            click.echo(path)
    if log:
        _log_figures(looked, out, tracking_uri)


def _log_figures(looked: "list[tuple[RunFolder, Diagnosis]]", out: Path, tracking_uri: str | None) -> None:
    from mad_efla import tracking
    from mad_efla.reporting.figures import artifacts

    uri = tracking.resolve_uri(tracking_uri)
    for folder, diagnosis in looked:
        for path in artifacts.of_run(folder, diagnosis):
            click.echo(path)
    report = tracking.sync(uri, out, fingerprints=[folder.fingerprint for folder, _ in looked])
    if report.problem:
        raise ConfigError(report.problem)


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), default=OUT)
@options(
    click.option("--plan", help="The plan to look at, where RUNS holds several."),
    click.option(
        "--setting", help="The task and setting to look at, where there are several, as in 'digits baseline'."
    ),
    click.option(
        "--mixer",
        "mixers",
        multiple=True,
        metavar="LABEL",
        help="A mixer to look at, by its label in the tables. Repeatable.  [default: all]",
    ),
    click.option("--corruption", default="intensity", show_default=True, help="The corruption."),
    click.option(
        "--severity", type=float, metavar="S", help="The severity at which parts are exchanged.  [default: the largest]"
    ),
    click.option(
        "--parts",
        "groups",
        multiple=True,
        metavar="A+B",
        help="Parts exchanged together, as in erase+write. Repeatable.  [default: each alone]",
    ),
    click.option(
        "--examples",
        type=click.IntRange(1),
        default=16,
        show_default=True,
        metavar="N",
        help="Sequences of the test split to look at.",
    ),
    click.option(
        "--to",
        type=click.Path(path_type=Path, file_okay=False),
        default="figures",
        show_default=True,
        help="Folder for the figures; those of the same name are replaced.",
    ),
    data_dir_option,
)
@says_errors
def causes(
    runs: Path,
    plan: str | None,
    setting: str | None,
    mixers: tuple[str, ...],
    corruption: str,
    severity: float | None,
    groups: tuple[str, ...],
    examples: int,
    to: Path,
) -> None:
    """Find out why mixers fail on corrupted inputs: what their layers do, which part did it.

    Of each mixer the runs at its chosen grid point, all seeds. Layers of the delta family are taken
    apart: each part is computed from the corrupted input alone, and from the clean one alone.

    \b
    mad-efla causes runs --mixer plain_efla --mixer plain_deltanet --corruption intensity
    """
    from mad_efla.reporting import figures, tables, terminal
    from mad_efla.reporting.figures import robustness
    from mad_efla.spectrum import causes

    arms = causes.choose(runs, plan, mixers, setting)
    parts = [tuple(name.strip() for name in group.split("+")) for group in groups]
    found, problems = [], []
    for arm in arms:
        try:
            found.append(causes.account(runs, arm, corruption, severity, groups=parts, examples=examples))
        except ConfigError as error:
            problems.append(str(error))
    if not found:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    for table in tables.accounts(found):
        terminal.show(table)
    for problem in (*problems, *(why for account in found for why in account.left_out)):
        click.echo(f"left out: {problem}", err=True)
    drawn = {f"{corruption}-states": robustness.states(found)}
    if any(account.blames for account in found):
        drawn[f"{corruption}-blame"] = robustness.blame(found)
    for name, figure in drawn.items():
        for path in figures.save(figure, to / name):
            click.echo(path)


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@options(
    click.option(
        "--to",
        type=click.Path(path_type=Path, dir_okay=False),
        required=True,
        metavar="FILE",
        help="The archive, as results.parquet; replaced whole.",
    ),
    click.option("--plan", metavar="NAME", help="Only the sweeps of this plan."),
)
@says_errors
def archive(runs: tuple[Path, ...], to: Path, plan: str | None) -> None:
    """Keep what the runs under RUNS left, weights aside, in one Parquet file: a row a run.

    RUNS are folders of runs and archives. Every command that reads RUNS takes the archive in their
    place, and so do pandas, DuckDB and R. Equal runs give equal bytes.

    \b
    mad-efla archive runs --to results/quick.parquet
    """
    from mad_efla.runs import archive as archives
    from mad_efla.runs.read import load

    groups = [g for g in load(*(runs or (Path(OUT),))) if plan in (None, g.plan)]
    if not groups:
        raise ConfigError(f"--plan {plan}: no sweep of these runs has that plan")
    folders = {f: lies for g in groups for f, lies in g.folders.items() if f in g.results}
    count = archives.write(to, [record for g in groups for record in g.records], folders)
    click.echo(f"{to}: {count} runs")
