"""The command line: parse, call, print. What is heavy is imported by the command that needs it.

Exit status: 0 everything is done, 1 some run failed, 2 wrong usage, 130 interrupted.
"""

import io
import os
import sys

import click

from mad_efla.cli.benches import bench
from mad_efla.cli.findings import archive, causes, report, results, score, spectrum
from mad_efla.cli.mirror import sync, ui
from mad_efla.cli.parts import check, data, list_, show
from mad_efla.cli.sweeps import logs, status, sweep


def main() -> None:
    """Run the command line; what the terminal's encoding cannot show is replaced by `?`.

    Where the locale's encoding is not UTF-8 the interpreter starts once more in its UTF-8 mode, since
    names of files and words of the command would be no text otherwise.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
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
