"""The command line: parse, call, print. What is heavy is imported by the command that needs it.

Exit status: 0 everything is done, 1 some run failed, 2 wrong usage, 130 interrupted.
"""

import os
import sys

import click

from mad_efla.cli.benches import bench
from mad_efla.cli.findings import archive, causes, report, results, score, spectrum
from mad_efla.cli.mirror import sync, ui
from mad_efla.cli.parts import check, data, list_, show
from mad_efla.cli.sweeps import logs, status, sweep


def main() -> None:
    """Run the command line."""
    cli()


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


for _command in (
    sweep,
    status,
    logs,
    ui,
    sync,
    score,
    results,
    report,
    spectrum,
    causes,
    archive,
    bench,
    list_,
    show,
    check,
    data,
):
    cli.add_command(_command)
