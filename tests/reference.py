"""REFERENCE.md, from the code: commands, fields of tasks, mixers and plans, what MLflow is told.

    python -m tests.reference > REFERENCE.md

`reference.md` beside this file is the page's frame: what is written by hand, with a `{{name}}`
where a part comes from the code. Meanings of fields are those of the classes' docstrings, and a
field without one is refused. `test_docs.py` holds the page to this, byte for byte.
"""

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import mad_efla.mixers
import mad_efla.tasks
from mad_efla import config, plugins
from mad_efla.cli import cli
from mad_efla.plan import expand, grid, protocols, request, run
from mad_efla.runs.schema import Result, Scores, SweepRecord
from mad_efla.tracking import records
from tests.tiny import tiny

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_TYPES: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", Any: "any"}
_TYPES |= {list: "list", dict: "mapping", tuple: "list", type(None): "none"}

_SPLITS = {
    "test": "Of the test split.",
    "val": "Of the validation split, while training.",
    "val_chosen": "Of the validation split, under the weights that were scored.",
}
TRAIN = {
    "train/loss": "mean loss over the last steps, nats per token that is trained on",
    "train/learning_rate": "of the optimiser at this step",
    "train/tokens_per_second": "input tokens trained on, over wall time",
}
SPECTRUM = {
    "eigenvalue_mean": "share of the state that a token keeps along its key; mean over tokens",
    "eigenvalue_min": "the least of them",
    "eigenvalue_max": "the largest of them",
    "angle_mean": "angle by which a token turns the state, radians; of mixers with complex eigenvalues",
    "angle_max": "the largest of them",
    "saturated": "share of tokens with x > 4: they erase over 98 % along their key",
    "beyond_euler": "share of tokens with x > 2, where an Euler step would grow",
    "horizon_p50": "tokens after which half of the heads have forgotten; at most half the sequence",
    "horizon_beyond": "share of heads that remember longer than that",
    "state_effective_rank": "directions of the state in use at the end of a sequence",
    "state_capacity_used": "the same as a share of what the state could hold, in [0, 1]",
    "reach_distance": "how far back attention looks, tokens",
    "effective_remembrance_p50": "how far the last answer depends on the first half of the sequence, in [0, 1]",
    "reach_entropy": "how widely it looks: entropy of its weights, nats",
}
TAGS = {
    "mad.role": "`cell` for a run, `sweep` for the parent run above its runs",
    "mad.fingerprint": "the run's name, as in `mad-efla status`",
    "mad.protocol": "the rules its score is taken by; scores of different ones are not comparable",
    "mad.mixer": "the mixer's label",
    "mad.task": "the task's name, which is the experiment's, too",
    "mad.setting": "the setting's label",
    "mad.seed": "the seed",
    "mad.task_version": "version of the task's generator",
    "mad.numbers": "raised when a change to the code alters results",
    "mad.data_digest": "hash of the generated data",
    "mad.stopped": "why the run ended before its budget, if it did",
    "mad.chosen_step": "the step whose weights were scored",
    "mad.env.NAME": "backends, device, threads, library versions, git commit",
    "mad.sweep": "the sweep's name",
    "mad.plan": "the plan's name",
    "mad.command": "what was typed",
    "mad.model": "name and version of the model, where `--log-model` logged one",
    "mad.owner": "the word of the folder of runs that it was made in: a run belongs to whoever made it",
    "mad.host": "the machine that told MLflow",
    "mad.state_size": "`unknown` where a layer does not say what it carries",
    "mad.artifacts": "`missing` while files are still to come, else `complete`",
    "mlflow.user": "who made the run",
    "mlflow.source.type": "always `LOCAL`",
    "mlflow.source.name": "always `mad-efla`",
    "mlflow.source.git.commit": "the commit the run was made at",
    "mlflow.note.content": "why the run failed or diverged; of a sweep, its counts, its verdict and its table",
}


def page() -> str:
    """Write the whole page."""
    parts = {"commands": commands, "tasks": tasks, "mixers": mixers, "plans": plans, "mlflow": mlflow}
    frame = Path(__file__).with_name("reference.md").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]](), frame)


# ------------------------------------------------------------------ commands


def commands() -> str:
    """Write every command with its arguments, its help and its options."""
    return "\n\n".join(_command(words, command) for words, command in leaves(cli, ["mad-efla"]))


def leaves(command: click.Command, words: list[str]) -> Iterable[tuple[list[str], click.Command]]:
    """Yield the commands below one, with the words that call them."""
    if not isinstance(command, click.Group):
        yield words, command
        return
    for name, child in command.commands.items():
        yield from leaves(child, [*words, name])


def _command(words: list[str], command: click.Command) -> str:
    context = click.Context(command)
    arguments = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
    rows = []
    for option in command.params:
        record = option.get_help_record(context)
        if record and isinstance(option, click.Option):
            assert option.help, f"{' '.join(words)} {option.opts[0]} has no help"
            rows.append([f"`{record[0]}`", record[1]])
    text = re.sub(r"^\x08\n((?:.+\n?)+)", r"```\n\1\n```", inspect.cleandoc(command.help or ""), flags=re.M)
    return "\n\n".join(
        [f"### `{' '.join([*words, *arguments])}`", text, *([_table("option", "what it does", rows)] if rows else [])]
    )


# ------------------------------------------------------------------ fields


def tasks() -> str:
    """Write every task with its fields and how many settings its file has."""
    parts = []
    for name in plugins.names(mad_efla.tasks):
        found = plugins.task(name)
        count = len(expand.settings(name))
        parts.append(f"### `{name}`\n\n{_first_line(found)} {count} settings in `tasks/{name}.yaml`.")
        parts.append(fields(found))
    return "\n\n".join(parts)


def mixers() -> str:
    """Write every mixer with its fields."""
    parts = []
    for name in plugins.names(mad_efla.mixers):
        found = plugins.mixer(name)
        parts += [f"### `{name}`\n\n{_first_line(found)}", fields(found.Config)]
    return "\n\n".join(filter(None, parts))


def plans() -> str:
    """Write the shipped plans, the keys of a plan, and what each protocol fixes."""
    shipped = []
    for path in config.presets("sweeps"):
        plan = config.validate(request.Plan, config.read(path).without("task", "data", "model", "optim", "train"))
        shipped.append([f"`{path.stem}`", f"`{plan.protocol}`", plan.about])
    parts = [_table("plan", "protocol", shipped, "what it is")]
    for title, found in (
        ("Keys of a plan", request.Plan),
        ("`choose:`", request.Choice),
        ("`sample:`", grid.Sample),
        ("`search:`", grid.Search),
        ("A range in `over:`", grid.Range),
        ("`limits:`", run.Limits),
        ("`data:`", run.DataConfig),
        ("`model:`", run.ModelConfig),
        ("`optim:`", run.OptimConfig),
        ("`train:`", run.TrainConfig),
    ):
        parts += [f"### {title}", fields(found)]
    parts.append(
        "### What a protocol fixes\n\nEverything that moves a number, by the shipped plan of its name; a run that departs "
        "from it is `custom`. The fields of a task are those of its file and of the plan's settings."
    )
    for name in ("mad", "mad-lab", "mad-mini", "quick"):
        definitions = [d for t in catalogue_names() if (d := protocols.definition(name, t))]
        held = {f: {protocols.written(r.get(f)) for d in definitions for r in d.runs} for f in _fixed(definitions)}
        rows = [[f"`{field}`", ", ".join(f"`{v}`" for v in sorted(values))] for field, values in sorted(held.items())]
        parts += [f"`{name}`:", _table("field", "values", rows)]
    free = [[name, text] for name, text in protocols.FREE.items()]
    parts += ["Every protocol leaves free:", _table("field", "what is free", free), protocols.NOT_IN_RUNS]
    return "\n\n".join(parts)


def catalogue_names() -> list[str]:
    """Return the names of all tasks that have a file."""
    return sorted({str(config.read(path).part("task").data["name"]) for path in config.presets("tasks")})


def _fixed(definitions: list[protocols.Definition]) -> list[str]:
    return list({f for d in definitions for run in d.runs for f in run if not f.startswith("task")})


def fields(found: type[BaseModel]) -> str:
    """Write the fields of a class: meaning, default, range.

    Raises:
        KeyError: A field has no meaning in the docstrings of its class and those above it.
    """
    meanings = _meanings(found)
    rows, fixed = [], []
    for name, field in found.model_fields.items():
        choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()
        if name == "name":
            continue
        if len(choices) == 1:
            fixed.append(f"`{name}: {config.canonical_json(choices[0])}`".replace('"', ""))
            continue
        rows.append([f"`{name}`", meanings[name], _default(field), _range(field)])
    parts = [_table("field", "meaning", rows, "default", "range")] if rows else []
    return "\n\n".join([*parts, *([f"Fixed: {', '.join(fixed)}."] if fixed else [])])


def _meanings(found: type) -> dict[str, str]:
    """Read the `Attributes` of a class and of those above it, the nearest first."""
    meanings: dict[str, str] = {}
    for cls in found.__mro__:
        text = inspect.cleandoc(cls.__doc__ or "") if "__doc__" in vars(cls) else ""
        block = re.search(r"^Attributes:\n((?:(?:    .*)?\n?)+)", text, re.M)
        for name, meaning in re.findall(r"^    (\w+): ((?:.|\n(?=     ))+)", block[1] if block else "", re.M):
            meanings.setdefault(name, " ".join(meaning.split()))
    return meanings


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value in ({}, [], "") or isinstance(value, BaseModel) else _code(value)


def _code(value: Any) -> str:
    if value is None:
        return "none"
    return "`" + config.canonical_json(value).replace('"', "").replace(",", ", ").replace(":", ": ") + "`"


def _range(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {_number(getattr(m, key))}" for m in field.metadata for key, sign in _BOUNDS.items() if hasattr(m, key)
    ]
    bounds += [f"matching `{m.pattern}`" for m in field.metadata if hasattr(m, "pattern")]
    shown = _type(field.annotation)
    words, none, _ = shown.partition(", or none")
    return " ".join(filter(None, [words, ", ".join(bounds)])) + none


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(_code(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_type(part) for part in inner)
    if origin is not None:
        return _TYPES[origin]
    return _TYPES.get(annotation, "see below")


# ------------------------------------------------------------------ MLflow


def mlflow() -> str:
    """Write the metrics, tags and parameters of runs in MLflow."""
    scores, result = _meanings(Scores), _meanings(Result)
    rows = [
        [f"`{split}/{name}`", f"{scores[name]} {what}"] for split, what in _SPLITS.items() for name in records._SCORES
    ]
    rows += [[f"`total/{name}`", result[name]] for name in records._NUMBERS]
    rows.append(["`total/diverged`", "1 where the loss stopped being finite, else 0"])
    rows += [[f"`{name}`", meaning] for name, meaning in TRAIN.items()]
    rows += [[f"`spectrum/{name}`", meaning] for name, meaning in SPECTRUM.items()]
    rows += [
        ["`test_under/NAME`", "accuracy on the test split under a corruption; the step is 100 times the severity"],
        ["`test_area/NAME`", "the mean of that curve over its severities"],
        ["`test_half/NAME`", "the severity at which accuracy has halved"],
    ]
    rows.append([", ".join(f"`sweep/{name}`" for name in records.MLFLOW_STATUS), "how many runs of a sweep are"])
    example = tiny()
    named = {re.sub(r"mad\.env\..*", "mad.env.NAME", tag): None for tag in _tags(example)}
    tags = [[f"`{tag}`", TAGS[tag]] for tag in (*named, "mad.artifacts", "mad.model", "mlflow.note.content")]
    parameters = ", ".join(f"`{name}`" for name in records.parameters(example))
    return "\n\n".join(
        [
            "### Metrics\n\n`train/`, `val/` and `spectrum/` are curves over steps; `spectrum/` holds means over layers.",
            _table("metric", "meaning", rows),
            "### Tags",
            _table("tag", "meaning", tags),
            "### Parameters",
            "Every field of a run, under the names of the sections above; those of the mixer are `token_mixer.FIELD`, "
            f"or `token_mixer.N.FIELD` in a hybrid. Of `recall` and `efla`: {parameters}.",
        ]
    )


def _tags(example: run.RunConfig) -> list[str]:
    ended = Result.model_construct(
        environment={"git_commit": "0" * 40},
        data_digest="",
        stopped="",
        chosen_step=0,
        status="finished",
        state_size=None,
    )
    record = SweepRecord.model_construct(id="", protocol="", task="", plan="", command="")
    return [*records.cell_tags(example, ""), *records.result_tags(ended), *records.sweep_tags(record, "")]


def _first_line(found: type) -> str:
    text = (sys.modules[found.__module__].__doc__ or "").strip().splitlines()[0]
    return text if text.endswith(".") else f"{text}."


def _table(first: str, second: str, rows: list[list[str]], *more: str) -> str:
    lines = [[first, second, *more], ["---"] * (2 + len(more)), *rows]
    return "\n".join("| " + " | ".join(word.replace("|", r"\|") for word in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(page())
