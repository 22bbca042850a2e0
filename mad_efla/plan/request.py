"""What is asked for: a task file, a plan and `--set`, read and checked key by key.

Later wins: the task file, the plan's sections, the plan's fields for this task, the setting, the
grid point, `--set`.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from mad_efla import config
from mad_efla.config import ConfigError, Document, Section, suggest, validate
from mad_efla.plan import fields, grid
from mad_efla.plan.fields import Change
from mad_efla.plan.run import Limits, Protocol, task_class

# Keys of a plan below which a field's dotted name is a key itself, and how deep that lies.
_FIELDS_BELOW = {
    "grid": 1,
    "zip": 1,
    "per_task": 2,
    "per_mixer": 2,
    "settings": 3,
    "checks": 3,
    "sample": 2,
    "search": 2,
}


class Choice(Section):
    """How a plan chooses its grid point.

    Attributes:
        seeds: Seeds on which every point of the grid is made. None of them is measured.
    """

    seeds: list[int] = Field(min_length=1)


class Plan(grid.Points):
    """Who learns, and how; what is varied beside it is in `grid.Points`.

    Attributes:
        about: What `mad-efla list plans` says of it; the first sentence alone in the list.
        protocol: The rules its scores are taken by.
        mixers: Names, mappings with fields, or lists of them for hybrids.
        settings: `all` (the baseline and everything the task file varies), `baseline`, or per task
            a mapping of label to overrides.
        checks: Per task a mapping of label to overrides, as `settings`: easy settings that only check that all
            is well. Every mixer makes one run of each, on the first of `seeds` and without the grid; it stands
            in tables, and no score, choice or comparison counts it.
        per_task: By task name, fields that hold for this task only.
        seeds: One run each.
        choose: Make the grid on seeds of its own, and the chosen point alone on `seeds`.
        match: Equal terms to hold mixers to: `state`, 2,048 numbers per mixer layer beside the
            windows of convolutions, or `parameters`, those of the plan's first mixer. The sweep
            says by how much each misses.
        limits: How long and how large a run may grow.
    """

    about: str = ""
    protocol: Protocol = "custom"
    mixers: list[Any] = Field(min_length=1)
    settings: Literal["all", "baseline"] | dict[str, dict[str, dict[str, Any]]] = "all"
    checks: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    per_task: dict[str, dict[str, Any]] = Field(default_factory=dict)
    seeds: list[int] = Field(default=[0], min_length=1)
    choose: Choice | None = None
    match: Literal["state", "parameters"] | None = None
    limits: Limits = Field(default_factory=Limits)


class Request(NamedTuple):
    """A task under a plan, as it is asked for.

    Attributes:
        task: The task's name.
        name: The plan's name, see `plan_name`.
        plan: The plan, with what `--set` says of it.
        protocol: The plan's protocol, or the one that its way of choosing makes.
        plan_document: The plan's values and their places.
        task_document: The task file's values and their places.
        base: What holds for every run before its setting.
        overrides: What `--set` says of every run; laid over all else.
        labels: Settings that `--set settings=` picks; None for all of the plan's.
        shipped: Whether the plan is a shipped one.
        claims: Whether `--set` names the protocol.
    """

    task: str
    name: str
    plan: Plan
    protocol: Protocol
    plan_document: Document
    task_document: Document
    base: Document
    overrides: list[Change]
    labels: list[str] | None
    shipped: bool
    claims: bool

    @property
    def settled(self) -> set[str]:
        """Fields that `--set` has given one value; they are not varied."""
        return {field for change in self.overrides for field in change.leaves()}


def read(task: Path, plan: Path, assignments: Iterable[str] = ()) -> Request:
    """Read a task file and a plan, and lay over them what `--set` says.

    Args:
        task: The task file.
        plan: The plan's file.
        assignments: What `--set` was given: `FIELD=VALUE`.

    Raises:
        ConfigError: With file, line, value, rule and cure.
    """
    task_document, plan_document = config.read(task), config.read(plan)
    of_plan, labels, of_runs = _sort(assignments)
    plan_document = config.merge(plan_document, *of_plan)
    base(task_document, plan_document)  # sections must be mappings
    name = task_document.part("task").data.get("name")
    task_class(task_document.part("task"))
    plan_document, overrides = _lay(plan_document, of_runs, str(name))
    parsed = validate(Plan, plan_document.without(*fields.SECTIONS))
    _check_keys(parsed, plan_document, task_document, str(name))
    grid.check(parsed, plan_document, parsed.mixers, str(name))
    found = base(task_document, plan_document)
    if name in parsed.per_task:
        place = plan_document.place(("per_task", str(name)))
        found = config.merge(found, config.from_paths(parsed.per_task[str(name)], place))
    return Request(
        task=str(name),
        name=plan_name(plan),
        plan=parsed,
        protocol=_protocol(parsed, plan_document),
        plan_document=plan_document,
        task_document=task_document,
        base=found,
        overrides=overrides,
        labels=labels,
        shipped=plan_name(plan) == plan.stem and plan.stem in {p.stem for p in config.presets("sweeps")},
        claims=plan_document.place(("protocol",)).startswith("--set"),
    )


def base(task: Document, plan: Document) -> Document:
    """Lay a plan's sections over those of a task file.

    Raises:
        ConfigError: A section is no mapping, or stands in the wrong file.
    """
    for key in task.data:
        if key not in ("task", "data", "vary"):
            known = suggest(key, ["task", "data", "vary"])
            raise ConfigError(f"{task.place((key,))}: {key}: unknown key{known}")
    for key in fields.SECTIONS:
        for document in (task, plan):
            document.part(key)  # must be a mapping
    if "name" in plan.part("task").data:
        raise ConfigError(f"{plan.place(('task',))}: task.name belongs to the task file; remove it")
    sections = [k for k in plan.data if k not in fields.SECTIONS]
    return config.merge(task.without("vary"), plan.without(*sections))


def changes(task: Document) -> list[tuple[str, Document]]:
    """Return the baseline of a task file and each value it varies, as overrides of it.

    Fields that change at once are mappings under `vary.together`: `{task.seq_len: 8, ...}`.

    Args:
        task: The task file; its task must be known.

    Raises:
        ConfigError: Under `vary` stands what is no field of a task or its data, or no list.
    """
    name = str(task.part("task").data["name"])
    found = [("baseline", Document({}, {}, task.name))]
    for field, values in task.part("vary").data.items():
        place = task.place(("vary", field))
        if field != "together":
            fields.check(field, name, place)
        if not isinstance(values, list):
            raise ConfigError(f"{place}: vary.{field}={values!r} must be a list of values")
        for value in values:
            change = value if field == "together" else {field: value}
            if not isinstance(change, dict) or not change:
                raise ConfigError(
                    f"{place}: vary.together has {value!r}, which must be a mapping of fields to "
                    "values, as in {task.seq_len: 128, task.pairs: 8}"
                )
            fields.check_all(change, name, place)
            label = ",".join(f"{path.split('.')[-1]}={new}" for path, new in change.items())
            found.append((label, config.from_paths(change, place)))
    return found


def plan_name(path: Path) -> str:
    """Name a plan: a shipped one by its file's stem, any other by its path from here.

    So a user's own `my/quick.yaml` is `my/quick`, and never passes for the shipped `quick`; a copy
    that is equal byte for byte is the shipped plan.
    """
    shipped = {preset.stem: preset for preset in config.presets("sweeps")}
    preset = shipped.get(path.stem)
    if preset and (preset.resolve() == path.resolve() or preset.read_bytes() == path.read_bytes()):
        return path.stem
    absolute = Path(os.path.abspath(path))
    near = absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute
    name = near.as_posix().removesuffix(".yaml")
    return near.as_posix() if name in shipped else name


# ------------------------------------------------------------------ --set


def _sort(assignments: Iterable[str]) -> tuple[list[Document], list[str] | None, list[Change]]:
    """Tell overrides of the plan itself (`seeds`), picked settings, and overrides of every run."""
    of_plan: list[Document] = []
    of_runs: list[Change] = []
    labels: list[str] | None = None
    for text in assignments:
        field, value = config.assignment(text)
        place = f"--set {text}"
        head = field.split(".")[0]
        given = value if isinstance(value, list) else [value]
        if field == "settings" and value not in ("all", "baseline") and all(isinstance(v, str) for v in given):
            labels = given
        elif field == "mixers" or (head in Plan.model_fields and head != "mixers"):
            of_plan.append(config.from_path(tuple(field.split(".", _FIELDS_BELOW.get(head, -1))), value, place))
        else:
            of_runs.append(Change(field, value, place))
    return of_plan, labels, of_runs


def _lay(plan: Document, of_runs: list[Change], task: str) -> tuple[Document, list[Change]]:
    """Make grids of lists that `--set` gives to fields of one value; return the plan, and the rest."""
    entries = plan.data.get("mixers")
    entries = entries if isinstance(entries, list) else []
    rest = []
    for change in of_runs:
        field, value, place = change
        fields.check_any(field, task, entries, place)
        if isinstance(value, list) and field not in fields.SECTIONS and not fields.holds_lists(field, task, entries):
            plan = config.merge(plan, Document({"grid": {field: value}}, {("grid", field): place}, place))
            for mixer, own in plan.part("per_mixer").data.items():
                if field in own:  # what is said later holds for all
                    plan = config.merge(plan, Document({"per_mixer": {mixer: {field: value}}}, {(): place}, place))
        else:
            rest.append(change)
    return plan, rest


# ------------------------------------------------------------------ checks


def _check_keys(plan: Plan, document: Document, task: Document, own: str) -> None:
    """Refuse keys of `settings`, `checks` and `per_task` that mean nothing, of tasks that are not swept, too."""
    settings = plan.settings if isinstance(plan.settings, dict) else {}
    for key, name, labels in (
        *(("settings", *i) for i in settings.items()),
        *(("checks", *i) for i in plan.checks.items()),
    ):
        place = document.place((key, name))
        fields.check_task(name, own, key, place)
        if not labels:
            raise ConfigError(f"{place}: {key}.{name}={{}} must have a setting, such as baseline: {{}}")
        for label, overrides in labels.items():
            fields.check_all(overrides, name, document.place((key, name, label)))
    for name, overrides in plan.per_task.items():
        fields.check_task(name, own, "per_task", document.place(("per_task", name)))
        fields.check_all(overrides, name, document.place(("per_task", name)))
    changes(task)


def _protocol(plan: Plan, document: Document) -> Protocol:
    if plan.search:
        if plan.protocol != "custom" or plan.unmatched or len(plan.seeds) > 1:
            raise ConfigError(
                f"{document.place(('search',))}: search explores, by a protocol of its own and "
                "with one seed; leave protocol and unmatched out, and give one of seeds"
            )
        return "exploring"
    if not plan.unmatched:
        return plan.protocol
    if plan.protocol != "custom":
        raise ConfigError(
            f"{document.place(('unmatched',))}: unmatched=true departs from protocol "
            f"{plan.protocol!r}, which gives all mixers one grid; leave protocol out"
        )
    return "unmatched"
