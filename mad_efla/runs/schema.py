"""What runs leave on disk, as values: scores, results, failures, logged steps, sweep records."""

from typing import Literal, NamedTuple

from pydantic import Field

from mad_efla.config import Section
from mad_efla.plan.run import RunConfig

Status = Literal["waiting", "running", "interrupted", "failed", "pruned", "diverged", "finished"]


class Scores(Section):
    """Metrics of one split.

    Attributes:
        loss: Mean cross-entropy in nats per scored token.
        token_accuracy: Share of scored tokens answered right, in [0, 1].
        macro_accuracy: The same, averaged over the answers' classes.
        sequence_accuracy: Share of sequences with all scored answers right, in [0, 1]; results of
            earlier versions have none.
    """

    loss: float
    token_accuracy: float
    macro_accuracy: float
    sequence_accuracy: float | None = None


class ProbeScore(Section):
    """What became of one further test set, see `tasks.Probe`.

    Attributes:
        name: What was done to the test split.
        severity: How much of it.
        accuracy: Token accuracy, in [0, 1]; an answer that is not finite is wrong.
        finite: Share of scored positions with finite logits, in [0, 1].
    """

    name: str
    severity: float
    accuracy: float
    finite: float


class Result(Section):
    """How a run ended.

    Attributes:
        status: `diverged` when the loss stopped being finite; its scores are then None.
        test: Scores of the chosen weights on the test split.
        validation: Their scores on the validation split.
        chosen_step: The step whose weights were scored.
        steps: Optimiser steps made.
        stopped: Why the run ended before its budget, if it did: divergence, or a solved task.
        steps_to_90: First evaluated step with validation token accuracy of at least 0.9.
        ceiling: Share of scored test positions that can be answered at all, in [0, 1].
        chance: Share of them that the commonest answer of the training split gets right, in [0, 1];
            results of earlier versions have none.
        parameters: Trained numbers.
        state_size: Numbers carried between tokens at the task's length, all layers; None: unknown.
        seconds: Wall time spent training and evaluating, all attempts.
        train_seconds: The part of it inside training steps.
        spent: Parts of the rest: data, model, evaluation, spectrum, logging, checkpoint.
        data_digest: Hash of the generated data.
        probes: How the chosen weights do on what the task tests beside its test split.
        environment: Backends, device, threads, library versions, git commit.
        started: Milliseconds since the epoch.
        ended: Milliseconds since the epoch.
    """

    fingerprint: str
    status: Literal["finished", "diverged"]
    test: Scores | None
    validation: Scores | None
    chosen_step: int | None
    steps: int
    stopped: str | None
    steps_to_90: int | None
    ceiling: float = 1.0
    chance: float | None = None
    parameters: int
    state_size: int | None
    seconds: float
    train_seconds: float
    spent: dict[str, float] = Field(default_factory=dict)
    data_digest: str
    probes: tuple[ProbeScore, ...] = ()
    environment: dict[str, str]
    started: int
    ended: int


class Failure(Section):
    """Why an attempt ended without a result.

    Attributes:
        kind: Whether it failed, was stopped, or was ended early by a search.
        reason: In a line.
        traceback: Of the error; empty where there was none.
        time: Milliseconds since the epoch.
        transient: Whether the cause lies outside of the run: memory, disk, a killed worker.
    """

    kind: Literal["failed", "interrupted", "pruned"]
    reason: str
    traceback: str
    time: int
    transient: bool = False


class Row(NamedTuple):
    """One logged step: metrics by name, and when (milliseconds since the epoch)."""

    step: int
    time: int
    metrics: dict[str, float]


# ------------------------------------------------------------------ sweeps


class Planned(Section):
    """A run as its sweep names it, so that it can be told of where its folder is gone.

    Attributes:
        fingerprint: The run's name.
        setting: The setting's label in this sweep.
        mixer: The mixer's label.
        code: Digest of the source of a mixer that is the user's own, else empty.
        condition: Digest of task, data, model and budget, see `RunConfig.condition`.
        point: Digest of the grid point, see `RunConfig.point`.
        seed: The run's seed.
        chooses: Whether it only chooses the grid point, on a seed of its own.
        check: Whether it belongs to a setting that only checks that all is well; no score counts it.
    """

    fingerprint: str
    setting: str
    mixer: str
    code: str = ""
    condition: str
    point: str
    seed: int
    chooses: bool = False
    check: bool = False


class SweepRecord(Section):
    """Which runs a sweep is made of.

    Attributes:
        id: Hash of what defines it.
        task: The task's name: the MLflow experiment.
        plan: The plan's name.
        protocol: The protocol of its runs.
        command: What the user typed.
        about: The plan's own sentence.
        fingerprints: Its runs, in the order of the plan.
        planned: The same with what they are; records of earlier versions have none.
        started: Milliseconds since the epoch, of the first call.
        ended: Of the last call's end; None while it runs or after a kill.
    """

    id: str
    task: str
    plan: str
    protocol: str
    command: str
    about: str = ""
    fingerprints: tuple[str, ...]
    planned: tuple[Planned, ...] = ()
    started: int
    ended: int | None


def planned(run: RunConfig, *, chooses: bool = False, check: bool = False) -> Planned:
    """Note what a run is."""
    return Planned(
        fingerprint=run.fingerprint,
        setting=run.setting,
        mixer=run.mixer,
        code=run.mixer_code,
        condition=run.condition,
        point=run.point,
        seed=run.seed,
        chooses=chooses,
        check=check,
    )
