"""Whether the models of runs can be built, how large they are, and whether they match."""

from typing import Literal, NamedTuple

from mad_efla.config import ConfigError
from mad_efla.plan.expand import Sweep
from mad_efla.plan.run import RunConfig
from mad_efla.training import data, model

STATE_PER_LAYER = 2_048  # numbers: 8 heads of 16 x 16 at width 128


class Match(NamedTuple):
    """How far a mixer is from the terms that a plan asks for.

    Attributes:
        mixer: The mixer's label.
        kind: `state` or `parameters`.
        wanted: Numbers asked for.
        found: Numbers it has; of several settings, those farthest off.
    """

    mixer: str
    kind: str
    wanted: int
    found: int

    @property
    def miss(self) -> float:
        """What it has too much, as a share of what is asked for; negative for too little."""
        return self.found / self.wanted - 1


class Fit(NamedTuple):
    """What is known of a sweep once every distinct model of it was built.

    Attributes:
        sizes: Parameters and state size of each run's model, by fingerprint.
        matches: Per mixer, how far it is from the equal terms of the plan; empty if it has none.
    """

    sizes: dict[str, tuple[int, int]]
    matches: list[Match]


def check(sweep: Sweep) -> Fit:
    """Build each distinct model of a sweep once, and look for the data of its real tasks.

    Raises:
        ConfigError: A model cannot be built, with the plan's place; or examples are missing.
    """
    built: dict[str, tuple[int, int]] = {}
    asked: set[str] = set()
    sizes = {}
    for run in (*sweep.runs, *sweep.ends):
        task = run.task
        if (wanted := f"{task} {run.data}") not in asked:
            data.check(task, run.data)
            asked.add(wanted)
        key = f"{run.model} {run.mixers} {task.backbone} {task.vocabulary} {task.input_length}"
        if key not in built:
            try:
                network = model.check(run)
            except ConfigError as error:
                raise ConfigError(f"{sweep.place}: {error}") from error
            state = model.state_size(network, run.task.input_length)
            built[key] = (model.parameter_count(network), state)
        sizes[run.fingerprint] = built[key]
    return Fit(sizes, _matches(sweep.match, sweep.runs, sizes))


def _matches(
    kind: Literal["state", "parameters"] | None, runs: list[RunConfig], sizes: dict[str, tuple[int, int]]
) -> list[Match]:
    """Say how far each mixer is from the equal terms that a plan asks for; see `Plan.match`."""
    if kind is None:
        return []
    found: dict[str, Match] = {}
    first: dict[str, int] = {}  # parameters of the first mixer, by setting
    layers: dict[str, int] = {}
    for run in runs:
        if kind == "parameters":
            size = sizes[run.fingerprint][0]
            wanted = first.setdefault(run.setting, size)
        else:
            key = f"{run.mixers} {run.model.width} {run.task.input_length}"
            if key not in layers:
                states = [model.mixer_size(m, run.model.width, run.task.input_length).state for m in run.mixers]
                layers[key] = round(sum(states) / len(states))
            size, wanted = layers[key], STATE_PER_LAYER
        match = Match(run.mixer, kind, wanted, size)
        if abs(match.miss) >= abs(found.get(run.mixer, match).miss):
            found[run.mixer] = match
    return list(found.values())
