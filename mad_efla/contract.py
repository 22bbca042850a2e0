"""What every mixer and every task promises, as checks that say in words what holds and what fails.

The built-in ones are held to it by the tests, a user's own by `mad-efla check package.module:Name`.
What a layer or a task must keep to be trained at all is in `training/promises.py`; here is what a `Mixer`
and a solver promise beside it. A check is a function that raises `Broken` with the reason; its docstring
is the promise.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mad_efla import config, plugins
from mad_efla.config import ConfigError, Document
from mad_efla.mixers import Mixer, State
from mad_efla.mixers._guest import Guest
from mad_efla.tasks import IGNORE, RealTask, Task, token_type
from mad_efla.training import data
from mad_efla.training.promises import (
    LAYER_PROMISES,
    B,
    Broken,
    Finding,
    L,
    MixerUnderTest,
    Promise,
    _close,
    _must,
    hold,
    seeds_decide_weights,
    shapes_types_and_ids_are_as_stated,
    split_sizes,
    splits_are_disjoint,
    trains,
)


def check(name: str, assignments: Iterable[str] = (), width: int = 32) -> tuple[str, list[Finding]]:
    """Check a mixer or a task against all that it promises.

    Args:
        name: A built-in name, or `package.module:Name`: of a task, a mixer, or any `nn.Module`.
        assignments: `FIELD=VALUE` for its fields.
        width: Width of the model, for mixers.

    Returns:
        `mixer`, `layer` or `task`, and a finding per promise; one whose weights are not set, or
        that does not run, is not looked at any further.

    Raises:
        ConfigError: There is no such plug-in, or its fields are wrong.
    """
    kind = plugins.either(name)
    fields: dict[str, Any] = {"name": name}
    for text in assignments:
        path, value = config.assignment(text)
        fields[path] = value
    document = Document(fields, {}, name)
    if issubclass(kind, Task):
        task = config.validate(kind, document, "task")
        promises = REAL_TASK_PROMISES if isinstance(task, RealTask) else TASK_PROMISES
        return "task", [hold(promise, task) for promise in promises]
    mixer = MixerUnderTest(kind, config.validate(kind.Config, document, "mixer"), width)
    try:
        decodes = mixer.build().decodes
    except ValueError as error:
        raise ConfigError(f"{name}: {error}; give fields with --set, or another --width") from error
    guest = issubclass(kind, Guest)
    promises = [*LAYER_PROMISES, *([] if guest else MIXER_PROMISES), *(DECODING_PROMISES if decodes else [])]
    findings = []
    for promise in promises:
        findings.append(hold(promise, mixer))
        if promise in (seeds_decide_weights, trains) and findings[-1].broken:
            break
    return "layer" if guest else "mixer", findings


# ------------------------------------------------------------------ mixers


def keeps_shape_and_dtype(mixer: MixerUnderTest) -> None:
    """`forward` keeps shape and dtype, at any length and in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        for length in (1, 2, L):
            x = mixer.example(dtype=dtype, length=length)
            y = mixer.build(dtype)(x)
            _must(y.shape == x.shape, f"{tuple(x.shape)} became {tuple(y.shape)}")
            _must(y.dtype == dtype, f"{dtype} became {y.dtype}")


def gradients_are_finite(mixer: MixerUnderTest) -> None:
    """Every parameter gets a finite gradient that is not zero."""
    (built, _), x = mixer.awake(), mixer.example().requires_grad_()  # it may have no parameters
    (built(x) * mixer.example(seed=2)).sum().backward()
    for label, parameter in built.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            raise Broken(f"{label} gets no gradient")
        _must(bool(torch.isfinite(gradient).all()), f"the gradient of {label} is not finite")
        _must(gradient.abs().max() > 0, f"the gradient of {label} is zero")


def stepping_equals_forward(mixer: MixerUnderTest) -> None:
    """`step`, token by token from `initial_state`, gives what `forward` gives at once."""
    built, x = mixer.build().eval(), mixer.example()
    stepped, _ = _stepped(built, x)
    _close(stepped, built(x), max(1e-9, mixer.rounding), "`step` and `forward` differ")


def state_size_is_true(mixer: MixerUnderTest) -> None:
    """`state_size` is the number of values that `step` carries from token to token."""
    built = mixer.build()
    _, state = _stepped(built, mixer.example())
    carried = sum(s.numel() for s in state) // B
    stated = built.state_size(L)
    _must(stated == carried, f"state_size({L}) says {stated}, `step` carries {carried}")


def runs_under_autocast(mixer: MixerUnderTest) -> None:
    """Under bfloat16 autocast it stays within 5 % of float64, with finite gradients."""
    built = mixer.build(torch.float32)
    x = mixer.example(dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = built(x)
    exact = mixer.build(torch.float64)(mixer.example(dtype=torch.float64))
    error = float(((y.double() - exact).norm() / exact.norm().clamp_min(1e-300)).detach())
    _must(error < 0.05, f"it is off by {error:.1%}")
    y.float().square().mean().backward()
    for label, p in built.named_parameters():
        finite = p.grad is not None and bool(torch.isfinite(p.grad).all())
        _must(finite, f"the gradient of {label} is not finite")


MIXER_PROMISES: tuple[Promise, ...] = (keeps_shape_and_dtype, gradients_are_finite, runs_under_autocast)
"""What a `Mixer` promises beside what every layer does."""

DECODING_PROMISES: tuple[Promise, ...] = (stepping_equals_forward, state_size_is_true)
"""What a mixer promises that goes token by token."""


def _stepped(built: Mixer, x: Tensor) -> tuple[Tensor, State]:
    state = tuple(s.to(x.dtype) if s.is_floating_point() else s for s in built.initial_state(B, x.device))
    outputs = []
    for t in range(x.shape[1]):
        y, state = built.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


# ------------------------------------------------------------------ tasks


def solver_answers_everything(task: Task) -> None:
    """The solver answers every scored position."""
    world = task.world(data.stream(0, "world"))
    for split in data.SPLITS:
        examples = task.sample(20, data.stream(0, split), split, world)
        for inputs, targets in zip(examples.inputs, examples.targets, strict=True):
            scored = targets != IGNORE
            wrong = np.flatnonzero(scored & (task.solve(inputs, world) != targets))
            _must(
                wrong.size == 0,
                f"{split}: {wrong.size} of {scored.sum()} scored positions are answered wrongly, "
                f"the first at {wrong[0] if wrong.size else 0} of {inputs.tolist()}",
            )


def solver_sees_only_the_prefix(task: Task) -> None:
    """The solver's answers do not change when later tokens are cut off."""
    world = task.world(data.stream(0, "world"))
    for inputs in task.sample(5, data.stream(0, "test"), "test", world).inputs:
        whole = task.solve(inputs, world)
        _must(len(whole) == len(inputs), f"{len(whole)} answers for {len(inputs)} tokens")
        for end in (1, len(inputs) // 2, len(inputs) - 1):
            same = np.array_equal(task.solve(inputs[:end], world), whole[:end])
            _must(same, f"the first {end} answers change when the later tokens are gone")


def seeds_decide_bytes(task: Task) -> None:
    """Equal seeds give equal bytes, and other seeds others."""
    sizes = split_sizes(task)
    first, again, other = (data.make(task, seed, sizes).digest for seed in (0, 0, 1))
    _must(first == again, "one seed gave different data twice; draw from `rng` alone")
    _must(first != other, "two seeds gave the same data")


def every_token_has_a_role(task: Task) -> None:
    """`describe` names a role for every token."""
    inputs = data.make(task, 0, split_sizes(task)).test.inputs[0]
    named = len(task.describe(inputs))
    _must(named == len(inputs), f"{named} roles for {len(inputs)} tokens")


def real_examples_are_as_stated(task: RealTask) -> None:
    """Inputs are finite float32 of the stated length, targets ids in the smallest type."""
    for label, part in task.corpus()._asdict().items():
        shape, wanted = part.inputs.shape, (len(part.inputs), task.input_length)
        _must(shape == part.targets.shape == wanted, f"{label}: inputs are {shape}, not {wanted}")
        _must(part.inputs.dtype == np.float32, f"{label}: inputs are {part.inputs.dtype}")
        _must(np.isfinite(part.inputs).all(), f"{label}: an input is not finite")
        scored = part.targets != IGNORE
        _must(bool(scored.any(axis=1).all()), f"{label}: a sequence has no scored position")
        ids = part.targets[scored]
        _must(
            ids.min() >= 0 and ids.max() < task.vocabulary,
            f"{label}: classes {ids.min()} to {ids.max()}, there are {task.vocabulary}",
        )
        smallest = np.dtype(token_type(task.vocabulary))
        _must(part.targets.dtype == smallest, f"{label}: targets are {part.targets.dtype}")


def the_test_split_is_the_same_for_every_seed(task: RealTask) -> None:
    """The test split does not depend on the seed, and all of the corpus can be used."""
    sizes = split_sizes(task)
    one, other = (data.make(task, seed, sizes).test for seed in (0, 1))
    _must(np.array_equal(one.inputs, other.inputs), "two seeds have two test splits")
    _must(np.array_equal(one.targets, other.targets), "two seeds have two sets of answers")


def probes_are_exact(task: Task) -> None:
    """Probes keep shapes, types and answers, and are the same bytes for equal seeds."""
    test = data.make(task, 0, split_sizes(task)).test.rows(slice(20))
    again = data.probes(task, test, 0)
    for name, severity, found in data.probes(task, test, 0):
        same = found.inputs.shape == test.inputs.shape and found.inputs.dtype == test.inputs.dtype
        _must(same, f"{name} {severity:g}: {found.inputs.dtype} of {found.inputs.shape}")
        _must(np.array_equal(found.targets, test.targets), f"{name} {severity:g}: other answers")
        twice = next(again).examples.inputs
        _must(np.array_equal(twice, found.inputs), f"{name} {severity:g}: one seed, two probes")


TASK_PROMISES: tuple[Promise, ...] = (
    solver_answers_everything,
    solver_sees_only_the_prefix,
    shapes_types_and_ids_are_as_stated,
    seeds_decide_bytes,
    splits_are_disjoint,
    every_token_has_a_role,
)

REAL_TASK_PROMISES: tuple[Promise, ...] = (
    real_examples_are_as_stated,
    seeds_decide_bytes,
    the_test_split_is_the_same_for_every_seed,
    splits_are_disjoint,
    every_token_has_a_role,
    probes_are_exact,
)
"""What a task with examples of its own promises, which has no generator and no solver."""
