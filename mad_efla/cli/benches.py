"""The commands that measure this machine: bench step, data, overhead, device."""

from pathlib import Path

import click

from mad_efla.cli.shared import data_dir_option, device_option, options, plan_option, says_errors, set_option


@click.group()
def bench() -> None:
    """Measure this machine, side by side in one process."""


@bench.command("step")
@click.argument("task")
@options(
    plan_option,
    set_option,
    device_option,
    click.option(
        "--rounds",
        type=click.IntRange(4),
        default=10,
        show_default=True,
        help="Steps timed of each mixer, in turn; the median counts.",
    ),
    click.option(
        "--to",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Append a JSON object per step to FILE.",
    ),
    data_dir_option,
)
@says_errors
def bench_step(task: str, plan: str, assignments: tuple[str, ...], device: str, rounds: int, to: Path | None) -> None:
    """Time a training step of each mixer and setting of a plan on TASK, on one thread.

    Its matrix products are timed alone in the same rounds; the ratio says what all else costs.

    \b
    mad-efla bench step recall --set "mixers=[attention, efla, deltanet, mamba2]"
    """
    from mad_efla.bench.steps import step_times, steps, write_steps
    from mad_efla.execution import machine
    from mad_efla.plan import expand
    from mad_efla.reporting import terminal
    from mad_efla.training import fits

    device = machine.resolve_device(device)
    found = expand.expand(task, plan, assignments, machine.resolve_precision(device))
    fits.check(found, device)
    shapes = {(r.setting, r.mixer): r for r in reversed(found.runs)}
    times = steps(list(reversed(shapes.values())), device, rounds)
    terminal.stdout().print(step_times(times))
    if to is not None:
        write_steps(to, times, device)


@bench.command("overhead")
@click.argument("tasks", nargs=-1, required=True)
@options(
    plan_option,
    set_option,
    click.option("--workers", type=click.IntRange(1), metavar="N", help="Worker processes.  [default: the cores]"),
)
@says_errors
def bench_overhead(tasks: tuple[str, ...], plan: str, assignments: tuple[str, ...], workers: int | None) -> None:
    """Sweep TASKS under a plan on the CPU, mirrored to MLflow, and print where the time went.

    Nothing of the sweep is kept.

    \b
    mad-efla bench overhead recall --set seeds=[0]
    """
    from mad_efla.bench.overhead import overhead, split_table
    from mad_efla.execution import machine
    from mad_efla.plan import expand
    from mad_efla.reporting import terminal
    from mad_efla.training import fits

    precision = machine.resolve_precision("cpu")
    found = [expand.expand(task, plan, assignments, precision) for task in tasks]
    for sweep in found:
        fits.check(sweep)
    split = overhead(found, "cpu", workers or machine.cores())
    terminal.stdout().print(split_table(split))


@bench.command("device")
@click.argument("tasks", nargs=-1, required=True)
@options(
    plan_option,
    set_option,
    device_option,
    click.option(
        "--seconds",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        show_default=True,
        help="How long each measurement takes.",
    ),
    click.option(
        "--at-once",
        type=click.IntRange(2),
        multiple=True,
        default=(2, 4, 8),
        show_default=True,
        metavar="N",
        help="How many runs share the device, and how many are stacked. Repeatable.",
    ),
    click.option(
        "--to", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Append the lines to FILE, too."
    ),
)
@says_errors
def bench_device(
    tasks: tuple[str, ...],
    plan: str,
    assignments: tuple[str, ...],
    device: str,
    seconds: float,
    at_once: tuple[int, ...],
    to: Path | None,
) -> None:
    """Time training steps of a plan on TASKS in every way to make many runs, as JSON lines.

    One run by each form of the step, several processes that share the device, several runs stacked
    in one program; last, an estimate of the whole plan for each mixer.

    \b
    mad-efla bench device recall --set mixers=[efla] --at-once 4
    """
    import json

    from mad_efla.bench import throughput
    from mad_efla.execution import machine
    from mad_efla.plan import expand
    from mad_efla.training import fits

    device = machine.resolve_device(device)
    precision = machine.resolve_precision(device)
    sweeps = [expand.expand(task, plan, assignments, precision) for task in tasks]
    for sweep in sweeps:
        fits.check(sweep, device)
    runs = [r for sweep in sweeps for r in sweep.runs]
    for row in throughput.measure(runs, device, seconds, list(at_once)):
        line = json.dumps(row)
        click.echo(line)
        if to is not None:
            to.parent.mkdir(parents=True, exist_ok=True)
            with to.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


@bench.command("data")
@click.argument("tasks", nargs=-1)
@options(
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of the data."),
    click.option(
        "--rounds", type=click.IntRange(1), default=1, show_default=True, help="Generations timed; the least counts."
    ),
    data_dir_option,
)
@says_errors
def bench_data(tasks: tuple[str, ...], seed: int, rounds: int) -> None:
    """Time the generation of every setting of TASKS (all that generate), on one core.

    \b
    mad-efla bench data recall fuzzy_recall --rounds 3
    """
    from mad_efla import config
    from mad_efla.bench.data import data_table, data_times
    from mad_efla.plan import expand
    from mad_efla.reporting import terminal
    from mad_efla.tasks import RealTask

    names = tasks or tuple(str(path) for path in config.presets("tasks"))
    settings = [setting for task in names for setting in expand.settings(task)]
    settings = [s for s in settings if tasks or not isinstance(s.task, RealTask)]
    terminal.stdout().print(data_table(data_times(settings, seed, rounds)))
