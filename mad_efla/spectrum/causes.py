"""Why a trained model fails on corrupted inputs: what its layers do there, and which part did it.

`levels` diagnoses a run at each severity of a corruption. `blame` takes a layer of the delta family
apart: its recurrence runs on six things that it computes from its input,

    query             q / |q|, what is read
    key               k / |k|, the direction that is erased and written
    erase, write      how much of it: in DeltaNet both are beta
    value size        |v|
    value direction   v / |v|, what is written

and each can be computed from the clean sequence while the rest comes from the corrupted one, or
the other way round. A part is to blame as far as it alone, corrupted, lowers the accuracy, and it
alone, set back, restores it. If parts matter only jointly, neither number shows it;
test them as a group.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mad_efla import spectrum
from mad_efla.analysis.cells import cells
from mad_efla.analysis.corruption import Arm, arms
from mad_efla.analysis.statistics import Interval, interval
from mad_efla.config import ConfigError, suggest
from mad_efla.mixers.delta import Delta, Parts
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import load as load_runs
from mad_efla.tasks import IGNORE, Examples
from mad_efla.training import data, model
from mad_efla.training.model import Backbone

_Part = Callable[[Parts, Parts], Parts]


def _size(own: Parts, other: Parts) -> Parts:
    return own._replace(v=_unit(own.v) * other.v.norm(dim=-1, keepdim=True))


def _direction(own: Parts, other: Parts) -> Parts:
    return own._replace(v=_unit(other.v) * own.v.norm(dim=-1, keepdim=True))


def _unit(v: Tensor) -> Tensor:
    return torch.nn.functional.normalize(v, dim=-1, eps=1e-30)


PARTS: dict[str, _Part] = {
    "query": lambda own, other: own._replace(q=other.q),
    "key": lambda own, other: own._replace(key=other.key),
    "erase": lambda own, other: own._replace(erase=other.erase),
    "write": lambda own, other: own._replace(write=other.write),
    "value size": _size,
    "value direction": _direction,
}
"""What a layer's parts become when one is taken from another input."""


class Level(NamedTuple):
    """A run at one severity; `scalars` are those of `spectrum.Diagnosis`, without their prefix."""

    severity: float
    accuracy: float
    scalars: dict[str, float]


class Blame(NamedTuple):
    """What parts of the layers have to do with a loss of accuracy.

    Attributes:
        parts: Their names.
        alone: Accuracy where only they are computed from the corrupted input.
        mended: Accuracy where only they are computed from the clean one.
    """

    parts: tuple[str, ...]
    alone: float
    mended: float


class Account(NamedTuple):
    """What became of a mixer under one corruption, over its seeds.

    Attributes:
        mixer: Its label.
        corruption: By its name.
        severity: At which the blame is laid.
        severities: All of them, rising.
        scalars: By name, the mean over seeds at each severity; `accuracy` among them.
        clean: Accuracy on the clean test split.
        corrupted: Accuracy at `severity`.
        left_out: Why runs could not be looked into, in sentences.
        blames: By parts, joined by ` + `: accuracy where they alone are corrupted, and where they
            alone are clean. Empty for a mixer that is not of the delta family.
    """

    mixer: str
    corruption: str
    severity: float
    severities: list[float]
    scalars: dict[str, list[float]]
    clean: Interval
    corrupted: Interval
    blames: dict[str, tuple[Interval, Interval]]
    left_out: tuple[str, ...] = ()


class Subject(NamedTuple):
    """A trained run and its test data, clean and under every corruption of its task."""

    model: Backbone
    clean: Examples
    probes: dict[tuple[str, float], Examples]

    def severities(self, corruption: str) -> list[float]:
        """Return the severities of a corruption.

        Raises:
            ConfigError: The task has no such corruption.
        """
        found = [severity for name, severity in self.probes if name == corruption]
        if not found:
            known = list(dict.fromkeys(name for name, _ in self.probes))
            raise ConfigError(f"{corruption!r} is no corruption of the task; it has {known}")
        return found


def choose(out: Path, plan: str | None, mixers: Iterable[str], setting: str | None = None) -> list[Arm]:
    """Find the mixers to take apart among the sweeps under a folder.

    Args:
        out: The folder of run folders.
        plan: Whose runs; None where the folder holds those of one plan alone.
        mixers: Their labels; none takes all.
        setting: Whose runs, as `task` or `task setting`; None where there is one alone.

    Raises:
        ConfigError: There are no probed runs, several plans or settings, or no such mixer.
    """
    groups = load_runs(out)
    plans = list(dict.fromkeys(group.plan for group in groups))
    if plan is None and len(plans) != 1:
        raise ConfigError(f"{out}: holds the plans {plans}; name one with --plan")
    wanted = plan or plans[0]
    if wanted not in plans:
        raise ConfigError(f"--plan {plan}: {out} holds none of it{suggest(wanted, plans)}")
    probed = [a for g in groups if g.plan == wanted for a in arms(cells(g))]
    if not probed:
        raise ConfigError(f"{out}: no run of plan {wanted} was scored under corruption")
    named = list(dict.fromkeys(f"{arm.task} {arm.setting}" for arm in probed))
    chosen = [n for n in named if setting is None or setting in (n, *n.split(" ", 1))]
    if len(chosen) != 1:
        raise ConfigError(f"--setting {setting}: {out} holds the settings {named}; name one of them")
    found = {arm.mixer: arm for arm in probed if f"{arm.task} {arm.setting}" == chosen[0]}
    for mixer in (mixers := list(mixers)):
        if mixer not in found:
            raise ConfigError(f"--mixer {mixer}: no such mixer{suggest(mixer, list(found))}")
    return [found[mixer] for mixer in mixers or found]


def account(
    out: Path,
    arm: Arm,
    corruption: str,
    severity: float | None = None,
    *,
    groups: Iterable[tuple[str, ...]] = (),
    examples: int = 16,
) -> Account:
    """Take all runs of an arm apart.

    Args:
        out: The folder of run folders.
        arm: As `corruption.arms` finds it.
        corruption: By its name.
        severity: At which the blame is laid; None takes the largest.
        groups: Parts to be taken together, as in `blame`.
        examples: Sequences that are diagnosed.

    Raises:
        ConfigError: No run has weights, or there is no such corruption, severity or part.
    """
    groups = list(groups)
    looked: list[list[Level]] = []
    blamed: list[list[Blame]] = []
    left_out: list[str] = []
    for run in arm.runs:
        folder = RunFolder(out, run.fingerprint)
        if folder.status() == "diverged":
            continue
        try:
            subject = load(folder)
        except ConfigError as error:
            left_out.append(str(error))
            continue
        looked.append(list(levels(subject, corruption, examples=examples)))
        at = looked[-1][-1].severity if severity is None else severity
        if all(isinstance(mixer, Delta) for mixer in subject.model.mixers):
            blamed.append(list(blame(subject, corruption, at, groups)))
    if not looked:
        why = left_out[0] if left_out else "every run diverged; there is nothing to take apart"
        raise ConfigError(f"{arm.mixer}: {why}")
    severities = [level.severity for level in looked[0]]
    names = [n for n in looked[0][0].scalars if "/" not in n]
    scalars = {
        n: [_mean([run[i].scalars.get(n, math.nan) for run in looked]) for i in range(len(severities))] for n in names
    }
    scalars["accuracy"] = [_mean([run[i].accuracy for run in looked]) for i in range(len(severities))]
    severity = severities[-1] if severity is None else severity
    if severity not in severities:
        raise ConfigError(f"{corruption} {severity:g}: the runs' task has severities {severities}")
    return Account(
        mixer=arm.mixer,
        corruption=corruption,
        severity=severity,
        severities=severities,
        scalars=scalars,
        clean=arm.clean,
        corrupted=arm.curves[corruption].accuracy[severities.index(severity)],
        blames={
            " + ".join(same[0].parts): (interval([b.alone for b in same]), interval([b.mended for b in same]))
            for same in zip(*blamed, strict=True)
        },
        left_out=tuple(left_out),
    )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def load(folder: RunFolder) -> Subject:
    """Read a finished run and make its test data again.

    Raises:
        ConfigError: The run has no weights, or its task no corruptions.
    """
    run, status = folder.run(), folder.status()
    if status != "finished":
        raise ConfigError(f"{folder.fingerprint}: is {status}; only finished runs have weights")
    built = model.build(run)
    built.load_state_dict(folder.load_model())
    clean = data.make(run.task, run.seed, run.data).test
    probes = {(p.name, p.severity): p.examples for p in data.probes(run.task, clean, run.seed)}
    if not probes:
        raise ConfigError(f"{folder.fingerprint}: task {run.task.name} has no corruptions")
    return Subject(built.eval(), clean, probes)


def levels(subject: Subject, corruption: str, *, examples: int = 32) -> Iterator[Level]:
    """Diagnose a run at each severity of a corruption.

    Args:
        subject: The trained model and its test sets.
        corruption: By its name.
        examples: Sequences to diagnose; accuracy is over the whole test split.

    Raises:
        ConfigError: The task has no such corruption.
    """
    for severity in subject.severities(corruption):
        found = subject.probes[corruption, severity]
        tokens = torch.from_numpy(found.inputs[:examples])
        scalars = spectrum.diagnose(subject.model, tokens).scalars()
        named = {name.removeprefix("spectrum/"): value for name, value in scalars.items()}
        accuracy = _accuracy(subject.model, found)
        yield Level(severity, accuracy, named)


def blame(
    subject: Subject, corruption: str, severity: float, groups: Iterable[tuple[str, ...]] = ()
) -> Iterator[Blame]:
    """Measure what each part of the layers has to do with the loss at one severity.

    Args:
        subject: A run whose mixers are all of the delta family.
        corruption: By its name.
        severity: One of its severities.
        groups: Parts to be taken together; none takes each alone, then all of them.

    Raises:
        ConfigError: A mixer is of another kind, or there is no such part or severity.
    """
    if severity not in (known := subject.severities(corruption)):
        raise ConfigError(f"{corruption} {severity:g}: the run's task has severities {known}")
    for mixer in subject.model.mixers:
        if not isinstance(mixer, Delta):
            raise ConfigError(f"mixer {mixer.config.name!r} is not of the delta family")
    clean, bad = subject.clean, subject.probes[corruption, severity]
    for parts in groups or [*((name,) for name in PARTS), tuple(PARTS)]:
        for name in parts:
            if name not in PARTS:
                raise ConfigError(f"{name!r} is no part{suggest(name, list(PARTS))}")
        alone = _accuracy(subject.model, clean, bad, parts)
        yield Blame(parts, alone, _accuracy(subject.model, bad, clean, parts))


@torch.no_grad()
def _accuracy(built: Backbone, examples: Examples, other: Examples | None = None, parts: tuple[str, ...] = ()) -> float:
    """Score a model on examples, with some parts of its layers computed from others."""
    targets = torch.from_numpy(examples.targets)
    scored = targets != IGNORE
    foreign = _parts(built, torch.from_numpy(other.inputs)) if other is not None else {}

    def hook(mixer, arguments, y):
        own = mixer.parts(arguments[0])
        for name in parts:
            own = PARTS[name](own, foreign[mixer])
        return mixer.mix(arguments[0], own)

    hooks = [mixer.register_forward_hook(hook) for mixer in foreign]
    try:
        logits = built(torch.from_numpy(examples.inputs), scored)
    finally:
        for handle in hooks:
            handle.remove()
    right = (logits.argmax(-1) == targets[scored]) & logits.isfinite().all(-1)
    return right.double().mean().item()


def _parts(built: Backbone, inputs: Tensor) -> dict[torch.nn.Module, Parts]:
    """Return what each mixer computes from inputs."""
    found: dict[torch.nn.Module, Parts] = {}

    def hook(mixer, arguments, y):
        found[mixer] = mixer.parts(arguments[0])

    hooks = [mixer.register_forward_hook(hook) for mixer in built.mixers]
    try:
        built(inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return found
