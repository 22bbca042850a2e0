"""What several commands share: options, errors, drawing."""

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mad_efla.config import ConfigError

if TYPE_CHECKING:
    from mad_efla.runs.schema import SweepRecord

OUT = "runs"


def says_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what the user can mend into lines without a traceback."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ConfigError as error:
            raise click.UsageError(str(error)) from None
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # not the system's; the reader has gone
                raise
            raise click.ClickException(f"{error}; once it can, the same command goes on") from None

    return wrapped


def options(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command several options, listed in this order."""
    return lambda function: functools.reduce(lambda f, o: o(f), reversed(options), function)


plan_option = click.option("--plan", default="quick", show_default=True, help="Path or name of a plan.")
set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Override any field, as in optim.lr=0.003. Repeatable.",
)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to train."
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path), default=OUT, show_default=True, help="Folder of run folders."
)


def _use_prefix(context: click.Context, option: click.Parameter, prefix: str | None) -> None:
    if prefix is not None:
        os.environ["MAD_EFLA_EXPERIMENT_PREFIX"] = prefix


tracking_option = options(
    click.option(
        "--tracking-uri",
        metavar="URI",
        help="Address of the MLflow store.  [default: MLFLOW_TRACKING_URI, else ./mlflow.db]",
    ),
    click.option(
        "--experiment-prefix",
        metavar="TEXT",
        callback=_use_prefix,
        expose_value=False,
        help="Begins the names of MLflow experiments, as /Users/me@example.org/ on Databricks; "
        "else MAD_EFLA_EXPERIMENT_PREFIX, else nothing.",
    ),
)
log_model_option = click.option(
    "--log-model",
    "log_models",
    is_flag=True,
    help="Also log the models of finished runs to MLflow, for `mlflow.pytorch.load_model`.",
)


def _use_data_dir(context: click.Context, option: click.Parameter, folder: Path | None) -> None:
    if folder is not None:
        os.environ["MAD_EFLA_DATA"] = str(folder.absolute())  # so that workers have it, too


data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    callback=_use_data_dir,
    expose_value=False,
    help="Folder of data sets, which holds DIR/mnist/ and so on.  [default: MAD_EFLA_DATA]",
)


def draw(records: "list[SweepRecord]", out: Path) -> None:
    """Draw what MLflow shows of sweeps; what cannot be drawn costs a line and nothing else."""
    from mad_efla.reporting import drawing, terminal

    err = terminal.stderr()
    try:
        for problem in drawing.draw(out, records):
            err.print(f"warning: {problem}", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        err.print("interrupted: `mad-efla sync --figures` draws the rest", markup=False)
