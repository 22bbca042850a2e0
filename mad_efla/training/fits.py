"""Whether the models of runs can be built, how large they are, and whether they match."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from mad_efla.config import ConfigError, Document
from mad_efla.plan.run import RunConfig
from mad_efla.training import model

MAX_RUNS = 100_000
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


def check_models(runs: Iterable[RunConfig], plan: Document) -> dict[str, tuple[int, int]]:
    """Build each distinct model once; return parameters and state size of every run."""
    built: dict[str, tuple[int, int]] = {}
    sizes = {}
    for count, run in enumerate(runs):
        if count >= MAX_RUNS:
            raise ConfigError(f"{plan.name}: more than {MAX_RUNS} runs; split the plan")
        task = run.task
        key = f"{run.model} {run.mixers} {task.backbone} {task.vocabulary} {task.input_length}"
        if key not in built:
            try:
                network = model.check(run)
            except ConfigError as error:
                raise ConfigError(f"{plan.place(('mixers',))}: {error}") from error
            state = model.state_size(network, run.task.input_length)
            built[key] = (model.parameter_count(network), state)
        sizes[run.fingerprint] = built[key]
    return sizes


def matches(
    kind: Literal["state", "parameters"] | None,
    runs: list[RunConfig],
    sizes: dict[str, tuple[int, int]],
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
                states = [
                    model.mixer_size(m, run.model.width, run.task.input_length).state
                    for m in run.mixers
                ]
                layers[key] = round(sum(states) / len(states))
            size, wanted = layers[key], STATE_PER_LAYER
        match = Match(run.mixer, kind, wanted, size)
        if abs(match.miss) >= abs(found.get(run.mixer, match).miss):
            found[run.mixer] = match
    return list(found.values())
