"""A run is one value: a frozen `RunConfig` in which every default that applied is written down.

Its fingerprint, a hash of its canonical JSON, is its name everywhere: folder, MLflow tag, resume
key. Where it runs (device, threads, folder) is no part of it; everything that moves a number is.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from mad_efla import plugins
from mad_efla.config import ConfigError, Document, Section, canonical_json, digest, dotted, suggest, validate
from mad_efla.mixers import MixerConfig
from mad_efla.tasks import Task

NUMBERS = 2
"""Increment this when a code change alters the results of an unchanged configuration."""

Protocol = Literal["mad", "mad-lab", "mad-mini", "quick", "custom", "unmatched", "exploring"]


CHANNELS = ("swiglu", "mlp", "none")


class DataConfig(Section):
    """How many examples of each split.

    Attributes:
        train_examples: Examples trained on, drawn once.
        validation_examples: Examples that choose weights, learning rates and stops.
        test_examples: Examples the score is taken on.
    """

    train_examples: int = Field(default=12_800, ge=1)
    validation_examples: int = Field(default=1_280, ge=1)
    test_examples: int = Field(default=1_280, ge=1)


class ModelConfig(Section):
    """The stack around the mixers.

    Attributes:
        width: Model width D.
        depth: Pairs of [mixer, channel mixer].
        channel: The channel mixer after each mixer: `swiglu`, `mlp`, `none`, or any module as
            `package.module:Name`; a mapping with `name` gives it fields.
        norm_eps: Epsilon of RMSNorm.
        blocks: The layers are whole blocks, with norms, residual and channel mixer of their own:
            x = block(x) in place of x + mixer(norm(x)).
    """

    width: int = Field(128, ge=1)
    depth: int = Field(2, ge=1)
    channel: str | dict[str, Any] = "swiglu"
    norm_eps: float = Field(1e-5, gt=0)
    blocks: bool = False

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        name = self.channel if isinstance(self.channel, str) else self.channel.get("name", "")
        if name not in CHANNELS and ":" not in str(name):
            near = suggest(str(name), list(CHANNELS))
            raise ValueError(f"channel={self.channel!r} must be a channel mixer or package.module:Name{near}")
        if self.blocks and self.channel != "none":
            raise ValueError(f"blocks=True with channel={self.channel!r}: a block has its own; set channel to none")
        return self


class OptimConfig(Section):
    """AdamW and its schedule.

    Attributes:
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        decay: On what: `matrices` leaves norms, biases and gates alone; `all` is the reference's
            one group.
        betas: Of Adam.
        schedule: `cosine` falls from lr to min_lr over the whole budget; `constant` stays.
        min_lr: Where the cosine ends.
        warmup_steps: Steps of linear rise to lr before the schedule.
        grad_clip: Largest global gradient norm; none by default.
    """

    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    decay: Literal["matrices", "all"] = "matrices"
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(0, ge=0)
    grad_clip: float | None = Field(None, gt=0)


class TrainConfig(Section):
    """The budget, and what is looked at on the way.

    Attributes:
        batch_size: Sequences per step.
        epochs: Passes over the training set. Give this or `steps`.
        steps: Optimiser steps.
        loss: `answers`: cross-entropy on scored positions; `sequence`: on what the task trains on
            as published (the plain next token, for the recall tasks).
        precision: `bfloat16` autocast or `float32`. `auto` never reaches a run: it is resolved,
            before the fingerprint, by what the device has instructions for.
        eval_every: Steps between evaluations; none means once per epoch.
        select_split: Which split chooses the weights that are scored (`test` only to reproduce
            published protocols); `none` takes the last.
        select_metric: By highest token accuracy (ties: lower loss) or lowest loss.
        stop_at: End early when accuracy on `select_split` reaches this.
        stop_metric: Which accuracy that is: by token, or averaged over classes.
    """

    batch_size: int = Field(128, ge=1)
    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    loss: Literal["answers", "sequence"] = "answers"
    precision: Literal["bfloat16", "float32"] = "float32"
    eval_every: int | None = Field(None, ge=1)
    select_split: Literal["validation", "test", "none"] = "validation"
    select_metric: Literal["token_accuracy", "loss"] = "token_accuracy"
    stop_at: float | None = Field(None, gt=0, le=1)
    stop_metric: Literal["token_accuracy", "macro_accuracy"] = "token_accuracy"

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"steps={self.steps} and train.epochs={self.epochs}: give exactly one of them")
        if self.stop_at is not None and self.select_split == "none":
            raise ValueError(f"stop_at={self.stop_at} needs a split to look at; set train.select_split")
        return self


class Limits(Section):
    """How long and how large a run may grow; no part of a run, because no number depends on it.

    Attributes:
        minutes: Wall time of an attempt.
        memory_gib: Resident memory of the process that makes it, libraries included.
    """

    minutes: float | None = Field(default=None, gt=0)
    memory_gib: float | None = Field(default=None, gt=0)


# Fields that runs of earlier versions do not have; at these values they are left out of the name.
_LATER: dict[tuple[str, str], Any] = {
    ("", "code"): {},
    ("optim", "decay"): "matrices",
    ("train", "stop_metric"): "token_accuracy",
    ("model", "blocks"): False,
}
_LATER_OF_MIXERS: dict[str, Any] = {"householders": 1, "reflect": False}


class RunConfig(Section):
    """One training run, complete.

    Attributes:
        numbers: Which numbers the code gives, see `NUMBERS`.
        protocol: The rules its score is taken by.
        task: What is learned.
        task_version: Of the task's generator.
        setting: The setting's label; no part of the fingerprint.
        data: Examples of each split.
        model: The stack around the mixers.
        mixers: One per pair of layers.
        optim: The optimiser and its schedule.
        train: The budget, and what is looked at on the way.
        seed: Of everything that is drawn.
        code: Digest of the source of each task and mixer that is the user's own, by name.
    """

    numbers: int = NUMBERS
    protocol: Protocol
    task: SerializeAsAny[Task]
    task_version: int
    setting: str
    data: DataConfig
    model: ModelConfig
    mixers: tuple[SerializeAsAny[MixerConfig], ...]
    optim: OptimConfig
    train: TrainConfig
    seed: int = Field(ge=0, lt=2**32)
    code: dict[str, str] = Field(default_factory=dict)

    @cached_property
    def canonical(self) -> str:
        """The JSON text whose hash is the fingerprint."""
        values = self.model_dump()
        del values["setting"]
        for (section, field), default in _LATER.items():
            held = values[section] if section else values
            if held[field] == default:
                del held[field]
        values["mixers"] = [
            {k: v for k, v in m.items() if k not in _LATER_OF_MIXERS or v != _LATER_OF_MIXERS[k]}
            for m in values["mixers"]
        ]
        return canonical_json(values)

    def __hash__(self) -> int:
        """Hash by name, which equal runs share."""
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits: the run's name."""
        return digest(self.canonical)

    @cached_property
    def condition(self) -> str:
        """Digest of what makes runs alike: protocol, task, data, model and budget as they are."""
        parts = [getattr(self, s).model_dump() for s in ("task", "data", "model", "train")]
        task = self.code.get(self.task.name, "")
        return digest(canonical_json([self.numbers, self.protocol, self.task_version, task, *parts]))

    @property
    def mixer_code(self) -> str:
        """Digest of the source of mixers that are the user's own; empty if none is."""
        own = [self.code[m.name] for m in self.mixers if m.name in self.code]
        return digest(canonical_json(own)) if own else ""

    @cached_property
    def point(self) -> str:
        """Digest of the grid point: the optimiser's fields, which a score chooses among."""
        return digest(canonical_json(self.optim.model_dump()))

    @property
    def mixer(self) -> str:
        """How the mixers are shown: `efla`, `efla(heads=4)`, `attention+efla`."""
        labels = [mixer_label(m) for m in self.mixers]
        n = len(labels)
        period = next(p for p in range(1, n + 1) if n % p == 0 and labels == labels[:p] * (n // p))
        return "+".join(labels[:period])

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass; the last batch may be smaller."""
        return -(-self.data.train_examples // self.train.batch_size)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole budget."""
        return self.train.steps or self.steps_per_epoch * (self.train.epochs or 0)

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self.train.eval_every or self.steps_per_epoch

    @property
    def tokens(self) -> int:
        """Input tokens the whole budget trains on."""
        return self.steps * self.train.batch_size * self.task.input_length


def mixer_label(config: MixerConfig) -> str:
    """Name a mixer and the fields in which it departs from its defaults."""
    fields = type(config).model_fields
    changed = [
        f"{key}={value}"
        for key, value in config.model_dump().items()
        if key != "name" and (key not in fields or value != fields[key].default)
    ]
    return config.name + (f"({', '.join(changed)})" if changed else "")


def build(document: Document) -> RunConfig:
    """Build a run from a document that holds every section it does not take from defaults.

    Raises:
        ConfigError: With the place, the rule and the cure, for whatever is wrong.
    """
    known = [*RunConfig.model_fields]
    for key in document.data:
        if key not in known:
            raise ConfigError(f"{document.place((key,))}: {key}: unknown key{suggest(key, known)}")
    task = build_task(document.part("task"))
    model = _with_channel(validate(ModelConfig, document.part("model"), "model"), document)
    parts = {
        "task": task,
        "task_version": type(task).version,
        "data": validate(DataConfig, document.part("data"), "data"),
        "model": model,
        "mixers": _mixers(document, model.depth),
        "optim": validate(OptimConfig, document.part("optim"), "optim"),
        "train": validate(TrainConfig, document.part("train"), "train"),
    }
    rest = {k: document.data[k] for k in ("protocol", "setting", "seed") if k in document.data}
    parts["code"] = document.data.get("code", None)
    if parts["code"] is None:
        parts["code"] = code_of(task, parts["mixers"], model)
    top = validate(_Top, Document(rest, document.places, document.name))
    return RunConfig(**parts, **top.model_dump())


def settle(document: Document, label: str, protocol: str, precision: str) -> Document:
    """Name a run's setting and protocol, and settle what `train.precision: auto` means.

    Args:
        document: What the run is built from.
        label: The setting's label.
        protocol: The rules its score is taken by.
        precision: What `auto` means here.
    """
    data = document.data | {"setting": label, "protocol": protocol}
    train = document.part("train").data
    if train.get("precision") == "auto":
        data["train"] = train | {"precision": precision}
    return Document(data, document.places, document.name)


class _Top(Section):
    protocol: Protocol = "custom"
    setting: str = "baseline"
    seed: int = Field(0, ge=0, lt=2**32)


def code_of(task: Task, mixers: Iterable[MixerConfig], model: ModelConfig | None = None) -> dict[str, str]:
    """Return the digest of the source of each plug-in among a task, mixers and channel mixer, as it is now.

    Raises:
        ConfigError: The source of one is not to be had.
    """
    channel = [model.channel["name"]] if model and isinstance(model.channel, dict) else []
    names = [n for n in (task.name, *(m.name for m in mixers), *channel) if ":" in n]
    return {name: plugins.source_digest(name) for name in sorted(set(names))}


def check_code(run: RunConfig) -> None:
    """Refuse to make, to go on with, or to look into a run by other code than it is named after.

    Raises:
        ConfigError: The source of its task or of a mixer is another one by now.
    """
    for name, found in code_of(run.task, run.mixers, run.model).items():
        if run.code.get(name) != found:
            raise ConfigError(
                f"run {run.fingerprint}: the code of {name} is {found} by now, and the run is one of "
                f"{run.code.get(name, 'an earlier version')}; its sweep makes a new run of it, or "
                "put the code back"
            )


def build_task(document: Document) -> Task:
    """Build a task from its section.

    Raises:
        ConfigError: With the place, the rule and the cure.
    """
    return validate(task_class(document), document, "task")


def task_class(document: Document) -> type[Task]:
    """Return the class that a task's section names.

    Raises:
        ConfigError: With the place, where there is none.
    """
    name = document.data.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{document.place(())}: task.name={name!r} must be the name of a task")
    try:
        return plugins.task(name)
    except ConfigError as error:
        raise ConfigError(f"{document.place(('name',))}: {error}") from error


def channel_fields(model: ModelConfig) -> MixerConfig | None:
    """Return the fields of a channel mixer that is not ours; None for ours.

    Raises:
        ConfigError: There is none of that name, or its fields are wrong.
    """
    if isinstance(model.channel, str):
        return None
    return plugins.mixer(model.channel["name"]).Config(**model.channel)


def _with_channel(model: ModelConfig, document: Document) -> ModelConfig:
    """Write down all fields of a channel mixer that is not ours."""
    if model.channel in CHANNELS:
        return model
    own = {"name": model.channel} if isinstance(model.channel, str) else model.channel
    place = document.place(("model", "channel"))
    try:
        found = plugins.mixer(own["name"])
    except ConfigError as error:
        raise ConfigError(f"{place}: model.channel: {error}") from error
    fields = validate(found.Config, Document(own, {(): place}, document.name), "model.channel")
    return model.model_copy(update={"channel": fields.model_dump()})


def _mixers(document: Document, depth: int) -> tuple[MixerConfig, ...]:
    entries = document.data.get("mixers")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{document.place(('mixers',))}: mixers={entries!r} must name a mixer")
    if depth % len(entries):
        raise ConfigError(
            f"{document.place(('mixers',))}: a pattern of {len(entries)} mixers does not fill "
            f"model.depth={depth}; use a depth that is a multiple of {len(entries)}"
        )
    configs = [_mixer(document, i, entry) for i, entry in enumerate(entries)]
    return tuple(configs) * (depth // len(entries))


def _mixer(document: Document, index: int, entry: Any) -> MixerConfig:
    path = ("mixers", index)
    fields = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
        raise ConfigError(
            f"{document.place(path)}: {dotted(path)}={entry!r} must be a mixer's name, or a "
            "mapping with `name` and its fields"
        )
    try:
        found = plugins.mixer(fields["name"])
    except ConfigError as error:
        raise ConfigError(f"{document.place(path)}: {error}") from error
    places = {p[2:]: place for p, place in document.places.items() if p[:2] == path}
    nested = Document(fields, {(): document.place(path)} | places, document.name)
    return validate(found.Config, nested, dotted(path))
