"""What there is to choose from: tasks, mixers and plans, and examples of a task."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel
from rich.table import Table

import mad_efla.mixers
import mad_efla.tasks
from mad_efla import config, plugins
from mad_efla.config import ConfigError, suggest
from mad_efla.plan.request import Plan
from mad_efla.plan.run import build_task
from mad_efla.tasks import RealTask
from mad_efla.training import data, model

Block = tuple[list[int] | list[float], list[str], list[int], list[int] | None]


def table(kind: str) -> Table:
    """Describe all tasks, mixers or plans, one row each."""
    found = Table("name", "what it is", "fields and defaults")
    if kind == "plans":
        for path in config.presets("sweeps"):
            plan = config.read(path).without("task", "data", "model", "optim", "train")
            parsed = config.validate(Plan, plan)
            mixers = ", ".join(str(m) for m in parsed.mixers)
            found.add_row(path.stem, parsed.about, f"protocol={parsed.protocol}, mixers: {mixers}")
        return found
    package = {"tasks": mad_efla.tasks, "mixers": mad_efla.mixers}[kind]
    for name in plugins.names(package):
        if kind == "tasks":
            fields, described = plugins.task(name), plugins.task(name)
        else:
            described = plugins.mixer(name)
            fields = described.Config
        found.add_row(name, _first_line(described), _fields(fields))
    return found


def costs(at: Iterable[str]) -> Table:
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
    found = Table("name", title=title, title_justify="left")
    for heading in ("parameters", "state", "window", "state, bytes", "FLOPs per token"):
        found.add_column(heading, justify="right")
    for name in plugins.names(mad_efla.mixers):
        try:
            size = model.mixer_size(plugins.mixer(name).Config(name=name), **sizes)
        except ValueError as error:
            found.add_row(name, str(error))
            continue
        held = None if size.state is None else 4 * (size.state + size.window)
        numbers = (size.parameters, size.state, size.window, held, size.flops)
        found.add_row(name, *("unknown" if n is None else f"{n:,}" for n in numbers))
    found.caption = (
        "state and window: numbers carried from token to token, the window being the short "
        "convolution's; bytes of both in float32"
    )
    return found


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


def _first_line(found: type) -> str:
    text = sys.modules[found.__module__].__doc__ or found.__doc__ or ""
    return text.strip().splitlines()[0] if text.strip() else ""


def _fields(model: type[BaseModel]) -> str:
    parts: list[str] = []
    for name, field in model.model_fields.items():
        if name != "name":
            value: Any = field.default
            parts.append(f"{name}={'-' if value is None else value}")
    return ", ".join(parts)
