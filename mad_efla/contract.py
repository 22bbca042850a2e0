"""What every mixer and every task promises, as checks that say in words what holds and what fails.

The built-in ones are held to it by the tests, a user's own by `mad-efla check package.module:Name`.
A check is a function that raises `Broken` with the reason; its docstring is the promise.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mad_efla import config, plugins
from mad_efla.config import ConfigError, Document
from mad_efla.mixers import Mixer, MixerConfig, State
from mad_efla.plan.run import DataConfig
from mad_efla.tasks import IGNORE, Examples, RealTask, Task, token_type
from mad_efla.training import data

B, L = 3, 21  # a batch and a length that are no multiple of any block
SIZES = DataConfig(train_examples=600, validation_examples=100, test_examples=100)


class Broken(Exception):
    """A promise is not kept; the text says how."""


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        promise: What is promised.
        broken: How it is broken; empty where it holds.
    """

    promise: str
    broken: str


class MixerUnderTest(NamedTuple):
    """A mixer to be built again and again.

    Attributes:
        kind: Its class.
        config: Its fields.
        width: Width of the model, D.
    """

    kind: type[Mixer]
    config: MixerConfig
    width: int = 32

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
        """Build it from a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.kind(self.width, self.config).to(dtype)

    def example(self, seed: int = 1, dtype: torch.dtype = torch.float64, length: int = L) -> Tensor:
        """Draw an input, `[B, L, D]`."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(B, length, self.width, generator=rng, dtype=torch.float64).to(dtype)


def check(name: str, assignments: Iterable[str] = (), width: int = 32) -> tuple[str, list[Finding]]:
    """Check a mixer or a task against all that it promises.

    Args:
        name: A built-in name, or `package.module:Name`.
        assignments: `FIELD=VALUE` for its fields.
        width: Width of the model, for mixers.

    Returns:
        `mixer` or `task`, and a finding per promise.

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
        return "task", [_try(promise, task) for promise in promises]
    mixer = MixerUnderTest(kind, config.validate(kind.Config, document, "mixer"), width)
    try:
        mixer.build()
    except ValueError as error:
        raise ConfigError(f"{name}: {error}; give fields with --set, or another --width") from error
    return "mixer", [_try(promise, mixer) for promise in MIXER_PROMISES]


def words(promise: Callable[..., None]) -> str:
    """Return a promise in words."""
    return (promise.__doc__ or "").strip().rstrip(".")


def _try(promise: Callable[..., None], subject: Any) -> Finding:
    try:
        promise(subject)
    except Broken as broken:
        return Finding(words(promise), str(broken))
    except Exception as error:
        return Finding(words(promise), f"{type(error).__name__}: {error}")
    return Finding(words(promise), "")


def _must(holds: bool | Tensor | np.bool_, broken: str) -> None:
    if not holds:
        raise Broken(broken)


# ------------------------------------------------------------------ mixers


def keeps_shape_and_dtype(mixer: MixerUnderTest) -> None:
    """`forward` keeps shape and dtype, at any length and in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        for length in (1, 2, L):
            x = mixer.example(dtype=dtype, length=length)
            y = mixer.build(dtype)(x)
            _must(y.shape == x.shape, f"{tuple(x.shape)} became {tuple(y.shape)}")
            _must(y.dtype == dtype, f"{dtype} became {y.dtype}")


def is_causal(mixer: MixerUnderTest) -> None:
    """No output depends on a later token, and every output on its own."""
    built, x = mixer.build(), mixer.example().requires_grad_()
    for t in (0, 3, 15, L - 2):
        (gradient,) = torch.autograd.grad(built(x)[:, t].pow(2).sum(), x)
        sizes = gradient.abs().amax(dim=(0, 2))
        _must(sizes[t] > 0, f"the output at token {t} ignores token {t}")
        later = sizes[t + 1 :]
        _must(
            later.max() <= 1e-12 * sizes.max(),  # a transform may round across positions
            f"the output at token {t} changes with token {t + 1 + int(later.argmax())}",
        )


def rows_are_independent(mixer: MixerUnderTest) -> None:
    """Rows of a batch do not see each other."""
    built, x = mixer.build(), mixer.example()
    alone = torch.cat([built(row[None]) for row in x])
    _close(built(x), alone, 1e-11, "a row in a batch differs from the row alone")


def gradients_are_finite(mixer: MixerUnderTest) -> None:
    """Every parameter gets a finite gradient that is not zero."""
    built, x = mixer.build(), mixer.example().requires_grad_()  # it may have no parameters
    (built(x) * mixer.example(seed=2)).sum().backward()
    for label, parameter in built.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            raise Broken(f"{label} gets no gradient")
        _must(bool(torch.isfinite(gradient).all()), f"the gradient of {label} is not finite")
        _must(gradient.abs().max() > 0, f"the gradient of {label} is zero")


def stepping_equals_forward(mixer: MixerUnderTest) -> None:
    """`step`, token by token from `initial_state`, gives what `forward` gives at once."""
    built, x = mixer.build(), mixer.example()
    stepped, _ = _stepped(built, x)
    _close(stepped, built(x), 1e-9, "`step` and `forward` differ")


def state_size_is_true(mixer: MixerUnderTest) -> None:
    """`state_size` is the number of values that `step` carries from token to token."""
    built = mixer.build()
    _, state = _stepped(built, mixer.example())
    carried = sum(s.numel() for s in state) // B
    stated = built.state_size(L)
    _must(stated == carried, f"state_size({L}) says {stated}, `step` carries {carried}")


def seeds_decide_weights(mixer: MixerUnderTest) -> None:
    """Equal seeds build equal weights."""
    first, second = mixer.build(seed=3), mixer.build(seed=3)
    for (label, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        _must(torch.equal(a, b), f"{label} differs between two builds from one seed")


def runs_under_autocast(mixer: MixerUnderTest) -> None:
    """Under bfloat16 autocast it stays within 5 % of float64, with finite gradients."""
    built = mixer.build(torch.float32)
    x = mixer.example(dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = built(x)
    exact = mixer.build(torch.float32).double()(mixer.example())
    error = float(((y.double() - exact).norm() / exact.norm().clamp_min(1e-300)).detach())
    _must(error < 0.05, f"it is off by {error:.1%}")
    y.float().square().mean().backward()
    for label, p in built.named_parameters():
        finite = p.grad is not None and bool(torch.isfinite(p.grad).all())
        _must(finite, f"the gradient of {label} is not finite")


MIXER_PROMISES: tuple[Callable[[MixerUnderTest], None], ...] = (
    keeps_shape_and_dtype,
    is_causal,
    rows_are_independent,
    gradients_are_finite,
    stepping_equals_forward,
    state_size_is_true,
    seeds_decide_weights,
    runs_under_autocast,
)


def _stepped(built: Mixer, x: Tensor) -> tuple[Tensor, State]:
    state = tuple(s.double() for s in built.initial_state(B, x.device))
    outputs = []
    for t in range(x.shape[1]):
        y, state = built.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def _close(found: Tensor, expected: Tensor, tolerance: float, broken: str) -> None:
    """Compare relative to the largest value expected."""
    _must(found.shape == expected.shape, f"{broken}: {found.shape} against {expected.shape}")
    found, expected = found.detach(), expected.detach()
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    _must(error <= tolerance, f"{broken} by {error:.1e} of the largest value")


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


def shapes_types_and_ids_are_as_stated(task: Task) -> None:
    """Examples have the stated length and ids, in the smallest type, and score something."""
    world = task.world(data.stream(0, "world"))
    found = task.sample(30, data.stream(0, "train"), "train", world)
    shape, wanted = found.inputs.shape, (30, task.input_length)
    _must(shape == found.targets.shape == wanted, f"inputs are {shape}, not {wanted}")
    scored = found.targets != IGNORE
    _must(bool(scored.any(axis=1).all()), "a sequence has no scored position")
    for label, ids in (("inputs", found.inputs), ("targets", found.targets[scored])):
        low, high = ids.min(), ids.max()
        _must(
            low >= 0 and high < task.vocabulary,
            f"{label} hold ids {low} to {high}, the vocabulary has {task.vocabulary}",
        )
    smallest = token_type(task.vocabulary)
    _must(
        found.inputs.dtype == found.targets.dtype == smallest,
        f"{found.inputs.dtype} and {found.targets.dtype}, not {np.dtype(smallest)}; see token_type",
    )
    _must(
        not np.shares_memory(found.inputs, found.targets),
        "inputs and targets share memory, but clashing rows are drawn again in place",
    )
    _check_next_tokens(found, scored)


def _check_next_tokens(found: Examples, scored: np.ndarray) -> None:
    if found.next_tokens is None:
        return
    shifted = np.array_equal(found.next_tokens[:, :-1], found.inputs[:, 1:])
    _must(shifted, "next_tokens are not the inputs one place later")
    agrees = np.array_equal(found.next_tokens[scored], found.targets[scored])
    _must(agrees, "at a scored position the next token is not the target")


def seeds_decide_bytes(task: Task) -> None:
    """Equal seeds give equal bytes, and other seeds others."""
    sizes = _sizes(task)
    first, again, other = (data.make(task, seed, sizes).digest for seed in (0, 0, 1))
    _must(first == again, "one seed gave different data twice; draw from `rng` alone")
    _must(first != other, "two seeds gave the same data")


def splits_are_disjoint(task: Task) -> None:
    """No sequence stands in two splits."""
    made = data.make(task, 0, _sizes(task))
    rows = [{r.tobytes() for r in getattr(made, s).inputs} for s in data.SPLITS]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        shared = len(rows[i] & rows[j])
        _must(shared == 0, f"{data.SPLITS[i]} and {data.SPLITS[j]} share {shared} sequences")


def every_token_has_a_role(task: Task) -> None:
    """`describe` names a role for every token."""
    inputs = data.make(task, 0, _sizes(task)).test.inputs[0]
    named = len(task.describe(inputs))
    _must(named == len(inputs), f"{named} roles for {len(inputs)} tokens")


def _sizes(task: Task) -> DataConfig:
    """Return sizes of splits to check a task with: of a real one all that it has."""
    if not isinstance(task, RealTask):
        return SIZES
    train, test = (len(part.inputs) for part in task.corpus())
    return DataConfig(train_examples=train - train // 4, validation_examples=train // 4, test_examples=test)


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
    sizes = _sizes(task)
    one, other = (data.make(task, seed, sizes).test for seed in (0, 1))
    _must(np.array_equal(one.inputs, other.inputs), "two seeds have two test splits")
    _must(np.array_equal(one.targets, other.targets), "two seeds have two sets of answers")


def probes_are_exact(task: Task) -> None:
    """Probes keep shapes, types and answers, and are the same bytes for equal seeds."""
    test = data.make(task, 0, _sizes(task)).test.rows(slice(20))
    again = data.probes(task, test, 0)
    for name, severity, found in data.probes(task, test, 0):
        same = found.inputs.shape == test.inputs.shape and found.inputs.dtype == test.inputs.dtype
        _must(same, f"{name} {severity:g}: {found.inputs.dtype} of {found.inputs.shape}")
        _must(np.array_equal(found.targets, test.targets), f"{name} {severity:g}: other answers")
        twice = next(again).examples.inputs
        _must(np.array_equal(twice, found.inputs), f"{name} {severity:g}: one seed, two probes")


TASK_PROMISES: tuple[Callable[[Task], None], ...] = (
    solver_answers_everything,
    solver_sees_only_the_prefix,
    shapes_types_and_ids_are_as_stated,
    seeds_decide_bytes,
    splits_are_disjoint,
    every_token_has_a_role,
)

REAL_TASK_PROMISES: tuple[Callable[[Any], None], ...] = (
    real_examples_are_as_stated,
    seeds_decide_bytes,
    the_test_split_is_the_same_for_every_seed,
    splits_are_disjoint,
    every_token_has_a_role,
    probes_are_exact,
)
"""What a task with examples of its own promises, which has no generator and no solver."""
