"""The commands of the MLflow mirror: ui, sync."""

import sys
from pathlib import Path

import click

from mad_efla.cli.shared import draw, log_model_option, options, out_option, says_errors, tracking_option


@click.command()
@options(
    out_option,
    tracking_option,
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option(
        "--allowed-hosts",
        metavar="NAMES",
        default="",
        help="Further names by which browsers may call the page, with commas between.  [default: this machine's own]",
    ),
    click.option("--port", type=click.IntRange(1, 65535), help="Port.  [default: 5000, or a free one]"),
)
@says_errors
def ui(out: Path, tracking_uri: str | None, host: str, allowed_hosts: str, port: int | None) -> None:
    """Serve MLflow's page on the runs, opened where they stand side by side.

    \b
    mad-efla ui
    mad-efla ui --host 0.0.0.0 --allowed-hosts lab.example.org
    """
    from mad_efla import tracking

    names = tuple(name.strip() for name in allowed_hosts.split(",") if name.strip())
    tracking.ui(tracking.resolve_uri(tracking_uri), out, host, port, click.echo, allowed_hosts=names)


@click.command()
@options(
    out_option,
    tracking_option,
    log_model_option,
    click.option(
        "--figures", is_flag=True, help="Draw leaderboards, and the memory of each mixer's best run in each setting."
    ),
)
@says_errors
def sync(out: Path, tracking_uri: str | None, log_models: bool, figures: bool) -> None:
    """Bring MLflow up to date from the run folders, as after a server was away."""
    from mad_efla import tracking
    from mad_efla.runs.sweeps import read_sweeps

    uri = tracking.resolve_uri(tracking_uri)
    if figures:
        draw(read_sweeps(out), out)
    report = tracking.sync(uri, out, log_models=log_models)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    if report.problem:
        click.echo(f"error: {report.problem}", err=True)
        sys.exit(1)
    click.echo(f"{report.runs} runs are up to date")
