"""Whether the models of runs can be built and trained, how large they are, and whether they match."""

from typing import Literal, NamedTuple

import torch

from mad_efla import plugins
from mad_efla.config import ConfigError
from mad_efla.plan.expand import Sweep
from mad_efla.plan.run import RunConfig, channel_fields, mixer_label
from mad_efla.tasks import RealTask, Task
from mad_efla.training import data, model, promises

STATE_PER_LAYER = 2_048  # numbers: 8 heads of 16 x 16 at width 128


class Match(NamedTuple):
    """How far a mixer is from the terms that a plan asks for.

    Attributes:
        mixer: The mixer's label.
        kind: `state` or `parameters`.
        wanted: Numbers asked for.
        found: Numbers it has; of several settings, those farthest off; None where it is unknown.
    """

    mixer: str
    kind: str
    wanted: int
    found: int | None

    @property
    def miss(self) -> float | None:
        """What it has too much, as a share of what is asked for; negative for too little."""
        return None if self.found is None else self.found / self.wanted - 1


class Fit(NamedTuple):
    """What is known of a sweep once every distinct model of it was built.

    Attributes:
        sizes: Parameters and state size of each run's model, by fingerprint; a state may be unknown.
        matches: Per mixer, how far it is from the equal terms of the plan; empty if it has none.
    """

    sizes: dict[str, tuple[int, int | None]]
    matches: list[Match]


def check(sweep: Sweep, device: str = "cpu") -> Fit:
    """Build each distinct model of a sweep once, and look for the data of its real tasks.

    What is not ours is held to its promises, as `mad-efla check` does: a layer to `LAYER_PROMISES` at
    the width, the length and the precision it will be trained at, a task to `EXAMPLE_PROMISES`.

    Args:
        sweep: What is to be made.
        device: Where: `cpu` or `cuda`.

    Raises:
        ConfigError: A model cannot be built, or its layer not be trained, with the plan's place; or
            examples are missing.
    """
    built: dict[str, tuple[int, int | None]] = {}
    asked: set[str] = set()
    sizes = {}
    for run in (*sweep.runs, *sweep.ends):
        task = run.task
        if (wanted := f"{task} {run.data}") not in asked:
            data.check(task, run.data)
            _hold_task(task)
            asked.add(wanted)
        key = f"{run.model} {run.mixers} {task.backbone} {task.vocabulary} {task.input_length}"
        if key not in built:
            try:
                network = model.check(run)
            except ConfigError as error:
                raise ConfigError(f"{sweep.place}: {error}") from error
            for subject in _layers(run, device):
                if (wanted := repr(subject)) not in asked:
                    _hold_layer(subject, sweep.place)
                    asked.add(wanted)
            state = model.state_size(network, run.task.input_length)
            built[key] = (model.parameter_count(network), state)
        sizes[run.fingerprint] = built[key]
    return Fit(sizes, _matches(sweep.match, sweep.runs, sizes))


def _layers(run: RunConfig, device: str) -> list[promises.MixerUnderTest]:
    """Return the layers of a run that are not ours, as it will train them."""
    half, channel = run.train.precision == "bfloat16", channel_fields(run.model)
    return [
        promises.MixerUnderTest(
            plugins.mixer(m.name), m, run.model.width, run.task.input_length, run.model.depth, device, half
        )
        for m in (*run.mixers, channel)
        if m is not None and ":" in m.name
    ]


def _hold_layer(subject: promises.MixerUnderTest, place: str) -> None:
    """Refuse a layer at the first promise that it breaks.

    Raises:
        ConfigError: It does; with the cure.
    """
    elsewhere = subject.device == "cuda" and not torch.cuda.is_available()
    for promise in () if elsewhere else promises.LAYER_PROMISES:
        if broken := promises.hold(promise, subject).broken:
            label = mixer_label(subject.config)
            raise ConfigError(f"{place}: layer {label}: {broken}; `mad-efla check {subject.config.name}` says more")


def _hold_task(task: Task) -> None:
    """Refuse a task of the user's own at the first promise that its examples break.

    Raises:
        ConfigError: They do.
    """
    if ":" not in task.name or isinstance(task, RealTask):
        return
    for promise in promises.EXAMPLE_PROMISES:
        if broken := promises.hold(promise, task).broken:
            raise ConfigError(f"task {task.name}: {broken}; `mad-efla check {task.name}` says more")


def _matches(
    kind: Literal["state", "parameters"] | None, runs: list[RunConfig], sizes: dict[str, tuple[int, int | None]]
) -> list[Match]:
    """Say how far each mixer is from the equal terms that a plan asks for; see `Plan.match`."""
    if kind is None:
        return []
    found: dict[str, Match] = {}
    first: dict[str, int] = {}  # parameters of the first mixer, by setting
    layers: dict[str, int | None] = {}
    for run in runs:
        if kind == "parameters":
            size: int | None = sizes[run.fingerprint][0]
            wanted = first.setdefault(run.setting, size)
        else:
            key = f"{run.mixers} {run.model.width} {run.task.input_length}"
            if key not in layers:
                states = [model.mixer_size(m, run.model.width, run.task.input_length).state for m in run.mixers]
                known = [state for state in states if state is not None]
                layers[key] = round(sum(known) / len(known)) if len(known) == len(states) else None
            size, wanted = layers[key], STATE_PER_LAYER
        match = Match(run.mixer, kind, wanted, size)
        before = found.get(run.mixer, match)
        if match.miss is None or (before.miss is not None and abs(match.miss) >= abs(before.miss)):
            found[run.mixer] = match
    return list(found.values())
