"""What there is to choose from: tasks, mixers and plans, and examples of a task."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel
from rich.table import Table

import mad_efla.mixers
import mad_efla.tasks
from mad_efla import config, data, plugins
from mad_efla.run import build_task
from mad_efla.sweep import Plan

Block = tuple[list[int], list[str], list[int], list[int]]


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


def examples(task: str, assignments: Iterable[str], seed: int, count: int) -> Iterator[Block]:
    """Generate test examples of a task file with roles, targets and the solver's answers.

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
        yield (
            inputs.tolist(),
            built.describe(inputs),
            targets.tolist(),
            built.solve(inputs, world).tolist(),
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
