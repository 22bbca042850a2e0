"""A sweep: task files x a plan, expanded to runs. All or nothing, before the first run starts.

Later wins: the task file, the plan's sections, the plan's fields for this task, the setting, the
grid point, `--set`.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import Field

from mad_efla import config
from mad_efla.config import ConfigError, Document, Section, validate
from mad_efla.plan import grid
from mad_efla.plan.grid import Range, Search
from mad_efla.plan.run import DataConfig, Limits, Protocol, RunConfig, build, build_task
from mad_efla.tasks import Task

_SECTIONS = ("task", "data", "model", "optim", "train")
MAX_RUNS = 100_000


class Choice(Section):
    """How a plan chooses its grid point.

    Attributes:
        seeds: Seeds on which every point of the grid is made. None of them is measured.
    """

    seeds: list[int] = Field(min_length=1)


class Plan(grid.Points):
    """Who learns, and how; what is varied beside it is in `grid.Points`.

    Attributes:
        about: One line for `mad-efla list plans`.
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


class Space(NamedTuple):
    """What a search ranges over: one mixer at one setting.

    Attributes:
        setting: The setting's label.
        mixer: The mixer's name.
        over: Field to range.
        build: Builds the run of a point.
    """

    setting: str
    mixer: str
    over: dict[str, Range]
    build: Callable[[dict[str, Any]], RunConfig]

    def holds(self, run: RunConfig) -> bool:
        """Tell whether a run is a point of this space."""
        own = self.build({field: r.at(0.5) for field, r in self.over.items()})
        return (run.setting, run.mixer) == (self.setting, own.mixer)


class Sweep(NamedTuple):
    """The runs of one task under one plan.

    Attributes:
        task: The task's name.
        plan: The plan's name.
        protocol: The plan's protocol.
        runs: In the order of the plan, each once.
        limits: How long and how large each run may grow.
        search: How points are proposed, if they are; `runs` are then the middles of the spaces.
        prune: How trials are ended early.
        spaces: What is searched.
        about: The plan's own sentence.
        match: Equal terms that mixers are held to, see `Plan.match`.
        ends: Runs at the middles and ends of what is searched: they must fit, too.
        place: Where the plan names its mixers, for errors.
        choosing: Seeds that choose the grid point; `runs` are then those, and what was chosen.
        measured: The runs that a point would be measured by, by mixer, its code, condition and
            point; empty where nothing is chosen on seeds of its own.
        checks: Fingerprints of the runs of `Plan.checks`.
        seeds: The plan's seeds, those that are measured.
    """

    task: str
    plan: str
    protocol: str
    runs: list[RunConfig]
    limits: Limits
    search: Search | None = None
    prune: str | None = None
    spaces: Sequence[Space] = ()
    about: str = ""
    match: Literal["state", "parameters"] | None = None
    ends: Sequence[RunConfig] = ()
    place: str = ""
    choosing: Sequence[int] = ()
    measured: Mapping[tuple[str, str, str, str], list[RunConfig]] = MappingProxyType({})
    checks: frozenset[str] = frozenset()
    seeds: Sequence[int] = ()

    @property
    def id(self) -> str:
        """Hash of what the sweep consists of."""
        runs = [r for r in self.runs if not self.measured or r.seed in self.choosing or r.fingerprint in self.checks]
        runs += [r for own in self.measured.values() for r in own]
        parts = [self.task, self.plan, *sorted(r.fingerprint for r in runs)]
        if self.search:
            parts += [self.search.model_dump_json(exclude={"trials"}), str(self.prune)]
        return config.digest(config.canonical_json(parts))


def expand(task: str, plan: str, assignments: Iterable[str], precision: str) -> Sweep:
    """Build every run of a task under a plan; whether its model can be built, `training.fits` says.

    Args:
        task: Path or name of a task file.
        plan: Path or name of a plan.
        assignments: What `--set` was given: `FIELD=VALUE`.
        precision: What `train.precision: auto` means here.

    Raises:
        ConfigError: With file, line, value, rule and cure.
    """
    task_file, plan_file = config.find(task, "tasks"), config.find(plan, "sweeps")
    plan_sets, run_sets = _split_sets(assignments)
    plan_document = config.merge(config.read(plan_file), *plan_sets)
    parsed = validate(Plan, plan_document.without(*_SECTIONS))
    names = [_entry_name(entry) for entry in parsed.mixers]
    protocol = _protocol(parsed, plan_document, names)
    settled = {".".join(map(str, path)) for s in run_sets for path in s.places if path}
    task_document = config.read(task_file)
    base = _base(task_document, plan_document)
    name = base.part("task").data.get("name")
    if name in parsed.per_task:
        place = plan_document.place(("per_task", name))
        base = config.merge(base, config.from_paths(parsed.per_task[name], place))
    points = [grid.points(parsed, plan_document, mixer, settled) for mixer in names]
    choosing = _choosing(parsed, plan_document, points)
    seeds = [(("choose", "seeds", i), s) for i, s in enumerate(choosing)]
    seeds += [(("seeds", i), s) for i, s in enumerate(parsed.seeds)]
    measured: dict[tuple[str, str, str, str], list[RunConfig]] = {}
    runs: dict[str, RunConfig] = {}
    spaces: list[Space] = []
    ends: list[RunConfig] = []
    over = {f: r for f, r in parsed.search.over.items() if f not in settled} if parsed.search else {}
    for label, setting in _settings(parsed, plan_document, task_document, str(name)):
        for (index, entry), found in zip(enumerate(parsed.mixers), points, strict=True):
            for point, (path, seed) in itertools.product(found, seeds):
                place = plan_document.place(path)
                own = Document({"seed": seed}, {("seed",): place}, plan_document.name)
                parts = (_mixers(plan_document, index, entry), *point, own)
                cell = config.merge(base, setting, *parts)
                if parsed.search:
                    place = plan_document.place(("search", "over"))
                    builder = functools.partial(_build_point, cell, place, run_sets, label, protocol, precision)
                    spaces.append(Space(label, names[index], over, builder))
                    marks = [{f: r.at(u) for f, r in over.items()} for u in (0.5, 0.0, 1 - 1e-9)]
                    run, *others = [builder(mark) for mark in marks]
                    ends += others
                else:
                    cell = config.merge(cell, *run_sets)
                    run = build(_resolve(cell, label, protocol, precision))
                if choosing and path[0] == "seeds":
                    key = (run.mixer, run.mixer_code, run.condition, run.point)
                    measured.setdefault(key, []).append(run)
                    continue
                runs.setdefault(run.fingerprint, run)
                if len(runs) > MAX_RUNS:
                    raise ConfigError(f"{plan_file}: more than {MAX_RUNS} runs; split the plan")
    checks = {}
    for label, setting in _checks(parsed, plan_document, str(name)):
        for index, entry in enumerate(parsed.mixers):
            own = Document(
                {"seed": parsed.seeds[0]}, {("seed",): plan_document.place(("seeds", 0))}, plan_document.name
            )
            cell = config.merge(base, setting, _mixers(plan_document, index, entry), own, *run_sets)
            run = build(_resolve(cell, label, protocol, precision))
            if run.fingerprint not in runs:
                checks[run.fingerprint] = run
    return Sweep(
        str(name),
        plan_file.stem,
        protocol,
        [*runs.values(), *checks.values()],
        parsed.limits,
        parsed.search,
        parsed.prune,
        spaces,
        parsed.about,
        parsed.match,
        ends,
        plan_document.place(("mixers",)),
        choosing,
        measured,
        frozenset(checks),
        parsed.seeds,
    )


def _choosing(plan: Plan, document: Document, points: list[list[tuple[Document, ...]]]) -> list[int]:
    """Return the seeds that choose; none where there is no grid, or `--set` has settled it."""
    if plan.choose is None:
        return []
    place = document.place(("choose",))
    if plan.search:
        raise ConfigError(f"{place}: choose needs a grid; a search chooses by itself, take it out")
    if both := sorted(set(plan.choose.seeds) & set(plan.seeds)):
        raise ConfigError(
            f"{place}: choose.seeds={plan.choose.seeds} and seeds={plan.seeds} share {both}; a "
            "seed that chose must not be measured, take others"
        )
    return plan.choose.seeds if any(len(found) > 1 for found in points) else []


def _build_point(
    cell: Document, place: str, sets: list[Document], label: str, protocol: str, precision: str, point: dict[str, Any]
) -> RunConfig:
    found = config.merge(cell, config.from_paths(point, place), *sets)
    return build(_resolve(found, label, protocol, precision))


class Setting(NamedTuple):
    """The baseline of a task file, or one of its changes: what there is to generate, no model.

    Attributes:
        label: `baseline`, or what is changed: `vocab_size=32`.
        task: The task.
        data: Examples of each split.
    """

    label: str
    task: Task
    data: DataConfig


def settings(task: str, assignments: Iterable[str] = ()) -> list[Setting]:
    """Read a task file alone: its baseline and every change, less those that `--set` settles.

    Args:
        task: Path or name of a task file.
        assignments: What `--set` was given, `FIELD=VALUE`; fields of `task` and `data` only.

    Raises:
        ConfigError: With file, line, value, rule and cure.
    """
    document = config.read(config.find(task, "tasks"))
    base = _base(document, Document({}))
    sets = []
    for text in assignments:
        path, value = config.assignment(text)
        if path.split(".")[0] not in ("task", "data"):
            raise ConfigError(f"--set {text}: {path}: data has only fields of `task` and `data`")
        sets.append(config.from_paths({path: value}, f"--set {text}"))
    found = []
    settled = {path for override in sets for path in override.places if len(path) > 1}
    for label, change in _changes(document):
        if settled & set(change.places):
            continue
        cell = config.merge(base, change, *sets)
        sizes = validate(DataConfig, cell.part("data"), "data")
        found.append(Setting(label, build_task(cell.part("task")), sizes))
    return found


def choose(found: list[Setting], which: str) -> list[Setting]:
    """Pick settings as users name them: a label, a number from 0 for the baseline, or `all`.

    Raises:
        ConfigError: There is no such setting.
    """
    labels = [s.label for s in found]
    if which == "all":
        return found
    if which in labels:
        return [found[labels.index(which)]]
    if which.isdecimal() and int(which) < len(found):
        return [found[int(which)]]
    raise ConfigError(
        f"--setting {which}: must be all, 0 to {len(found) - 1}, or a label" + config.suggest(which, labels)
    )


def differences(runs: list[RunConfig]) -> dict[str, list[Any]]:
    """Return the fields in which runs differ, with each run's value."""
    flat = [flatten(r) for r in runs]
    names = list(dict.fromkeys(name for f in flat for name in f))
    columns = {name: [f.get(name) for f in flat] for name in names}
    shown = {"train.steps", "train.epochs"}  # the steps of the whole budget are shown anyway
    return {name: values for name, values in columns.items() if name not in shown and len(set(map(str, values))) > 1}


def flatten(run: RunConfig) -> dict[str, Any]:
    """Return a run's fields by dotted name; the mixers as one label."""
    flat: dict[str, Any] = {"mixer": run.mixer, "setting": run.setting, "seed": run.seed}
    for section in _SECTIONS:
        for key, value in getattr(run, section).model_dump().items():
            flat[f"{section}.{key}"] = value
    return flat


# ------------------------------------------------------------------ pieces


def _split_sets(assignments: Iterable[str]) -> tuple[list[Document], list[Document]]:
    """Tell overrides of the plan itself (`seeds`) from overrides of every run (`optim.lr`)."""
    of_plan, of_runs = [], []
    for text in assignments:
        path, value = config.assignment(text)
        document = config.from_paths({path: value}, f"--set {text}")
        (of_plan if path.split(".")[0] in Plan.model_fields else of_runs).append(document)
    return of_plan, of_runs


def _base(task: Document, plan: Document) -> Document:
    for key in task.data:
        if key not in ("task", "data", "vary"):
            known = config.suggest(key, ["task", "data", "vary"])
            raise ConfigError(f"{task.place((key,))}: {key}: unknown key{known}")
    for key in ("task", *_SECTIONS):
        for document in (task, plan):
            document.part(key)  # must be a mapping
    if "name" in plan.part("task").data:
        raise ConfigError(f"{plan.place(('task',))}: task.name belongs to the task file; remove it")
    sections = [k for k in plan.data if k not in _SECTIONS]
    return config.merge(task.without("vary"), plan.without(*sections))


def _entry_name(entry: Any) -> str:
    """Name an entry of `mixers` as `per_mixer` does: `efla`, `attention+efla`."""
    parts = entry if isinstance(entry, list) else [entry]
    return "+".join(str(p.get("name") if isinstance(p, dict) else p) for p in parts)


def _protocol(plan: Plan, document: Document, names: list[str]) -> Protocol:
    grid.check(plan, document, names)
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


def _settings(parsed: Plan, plan: Document, task: Document, name: str) -> list[tuple[str, Document]]:
    empty = Document({}, {}, task.name)
    if isinstance(parsed.settings, dict):
        if name not in parsed.settings:
            raise ConfigError(
                f"{plan.place(('settings',))}: settings has none for task {name!r}"
                + config.suggest(name, list(parsed.settings))
            )
        return [
            (label, config.from_paths(overrides, plan.place(("settings", name, label))))
            for label, overrides in parsed.settings[name].items()
        ]
    return _changes(task) if parsed.settings == "all" else [("baseline", empty)]


def _checks(parsed: Plan, plan: Document, name: str) -> list[tuple[str, Document]]:
    return [
        (label, config.from_paths(overrides, plan.place(("checks", name, label))))
        for label, overrides in parsed.checks.get(name, {}).items()
    ]


def _changes(task: Document) -> list[tuple[str, Document]]:
    """Return the baseline of a task file and each value it varies, as overrides of it.

    Fields that change at once are mappings under `vary.together`: `{task.seq_len: 8, ...}`.
    """
    found = [("baseline", Document({}, {}, task.name))]
    for field, values in task.part("vary").data.items():
        place = task.place(("vary", field))
        if not isinstance(values, list):
            raise ConfigError(f"{place}: vary.{field}={values!r} must be a list of values")
        for value in values:
            change = value if field == "together" else {field: value}
            if not isinstance(change, dict) or not change:
                raise ConfigError(
                    f"{place}: vary.together has {value!r}, which must be a mapping of fields to "
                    "values, as in {task.seq_len: 128, task.pairs: 8}"
                )
            label = ",".join(f"{path.split('.')[-1]}={new}" for path, new in change.items())
            found.append((label, config.from_paths(change, place)))
    return found


def _mixers(plan: Document, index: int, entry: Any) -> Document:
    entries = entry if isinstance(entry, list) else [entry]
    places = {("mixers", i): plan.place(("mixers", index)) for i in range(len(entries))}
    return Document({"mixers": entries}, places, plan.name)


def _resolve(cell: Document, label: str, protocol: str, precision: str) -> Document:
    data = dict(cell.data) | {"setting": label, "protocol": protocol}
    train = cell.part("train").data
    if train.get("precision") == "auto":
        data["train"] = train | {"precision": precision}
    return Document(data, cell.places, cell.name)
