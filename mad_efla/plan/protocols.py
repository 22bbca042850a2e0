"""Protocols: what the name of one fixes, and whether a run keeps to it.

The shipped plan of a protocol's name, `mad-lab` of `mad_lab.yaml`, with the shipped task files is its
definition: a run keeps to it if its task, data, model, optimiser and budget are, all together, those of
one of that plan's runs. So whatever a run holds is fixed by default, and what is free stands in `FREE`.
"""

import functools
from typing import Any, NamedTuple

from mad_efla import config
from mad_efla.plan import layers, request
from mad_efla.plan.run import RunConfig, build, settle

FREE = {
    "mixers": "who learns",
    "code": "the source of mixers of your own",
    "seed": "which and how many, those that choose included",
    "setting": "labels; which of its settings and points are made",
    "protocol": "the name itself",
}
"""Fields of a run that no protocol fixes, and what is left free by that."""

NOT_IN_RUNS = "Device, number of workers and limits are no part of a run, and free."


class Departure(NamedTuple):
    """A field in which a run is none that its protocol allows.

    Attributes:
        field: Its dotted name.
        value: What the run holds.
        allowed: What runs of the protocol hold.
    """

    field: str
    value: Any
    allowed: list[Any]

    @property
    def shown(self) -> str:
        """The field and its value, as `optim.lr=0.5`."""
        return f"{self.field}={written(self.value)}"

    @property
    def rule(self) -> str:
        """What the field is fixed to, as `0.001 or 0.005`."""
        allowed = " or ".join(dict.fromkeys(map(written, self.allowed)))
        return allowed + (", though not beside the run's other values" if self.value in self.allowed else "")


class Definition(NamedTuple):
    """What a protocol fixes for one task.

    Attributes:
        runs: The fields of each run that it allows, see `fixed`.
        free: Fields that this protocol leaves free beside `FREE`, and what is free by that.
    """

    runs: list[dict[str, Any]]
    free: dict[str, str]


def fixed(run: RunConfig, free: dict[str, str]) -> dict[str, Any]:
    """Return what a protocol fixes of a run, by dotted name: all but `FREE` and `free`."""
    values: dict[str, Any] = {}
    for name, value in run.model_dump().items():
        if name in FREE:
            continue
        values |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return {field: value for field, value in values.items() if field not in free}


@functools.cache
def definition(protocol: str, task: str) -> Definition | None:
    """Return what a protocol fixes for a task; None if it has no such plan or task.

    Args:
        protocol: Its name.
        task: The task's name.
    """
    plans = {path.stem: path for path in config.presets("sweeps")}
    plan = plans.get(protocol.replace("-", "_"))
    if plan is None or config.read(plan).data.get("protocol") != protocol:
        return None
    runs: list[dict[str, Any]] = []
    free: dict[str, str] = {}
    for path in _task_files(task):
        asked = request.read(path, plan, ["mixers=[identity]", "seeds=[0]"])
        if isinstance(asked.plan.settings, dict) and task not in asked.plan.settings:
            return None
        if asked.base.part("train").data.get("precision") == "auto":
            free = {"train.precision": "float32 or bfloat16, as the device has it"}
        for cell in (*layers.cells(asked), *layers.checks(asked)):
            run = build(settle(layers.lay(asked, cell), cell.label, protocol, "float32"))
            runs.append(fixed(run, free))
    return Definition(runs, free) if runs else None


def departures(run: RunConfig) -> list[Departure]:
    """Return the fields in which a run departs from the nearest run that its protocol allows.

    `custom`, `unmatched` and `exploring` fix nothing.
    """
    if run.protocol in ("custom", "unmatched", "exploring"):
        return []
    found = definition(run.protocol, run.task.name)
    if found is None:
        return [Departure("task.name", run.task.name, ["the tasks of its plan"])]
    own = fixed(run, found.free)
    differing = [[f for f in (own | other) if own.get(f) != other.get(f)] for other in found.runs]
    return [Departure(f, own.get(f), [r.get(f) for r in found.runs]) for f in min(differing, key=len)]


def written(value: Any) -> str:
    """Write a value as a plan would."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _task_files(task: str) -> list[Any]:
    paths = config.presets("tasks")
    named = [path for path in paths if path.stem == task]
    return named or [path for path in paths if config.read(path).part("task").data.get("name") == task]
