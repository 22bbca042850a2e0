"""The commands as functions: names, order of arguments and defaults are those of the command line.

Only what a command prints is returned instead. `sets` is what `--set` is: `{"optim.lr": 0.003}`.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad_efla.api.runs import Runs
from mad_efla.config import ConfigError

if TYPE_CHECKING:
    from mad_efla.contract import Finding
    from mad_efla.mixers import Mixer
    from mad_efla.plan.expand import Sweep
    from mad_efla.tasks import Task
    from mad_efla.training.data import Data

Sets = Mapping[str, Any]


def data(name: str, setting: str = "baseline", seed: int = 0, sets: Sets | None = None) -> "Data":
    """Generate the data of a task: `train`, `validation` and `test`, each with numpy arrays.

    `inputs` and `targets` are `[n, L]`; targets are -100 where nothing is scored.

    Args:
        name: A task, by name or path of its file.
        setting: Label of one of the task's settings, or its number; 0 is the baseline.
        seed: Equal seeds give equal bytes on any machine.
        sets: Fields of `task` and `data`, as `{"task.vocab_size": 32}`.

    Raises:
        ConfigError: There is no such task, setting or field.

    Example:
        >>> import mad_efla as mad
        >>> made = mad.data("recall", sets={"data.train_examples": 600, "task.seq_len": 16})
        >>> made.train.inputs.shape
        (600, 15)
    """
    from mad_efla.plan import expand
    from mad_efla.training import data as generator

    found = expand.settings(name, _assignments(sets))
    chosen = expand.choose(found, setting)
    if len(chosen) != 1:
        raise ConfigError(f"setting={setting!r} must name one setting, not all")
    return generator.make(chosen[0].task, seed, chosen[0].data)


def task(name: str, **fields: Any) -> "Task":
    """Return a task: its generator, its solver, what it scores.

    Args:
        name: A task's name, or `package.module:Name` of your own.
        **fields: Its fields, as `vocab_size=32`.

    Raises:
        ConfigError: There is no such task or field, or a value is out of range.

    Example:
        >>> import mad_efla as mad
        >>> mad.task("recall", vocab_size=16, seq_len=32).input_length
        31
    """
    from mad_efla.config import Document
    from mad_efla.plan.run import build_task

    return build_task(Document({"name": name, **fields}, {}, f"task {name}"))


def mixer(name: str, width: int = 128, **fields: Any) -> "Mixer":
    """Return a mixer as an `nn.Module` for a model of your own: `[B, L, width]` to the same shape.

    Args:
        name: A mixer's name, or `package.module:Name` of your own.
        width: Width of the model, D.
        **fields: Its fields, as `heads=4`.

    Raises:
        ConfigError: There is no such mixer or field, or they do not fit the width.

    Example:
        >>> import mad_efla as mad, torch
        >>> mad.mixer("efla", width=32, heads=2)(torch.zeros(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """
    from mad_efla import plugins
    from mad_efla.config import Document, validate

    kind = plugins.mixer(name)
    config = validate(kind.Config, Document({"name": name, **fields}, {}, f"mixer {name}"), "mixer")
    try:
        return kind(width, config)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}; give other fields, or another width") from error


def dry_run(
    *tasks: str,
    plan: str = "quick",
    mixers: Sequence[Any] | None = None,
    sets: Sets | None = None,
    device: str = "auto",
) -> "list[Sweep]":
    """Expand a plan to the runs it would make and check that they fit; nothing is trained. As `sweep --dry-run`.

    Args:
        *tasks: Names or paths of task files.
        plan: Name or path of a plan.
        mixers: In place of the plan's: names, mappings with fields, lists of them for hybrids.
        sets: Overrides of any field.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        A sweep for each task; its `runs` are configurations.

    Example:
        >>> import mad_efla as mad
        >>> (found,) = mad.dry_run("recall", mixers=["efla"], sets={"seeds": [0]})
        >>> {run.mixer for run in found.runs}
        {'efla'}
    """
    from mad_efla.execution import executors
    from mad_efla.plan import expand
    from mad_efla.training import fits

    runner = executors.choose("local", device=device, workers=0)
    sweeps = [expand.expand(name, plan, _assignments(sets, mixers), runner.precision) for name in _some(tasks)]
    for found in sweeps:
        fits.check(found, runner.device)
    return sweeps


def sweep(
    *tasks: str,
    plan: str = "quick",
    mixers: Sequence[Any] | None = None,
    sets: Sets | None = None,
    device: str = "auto",
    workers: int | None = None,
    out: str | Path = "runs",
    tracking_uri: str | None = None,
    hours: float | None = None,
    known: Sequence[str | Path] = (),
    retry_failed: bool = False,
    progress: bool | None = None,
) -> Runs:
    """Train every mixer of a plan on tasks; what is done is not made again. As `mad-efla sweep`.

    Interrupted, by Ctrl-C or the stop button of a notebook, the same call goes on. What the command says on its
    first and last lines, such as a protocol departed from or runs that failed, is a Python warning here.

    Args:
        *tasks: Names or paths of task files.
        plan: Name or path of a plan.
        mixers: In place of the plan's: names, mappings with fields, lists of them for hybrids.
        sets: Overrides of any field, as `{"optim.lr": 0.003, "seeds": [0, 1]}`.
        device: `auto`, `cpu` or `cuda`.
        workers: Worker processes, one thread each; 0 trains in this one; None for the cores.
        out: Folder of run folders.
        tracking_uri: MLflow store to mirror the runs in; None for none.
        hours: When to stop; None for never.
        known: Archives; runs that they hold are not made again.
        retry_failed: Make runs again that failed by an error.
        progress: Show bars; None shows them in a notebook and nowhere else.

    Returns:
        The runs of these sweeps.

    Raises:
        ConfigError: Something does not fit, said before the first run.
        KeyboardInterrupt: It was interrupted; finished runs stay.

    Example:
        >>> import mad_efla as mad
        >>> small = {"model.width": 16, "train.steps": 2, "data.train_examples": 64, "seeds": [0]}
        >>> small |= {"data.validation_examples": 16, "data.test_examples": 16, "settings": "baseline"}
        >>> runs = mad.sweep("recall", mixers=["efla"], sets=small, workers=0)
        >>> runs.status.unique().tolist()
        ['finished']
    """
    from mad_efla.api import sweeping
    from mad_efla.execution import executors, processes
    from mad_efla.plan import expand
    from mad_efla.reporting import live, terminal
    from mad_efla.runs.read import load as read
    from mad_efla.training import fits

    out = Path(out)
    runner = executors.choose("local", device=device, workers=workers)
    sweeps = [expand.expand(name, plan, _assignments(sets, mixers), runner.precision) for name in _some(tasks)]
    said = [note for found in sweeps for note in found.notes]
    said += [line for found in sweeps for line in terminal.matches(fits.check(found, runner.device).matches)]
    if workers != 0:
        processes.prepare(runner.device)
    follow = live.Follow if (_in_notebook() if progress is None else progress) else _Silent
    sweeps, notes = sweeping.prepare(sweeps, out, [Path(file) for file in known])
    ended = sweeping.perform(
        sweeps, out, runner, follow, sweeping.Mirrored(tracking_uri), hours=hours, retry_failed=retry_failed
    )
    if ended.stopped.startswith("interrupted"):
        raise KeyboardInterrupt(ended.stopped)
    names = {run.fingerprint for found in ended.sweeps for run in found.runs}
    own = {(found.plan, found.protocol) for found in ended.sweeps}
    made = Runs([group for group in read(out) if (group.plan, group.protocol) in own])
    made = made[made.frame().index.isin(names)]
    if failed := int((made.status == "failed").sum()):
        said.append(f"{failed} of {len(made)} runs failed; `mad-efla status {out}` says why")
    for line in dict.fromkeys([*said, *notes, ended.stopped, *ended.warnings]):
        if line:
            warnings.warn(line, stacklevel=2)
    return made


def load(*places: str | Path) -> Runs:
    """Read the runs of sweeps that were made before.

    Args:
        *places: Folders of run folders, and archives; `runs` if none is given.

    Raises:
        ConfigError: There is no sweep.
    """
    from mad_efla.runs.read import load as read

    return Runs(read(*map(Path, places or ("runs",))))


def check(name: str, sets: Sets | None = None, width: int = 32) -> "list[Finding]":
    """Check a mixer or a task against all that it promises; a finding with `broken` empty holds.

    Args:
        name: A built-in name, or `package.module:Name`.
        sets: Its fields.
        width: Width of the model that a mixer is built for.

    Example:
        >>> import mad_efla as mad
        >>> [f.promise for f in mad.check("efla", {"heads": 2}) if f.broken]
        []
    """
    from mad_efla import contract

    return contract.check(name, _assignments(sets), width)[1]


class _Silent:
    """Progress that nobody sees."""

    def __init__(self, *_: Any):
        pass

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, events: Iterable[Any]) -> None:
        """Take in what happens."""


def _in_notebook() -> bool:
    import sys

    shell = sys.modules.get("IPython")
    found = shell.get_ipython() if shell else None
    return found is not None and hasattr(found, "kernel")


def _some(tasks: Sequence[str]) -> Sequence[str]:
    if not tasks:
        raise ConfigError("name at least one task, as in sweep('recall')")
    return tasks


def _assignments(sets: Sets | None, mixers: Sequence[Any] | None = None) -> list[str]:
    """Write overrides as `--set` takes them."""
    found = dict(sets or {})
    if mixers is not None:
        found["mixers"] = list(mixers)
    return [f"{field}={json.dumps(value)}" for field, value in found.items()]
