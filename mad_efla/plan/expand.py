"""A sweep: task files x a plan, expanded to runs. All or nothing, before the first run starts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from mad_efla import config
from mad_efla.config import ConfigError, Document, validate
from mad_efla.plan import fields, layers, protocols, request
from mad_efla.plan.fields import Change, entry_name
from mad_efla.plan.grid import Range, Search
from mad_efla.plan.request import Request
from mad_efla.plan.run import DataConfig, Limits, RunConfig, build, build_task, settle, task_class
from mad_efla.tasks import Task

MAX_RUNS = 100_000

_Measured = dict[tuple[str, str, str, str], list[RunConfig]]


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
        notes: Sentences for the user, such as why runs no longer carry the plan's protocol.
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
    notes: Sequence[str] = ()

    @property
    def whole(self) -> list[RunConfig]:
        """All runs that it will have: `runs`, and of every cell those that measure one point."""
        of_cell = {key[:3]: own for key, own in self.measured.items()}
        made = {run.fingerprint for run in self.runs}
        return [*self.runs, *(r for own in of_cell.values() for r in own if r.fingerprint not in made)]

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
    asked = request.read(config.find(task, "tasks"), config.find(plan, "sweeps"), assignments)
    sweep, departed = _build(asked, asked.protocol, precision)
    if not departed:
        return sweep
    sweep, _ = _build(asked, "custom", precision)
    return sweep._replace(notes=[f"protocol custom, not {asked.protocol}: {', '.join(departed)}"])


def _build(asked: Request, protocol: str, precision: str) -> tuple[Sweep, list[str]]:
    """Build every run of a request; return the sweep, and where it departs from the protocol."""
    runs: dict[str, RunConfig] = {}
    measured: _Measured = {}
    departed: dict[str, list[str]] = {}
    checks: dict[str, RunConfig] = {}
    for cell in [] if asked.plan.search else (*layers.cells(asked), *layers.checks(asked)):
        document = layers.lay(asked, cell)
        run = build(settle(document, cell.label, protocol, precision))
        if (point := f"{cell.label} {cell.changes}") not in departed:  # neither mixer nor seed matters
            departed[point] = _departures(asked, run, document)
        if cell.check:
            checks.setdefault(run.fingerprint, run)
        elif cell.chooses or not cell.choosing:
            runs.setdefault(run.fingerprint, run)
        else:
            key = (run.mixer, run.mixer_code, run.condition, run.point)
            if run.fingerprint not in {r.fingerprint for r in measured.setdefault(key, [])}:
                measured[key].append(run)
        if len(runs) > MAX_RUNS:
            raise ConfigError(f"plan {asked.name}: more than {MAX_RUNS} runs; split the plan")
    spaces = _spaces(asked, protocol, precision) if asked.plan.search else []
    ends: list[RunConfig] = []
    for space in spaces:
        middle, *others = [space.build({f: r.at(u) for f, r in space.over.items()}) for u in (0.5, 0.0, 1 - 1e-9)]
        runs.setdefault(middle.fingerprint, middle)
        ends += others
    sweep = Sweep(
        task=asked.task,
        plan=asked.name,
        protocol=protocol,
        runs=list((runs | checks).values()),
        limits=asked.plan.limits,
        search=asked.plan.search,
        prune=asked.plan.prune,
        spaces=spaces,
        about=asked.plan.about,
        match=asked.plan.match,
        ends=ends,
        place=asked.plan_document.place(("mixers",)),
        choosing=asked.plan.choose.seeds if asked.plan.choose and measured else [],
        measured=measured,
        checks=frozenset(checks.keys() - runs.keys() - {r.fingerprint for own in measured.values() for r in own}),
        seeds=asked.plan.seeds,
    )
    return sweep, list(dict.fromkeys(text for found in departed.values() for text in found))


def _spaces(asked: Request, protocol: str, precision: str) -> list[Space]:
    """Return what a search ranges over: a space for each setting and mixer."""
    search = asked.plan.search
    assert search is not None
    over = {f: r for f, r in search.over.items() if f not in asked.settled}
    place = asked.plan_document.place(("search", "over"))

    def builder(cell: layers.Cell) -> Callable[[dict[str, Any]], RunConfig]:
        def build_at(point: dict[str, Any]) -> RunConfig:
            proposed = [Change(field, value, place) for field, value in point.items()]
            return build(settle(layers.lay(asked, cell, proposed), cell.label, protocol, precision))

        return build_at

    names = [entry_name(entry) for entry in asked.plan.mixers]
    return [Space(cell.label, names[cell.index], over, builder(cell)) for cell in layers.cells(asked)]


def _departures(asked: Request, run: RunConfig, document: Document) -> list[str]:
    """Say where a run departs from its protocol by `--set` or by the task file.

    Raises:
        ConfigError: The plan, or a protocol that `--set` names, departs from what its name fixes.
    """
    found, refused = [], []
    for departure in protocols.departures(run):
        place = document.places.get(tuple(departure.field.split(".")), "")
        of_plan = not place.startswith((asked.task_document.name, "--set"))
        if not place:  # a default: of the file that left it out
            of_plan = not departure.field.startswith("task.")
            place = asked.plan_document.place(("protocol",)) if of_plan else asked.task_document.name
        if asked.claims or (of_plan and not asked.shipped):
            refused.append(
                f"{place}: {departure.shown} departs from protocol {run.protocol!r}, which fixes it to "
                f"{departure.rule}; name the protocol custom to change it"
            )
        by = "--set" if place.startswith("--set") else place
        found.append(f"{departure.shown} by {by} ({run.protocol}: {departure.rule})")
    if refused:
        raise ConfigError("\n".join(refused))
    return found


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
    base = request.base(document, Document({}))
    task_class(document.part("task"))
    sets = []
    for text in assignments:
        path, value = config.assignment(text)
        if path.split(".")[0] not in ("task", "data"):
            raise ConfigError(f"--set {text}: {path}: data has only fields of `task` and `data`")
        sets.append(config.from_paths({path: value}, f"--set {text}"))
    found = []
    settled = {path for override in sets for path in override.places if len(path) > 1}
    for label, change in request.changes(document):
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
    for section in fields.SECTIONS:
        for key, value in getattr(run, section).model_dump().items():
            flat[f"{section}.{key}"] = value
    return flat
