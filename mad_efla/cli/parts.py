"""The commands about what there is to train on and with: list, show, check, data."""

import sys
from pathlib import Path

import click

from mad_efla.cli.shared import data_dir_option, options, out_option, says_errors, set_option


@click.command("list")
@click.argument("kind", type=click.Choice(["tasks", "mixers", "plans"]))
@click.argument("name", required=False)
@options(
    click.option(
        "--at",
        multiple=True,
        metavar="width=N",
        help="For mixers: what a layer costs at this width, and at seq_len=N. Repeatable.",
    ),
    out_option,
)
@says_errors
def list_(kind: str, name: str | None, at: tuple[str, ...], out: Path) -> None:
    """List the tasks, mixers or plans there are, a line each, or all that is known of NAME.

    How long a plan takes is known from runs that have finished under --out.

    \b
    mad-efla list plans
    mad-efla list plans efla_controls
    mad-efla list tasks recall
    mad-efla list mixers --at width=128 --at seq_len=512
    """
    from mad_efla.execution import machine
    from mad_efla.reporting import catalogue, terminal

    if at and (kind != "mixers" or name):
        raise click.UsageError(f"--at {at[0]} is for mixers, all of them; not for {name or kind}")
    if at:
        terminal.show(catalogue.layer_costs(at))
        return
    workers = machine.cores()
    if name is None:
        terminal.show(catalogue.table(kind, out, workers))
        return
    for part in catalogue.details(kind, name, out, workers):
        if isinstance(part, str):
            click.echo(part)
        else:
            terminal.show(part)


@click.command()
@click.argument("task")
@options(
    click.option("--examples", type=click.IntRange(1, 100), default=2, show_default=True, help="Sequences to show."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the sequences."),
    set_option,
    data_dir_option,
    click.option(
        "--svg", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Draw them into FILE instead."
    ),
)
@says_errors
def show(task: str, examples: int, seed: int, assignments: tuple[str, ...], svg: Path | None) -> None:
    """Print examples of TASK: keys, values, what is scored, and what its solver answers, if any.

    \b
    mad-efla show tasks/recall.yaml --set task.seq_len=32
    mad-efla show recall --set task.seq_len=24 --svg recall.svg
    """
    from mad_efla.reporting import catalogue, terminal

    found = catalogue.examples(task, assignments, seed, examples)
    if svg:
        from mad_efla.reporting.figures import tasks

        tasks.save(tasks.picture(Path(task).stem, found), svg)
        click.echo(svg)
        return
    console = terminal.stdout()
    for block in found:
        for line in terminal.example(*block, columns=console.width):
            console.print(line, soft_wrap=True)


@click.command()
@click.argument("name")
@options(
    click.option(
        "--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Set one of its fields. Repeatable."
    ),
    click.option(
        "--width",
        type=click.IntRange(1),
        default=32,
        show_default=True,
        help="Width of the model that a mixer is built for.",
    ),
    data_dir_option,
)
@says_errors
def check(name: str, assignments: tuple[str, ...], width: int) -> None:
    """Check the mixer or task NAME against all that a mixer or task promises.

    NAME is a built-in one, or package.module:Name of your own. Exit status 1 if a promise is
    broken.

    \b
    mad-efla check my_package.decay:Decay --set start=0.5
    """
    from mad_efla import contract
    from mad_efla.reporting import tables, terminal

    kind, findings = contract.check(name, assignments, width)
    terminal.show(tables.findings(f"{kind} {name}", findings))
    sys.exit(any(f.broken for f in findings))


@click.command()
@click.argument("task")
@options(
    click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write to."),
    click.option(
        "--setting",
        default="baseline",
        show_default=True,
        metavar="LABEL|N|all",
        help="The setting: its label, its number in the file (0 is the baseline), or all.",
    ),
    click.option(
        "--split",
        type=click.Choice(["train", "validation", "test", "all"]),
        default="all",
        show_default=True,
        help="The split to write.",
    ),
    click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of the data, as in a run."
    ),
    set_option,
    data_dir_option,
)
@says_errors
def data(task: str, out: Path, setting: str, split: str, seed: int, assignments: tuple[str, ...]) -> None:
    """Write the data of TASK as .npz files, for use elsewhere.

    \b
    mad-efla data recall --out data --setting vocab_size=32 --split test
    """
    from mad_efla.plan import expand
    from mad_efla.tasks import Split
    from mad_efla.training import data

    splits: tuple[Split, ...] = tuple(s for s in data.SPLITS if split in (s, "all"))
    for found in expand.choose(expand.settings(task, assignments), setting):
        for path in data.save(out, found.task, seed, found.data, found.label, splits):
            click.echo(path)
