"""What there is to choose from: tasks, mixers and plans, and examples of a task.

A list has a line each that fits 80 columns; with a name it says all that is known.
"""

import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import mad_efla.mixers
import mad_efla.tasks
from mad_efla import config, plugins
from mad_efla.config import ConfigError, suggest
from mad_efla.execution import costs, machine
from mad_efla.plan import expand, layers, protocols, request
from mad_efla.plan.fields import entry_name
from mad_efla.plan.request import Plan, Request
from mad_efla.plan.run import build_task, mixer_label
from mad_efla.reporting import terminal
from mad_efla.reporting.table import Column, Table
from mad_efla.tasks import RealTask
from mad_efla.training import data, model

Block = tuple[list[int] | list[float], list[str], list[int], list[int] | None]

_WIDTH = 80  # columns of a line
_UNKNOWN = "not known yet"


def table(kind: str, out: Path, workers: int) -> Table:
    """List all tasks, mixers or plans, a line each.

    Args:
        kind: `tasks`, `mixers` or `plans`.
        out: Folder of run folders, from which the time of plans is known.
        workers: How many runs run at a time.
    """
    if kind == "plans":
        rows = [_plan_row(path, out, workers) for path in config.presets("sweeps")]
        return _fitted(["name", "what it is", "runs", "time"], rows)
    if kind == "mixers":
        return _fitted(
            ["name", "what it is"], [[n, _about(plugins.mixer(n), n)] for n in plugins.names(mad_efla.mixers)]
        )
    files = {path.stem: path for path in config.presets("tasks")}
    rows = []
    for name in plugins.names(mad_efla.tasks):
        count = len(request.changes(config.read(files[name]))) if name in files else 1
        rows.append([name, _about(plugins.task(name), name), str(count)])
    return _fitted(["name", "what it is", "settings"], rows)


def details(kind: str, name: str, out: Path, workers: int) -> list[str | Table]:
    """Say all that is known of one task, mixer or plan.

    Args:
        kind: `tasks`, `mixers` or `plans`.
        name: Its name; of a plan or task also a file, of a mixer or task also `package.module:Name`.
        out: Folder of run folders, from which the time of plans is known.
        workers: How many runs run at a time.

    Raises:
        ConfigError: There is no such thing.
    """
    if kind == "plans":
        return _plan_details(config.find(name, "sweeps"), out, workers)
    if kind == "mixers":
        found = plugins.mixer(name)
        return [_doc(found), _fields(found.Config)]
    if ":" in name:
        return [_doc(plugins.task(name)), _fields(plugins.task(name))]
    document = config.read(config.find(name, "tasks"))
    task = str(document.part("task").data.get("name"))
    settings = expand.settings(name)
    rows: list[list[Any]] = [[s.label, s.data.train_examples, s.task.input_length] for s in settings]
    columns = [Column("setting"), Column("training examples", "count"), Column("tokens", "count")]
    return [_doc(plugins.task(task)), _fields(plugins.task(task)), Table(columns, rows)]


# ------------------------------------------------------------------ plans


def _plan_row(path: Path, out: Path, workers: int) -> list[str]:
    parsed, tasks = _plan(path), _named_tasks(path)
    if tasks is None:
        asked = _first_request(path)
        found = list(layers.cells(asked))
        every = parsed.settings == "all"
        count = sum(cell.label == found[0].label for cell in found)
        return [path.stem, parsed.about, f"{count:,}/{'setting' if every else 'task'}", "by task"]
    count = sum(_count(request.read(config.find(task, "tasks"), path)) for task in tasks)
    return [path.stem, parsed.about, f"{count:,}", _time(path, tasks, out, workers)]


def _plan_details(path: Path, out: Path, workers: int) -> list[str | Table]:
    parsed = _plan(path)
    tasks = _named_tasks(path) or _fitting_tasks(path)
    rows: list[list[Any]] = []
    for task in tasks:
        asked = request.read(config.find(task, "tasks"), path)
        labels = len(layers.settings(asked))
        rows.append([task, labels, _count(asked), _time(path, [task], out, workers)])
    columns = [Column("task"), Column("settings", "count"), Column("runs", "count"), Column(f"time, {workers} workers")]
    varied = {kind: value for kind, value in (("grid", parsed.grid), ("zip", parsed.zip)) if value}
    varied |= {"cells": parsed.cells} if parsed.cells else {}
    lines = [parsed.about, f"protocol: {parsed.protocol}"]
    lines += [f"{kind}: {value}" for kind, value in varied.items()]
    lines += [f"seeds: {parsed.seeds}" + (f", chosen on {parsed.choose.seeds}" if parsed.choose else "")]
    lines += ["mixers:", *(f"  {_mixer(entry)}" for entry in parsed.mixers)]
    return ["\n".join(lines), Table(columns, rows), *_promises(parsed.protocol, tasks)]


def _promises(protocol: str, tasks: list[str]) -> list[str | Table]:
    """Say what a protocol fixes, and what it leaves free."""
    found = [d for task in tasks if (d := protocols.definition(protocol, task))]
    if not found:
        return ["This protocol fixes nothing."] if protocol == "custom" else []
    values: dict[str, dict[str, None]] = {}
    for run in (run for one in found for run in one.runs):
        for field, value in run.items():
            if not field.startswith("task.") or field == "task.as_mad_lab":
                values.setdefault(field, {})[protocols.written(value)] = None
    rows: list[list[Any]] = [[field, " or ".join(held)] for field, held in values.items()]
    rows.append(["other fields of task", "those of the settings"])
    free: list[list[Any]] = [[name, text] for name, text in (protocols.FREE | found[0].free).items()]
    return [
        Table([Column("field"), Column("fixed to")], rows, title=f"Protocol {protocol} fixes"),
        Table([Column("field"), Column("what is free")], free, title="It leaves free", note=protocols.NOT_IN_RUNS),
    ]


def _plan(path: Path) -> Plan:
    return config.validate(Plan, config.read(path).without("task", "data", "model", "optim", "train"))


def _named_tasks(path: Path) -> list[str] | None:
    settings, shipped = _plan(path).settings, {task.stem for task in config.presets("tasks")}
    return [task for task in settings if task in shipped] if isinstance(settings, dict) else None


def _fitting_tasks(path: Path) -> list[str]:
    """Name the shipped tasks that a plan can be made of."""
    found = []
    for task in config.presets("tasks"):
        try:
            asked = request.read(task, path, ["mixers=[identity]"])
            expand.expand(str(task), str(path), [f"settings=[{layers.settings(asked)[0][0]}]"], "float32")
        except ConfigError:
            continue
        found.append(task.stem)
    return found


def _first_request(path: Path) -> Request:
    """Ask for a plan with the first shipped task that it fits."""
    for task in config.presets("tasks"):
        try:
            return request.read(task, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}: fits no shipped task")


def _count(asked: Request) -> int:
    """Count the runs of a request; those that measure a chosen point once for all points."""
    choosing, measured = 0, set()
    for cell in layers.cells(asked):
        if cell.chooses or not cell.choosing:
            choosing += 1
        else:
            measured.add((cell.label, cell.index, cell.seed))
    return choosing + len(measured) + sum(1 for _ in layers.checks(asked))


def _time(path: Path, tasks: list[str], out: Path, workers: int) -> str:
    """Say how long a plan takes, where runs that cost as much have finished under `out`."""
    if not (out / "sweeps").is_dir():
        return _UNKNOWN
    precision = machine.resolve_precision("cpu")
    runs = [run for task in tasks for run in expand.expand(task, str(path), (), precision).whole]
    found = costs.Costs(runs).read(out)
    if not all(found.is_seen(run.fingerprint) for run in runs):
        return _UNKNOWN
    seconds = found.seconds_left([run.fingerprint for run in runs], {}, workers)
    return _UNKNOWN if seconds is None else terminal.duration(seconds)


def _mixer(entry: Any) -> str:
    """Write an entry of `mixers` as tables do."""
    parts = entry if isinstance(entry, list) else [entry]
    labels = []
    for part in parts:
        values = {"name": part} if isinstance(part, str) else part
        config_class = plugins.mixer(entry_name(part)).Config
        labels.append(mixer_label(config.validate(config_class, config.Document(values))))
    return "+".join(labels)


# ------------------------------------------------------------------ lines


def _fitted(headings: list[str], rows: list[list[str]]) -> Table:
    """Make a table of lines: the second column, what a thing is, takes the room that is left."""
    widths = [max(len(heading), *(len(row[x]) for row in rows)) for x, heading in enumerate(headings)]
    margins = 2 * len(headings) + 1
    room = _WIDTH - margins - sum(widths) + widths[1]
    fitted: list[list[Any]] = [[row[0], phrase(row[1], room), *row[2:]] for row in rows]
    return Table([Column(heading) for heading in headings], fitted)


def phrase(text: str, room: int) -> str:
    """Cut a text where its sense allows, at a mark between phrases or else between words."""
    text = text.removesuffix(".")
    if len(text) <= room:
        return text
    for marks in (". ", "; ", ": ", ", ", " "):
        cut = text.rfind(marks, 0, room + len(marks))
        if cut > (0 if marks in (". ", " ") else room // 3):
            return text[:cut]
    return text[:room]


def _about(found: type, name: str) -> str:
    """Return the first line of a plug-in's module, less its name where that opens it."""
    text = _doc(found).partition("\n")[0]
    opening, colon, rest = text.partition(": ")
    plain = "".join(filter(str.isalnum, opening.lower()))
    return rest if colon and plain == name.replace("_", "") else text


def _doc(found: type) -> str:
    return inspect.cleandoc(sys.modules[found.__module__].__doc__ or found.__doc__ or "")


def _fields(of: type[BaseModel]) -> Table:
    """Make a table of fields, their kinds and defaults."""
    rows: list[list[Any]] = []
    for name, field in of.model_fields.items():
        if name != "name":
            kind = field.annotation.__name__ if inspect.isclass(field.annotation) else str(field.annotation)
            default = (
                "required" if field.is_required() else protocols.written(field.get_default(call_default_factory=True))
            )
            rows.append([name, kind.replace("typing.", ""), default])
    return Table([Column("field"), Column("kind"), Column("default")], rows)


# ------------------------------------------------------------------ costs and examples


def layer_costs(at: Iterable[str]) -> Table:
    """Say what one layer of each mixer costs, at its defaults.

    Args:
        at: `width=N` and `seq_len=N`; each is 128 unless given.

    Raises:
        ConfigError: It is something else, or no positive integer.
    """
    sizes = {"width": 128, "seq_len": 128}
    for text in at:
        field, value = config.assignment(text, "--at")
        if field not in sizes:
            raise ConfigError(f"--at {text}: {field}: unknown{suggest(field, list(sizes))}")
        if type(value) is not int or value < 1:
            raise ConfigError(f"--at {text}: {field}={value!r} must be a whole number of at least 1")
        sizes[field] = value
    title = f"one mixer layer at width {sizes['width']}, length {sizes['seq_len']}"
    rows: list[list[Any]] = []
    for name in plugins.names(mad_efla.mixers):
        try:
            size = model.mixer_size(plugins.mixer(name).Config(name=name), **sizes)
        except ValueError as error:
            rows.append([name, str(error), *[None] * 4])
            continue
        held = None if size.state is None else 4 * (size.state + size.window)
        numbers = (size.parameters, size.state, size.window, held, size.flops)
        rows.append([name, *("unknown" if n is None else n for n in numbers)])
    headings = ("parameters", "state", "window", "state, bytes", "FLOPs per token")
    note = (
        "state and window: numbers carried from token to token, the window being the short "
        "convolution's; bytes of both in float32"
    )
    return Table([Column("name"), *(Column(h, "count") for h in headings)], rows, title=title, note=note)


def examples(task: str, assignments: Iterable[str], seed: int, count: int) -> Iterator[Block]:
    """Generate test examples of a task file with roles, targets and the solver's answers.

    Real inputs are rounded to hundredths; a task that has no solver has None for its answers.

    Args:
        task: Path or name of a task file; its baseline is taken.
        assignments: What `--set` was given, `FIELD=VALUE`.
        seed: Draws the examples.
        count: Sequences.

    Raises:
        ConfigError: The task file or an override is wrong.
    """
    document = config.read(config.find(task, "tasks")).without("vary")
    for text in assignments:
        field, value = config.assignment(text)
        document = config.merge(document, config.from_paths({field: value}, f"--set {text}"))
    built = build_task(document.part("task"))
    world = built.world(data.stream(seed, "world"))
    found = built.sample(count, data.stream(seed, "test", 0), "test", world)
    for inputs, targets in zip(found.inputs, found.targets, strict=True):
        real = isinstance(built, RealTask)
        yield (
            [round(x, 2) for x in inputs.tolist()] if real else inputs.tolist(),
            built.describe(inputs),
            targets.tolist(),
            None if real else built.solve(inputs, world).tolist(),
        )
