"""What a layer and a task must do to be trained and scored here, as checks that say in words what fails.

`fits.check` refuses a sweep of anybody's own layer or task at the first promise of `LAYER_PROMISES` or
`EXAMPLE_PROMISES` that is broken; `mad-efla check` shows all of them, and those of `contract.py` for
what is a `Mixer` or has a solver. A promise is a function that raises `Broken` with the reason; its
docstring says what is promised, and what it returns is a word on something that is no fault.

A layer is looked at in its own type: a guest in float32, a `Mixer` in float64.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mad_efla import plugins
from mad_efla.config import ConfigError
from mad_efla.mixers import Mixer, MixerConfig, Place
from mad_efla.mixers._guest import Guest, reason
from mad_efla.plan.run import DataConfig
from mad_efla.tasks import IGNORE, Examples, RealTask, Task, token_type
from mad_efla.training import data, randomness

B, L = 3, 21  # a batch and a length that are no multiple of any block
LENGTHS = (L, 64, 65, 130)  # below, at and above the chunks that fast forms take
FAR_LARGER = 4.0  # times a mixer of ours
SIZES = DataConfig(train_examples=600, validation_examples=100, test_examples=100)


class Broken(Exception):
    """A promise is not kept; the text says how."""


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        promise: What is promised.
        broken: How it is broken; empty where it holds.
        word: What is to be known of it all the same; empty for nothing.
    """

    promise: str
    broken: str
    word: str = ""


class MixerUnderTest(NamedTuple):
    """A mixer to be built again and again.

    Attributes:
        kind: Its class.
        config: Its fields.
        width: Width of the model, D.
        length: Tokens of the longest sequence that it will see.
        depth: Mixers of the model.
        device: Where it runs.
        half: Whether it runs under bfloat16 autocast.
    """

    kind: type[Mixer]
    config: MixerConfig
    width: int = 32
    length: int = LENGTHS[-1]
    depth: int = 2
    device: str = "cpu"
    half: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type that it is looked at in."""
        ours = not issubclass(self.kind, Guest) and not self.half and self.device == "cpu"
        return torch.float64 if ours else torch.float32

    @property
    def rounding(self) -> float:
        """A relative error that rounding alone may make."""
        return 0.03 if self.half else 1e-11 if self.dtype == torch.float64 else 1e-4

    @property
    def lengths(self) -> list[int]:
        """The lengths that it is trained at, its longest included."""
        return sorted({n for n in LENGTHS if n < self.length} | {self.length})

    @property
    def short(self) -> int:
        """The length at which it is looked at token by token."""
        return min(L, self.length)

    def build(self, dtype: torch.dtype | None = None, seed: int = 0) -> Mixer:
        """Build it from a seed, in its type or another."""
        with randomness.building(seed):
            built = self.kind.placed(self.width, self.config, Place(0, self.depth, self.length))
        if (dtype or self.dtype) is not torch.float32:
            built._apply(_wide)
        return built.to(self.device)

    def example(self, seed: int = 1, dtype: torch.dtype | None = None, length: int = L) -> Tensor:
        """Draw an input, `[B, L, D]`."""
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.randn(B, length, self.width, generator=rng, dtype=torch.float64)
        return drawn.to(self.device, dtype or self.dtype)

    def run(self, built: nn.Module, x: Tensor) -> Tensor:
        """Apply it as a run does, and in the input's type give what comes out.

        Raises:
            Broken: It is no tensor [B, L, D].
        """
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.half):
            y = built(x)
        _must(y.shape == x.shape, f"{tuple(x.shape)} became {tuple(y.shape)}")
        return y.to(x.dtype)

    def awake(self) -> tuple[Mixer, list[str]]:
        """Build it, put small weights where all are zero, and name those places.

        A projection or a gate that starts at zero hides what lies before it.
        """
        built, names = self.build(), []
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in built.named_parameters():
                if not p.any():
                    p += 0.1 * torch.randn(p.shape, generator=rng).to(p)
                    names.append(name)
        return built, names


def _wide(t: Tensor) -> Tensor:
    """Take a tensor to float64, a complex one to complex128."""
    return t.to(torch.complex128) if t.is_complex() else t.double() if t.is_floating_point() else t


Promise = Callable[[Any], str | None]


def words(promise: Promise) -> str:
    """Return a promise in words."""
    return " ".join((promise.__doc__ or "").split("\n\n")[0].split()).rstrip(".")


def hold(promise: Promise, subject: Any) -> Finding:
    """Hold a mixer or a task to a promise; whatever goes wrong is a finding."""
    try:
        with randomness.lent():
            return Finding(words(promise), "", promise(subject) or "")
    except Broken as broken:
        return Finding(words(promise), str(broken))
    except ConfigError as error:
        return Finding(words(promise), str(error))
    except Exception as error:
        return Finding(words(promise), reason(error))


def _must(holds: bool | Tensor | np.bool_, broken: str) -> None:
    if not holds:
        raise Broken(broken)


# ------------------------------------------------------------------ layers


def seeds_decide_weights(mixer: MixerUnderTest) -> None:
    """Equal seeds build equal weights, and every weight is set."""
    with _unset_is_nan():
        first, second = mixer.build(seed=3), mixer.build(seed=3)
    for (label, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        wrong = f"{label} holds numbers that nobody set, as torch.empty leaves them: initialise it in __init__"
        _must(not a.isnan().any(), wrong)
        _must(torch.equal(a, b), f"{label} differs between two builds from one seed; draw from torch's generator alone")


@contextlib.contextmanager
def _unset_is_nan() -> Iterator[None]:
    """Let `torch.empty` hand out NaN."""
    before, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def leaves_the_process_alone(mixer: MixerUnderTest) -> str:
    """It seeds no generator; switches of the process that it throws are told."""
    before, drawn = _switches(), _generators()
    built = mixer.build()
    seeded = torch.initial_seed()  # which fork_rng gives back: looked at again below
    x = mixer.example(length=mixer.short).requires_grad_()
    after = _switches()
    if after == before:
        mixer.run(built, x).sum().backward()
        mixer.run(built.eval(), x)
        after = _switches()
    thrown = [
        f"it leaves {name} at {after[name]}, which was {value}; a run gives it back, another program does not"
        for name, value in before.items()
        if after[name] != value
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        mixer.kind.placed(mixer.width, mixer.config, Place(0, mixer.depth, mixer.length))
        inside = torch.initial_seed()
    _must(
        inside == 77 and torch.initial_seed() == seeded, "it seeds torch's generator: then a run's seed decides nothing"
    )
    used = [name for name, state in _generators().items() if state != drawn[name]]
    drawn_from = [f"it draws from {' and '.join(used)}, which a run seeds as it does torch's"] if used else []
    return "; ".join([*thrown, *drawn_from])


def _switches() -> dict[str, Any]:
    return {
        "gradients (torch.set_grad_enabled)": torch.is_grad_enabled(),
        "the default type (torch.set_default_dtype)": torch.get_default_dtype(),
        "the default device (torch.set_default_device)": torch.get_default_device(),
        "torch's threads (torch.set_num_threads)": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the precision of products (torch.set_float32_matmul_precision)": torch.get_float32_matmul_precision(),
    }


def _generators() -> dict[str, Any]:
    return {
        "numpy's generator": str(np.random.get_state()),  # noqa: NPY002
        "Python's generator": random.getstate(),
    }


def trains(mixer: MixerUnderTest) -> str:
    """In training it gives [B, L, D] and finite gradients, at every length."""
    built, zero = mixer.awake()
    still, missed = False, []
    for length in mixer.lengths:
        x = mixer.example(length=length).requires_grad_()
        built.zero_grad()
        y = mixer.run(built, x)
        _must(y.requires_grad, "its output carries no gradient: it runs under torch.no_grad, or detaches")
        _must(bool(torch.isfinite(y).all()), f"at length {length} its output is not finite")
        (y * mixer.example(2, length=length)).sum().backward()
        missed = []
        for label, p in [("its input", x), *built.named_parameters()]:
            if not p.requires_grad:
                continue
            if p.grad is None or not p.grad.any():
                missed.append(label)
            else:
                _must(bool(torch.isfinite(p.grad).all()), f"at length {length} the gradient of {label} is not finite")
        _must("its input" not in missed, f"at length {length} its output does not depend on its input")
    if zero:
        still = not mixer.run(mixer.build(), mixer.example(length=mixer.short)).any()
    said = [f"it starts as zero: looked at with small weights for {', '.join(zero)}"] * still
    if missed and issubclass(mixer.kind, Guest):
        said.append(f"not trained, for want of a gradient: {', '.join(missed)}")
    return "; ".join(said)


def is_causal(mixer: MixerUnderTest) -> None:
    """No output depends on a later token, and every output on its own."""
    built, _ = mixer.awake()
    n = mixer.short
    if n < 2:
        return
    for mode in (True, False):
        built.train(mode)
        x = mixer.example(length=n).requires_grad_()
        y = mixer.run(built, x)
        for t in sorted({0, min(3, n - 2), min(15, n - 2), n - 2} - {-1}):
            (gradient,) = torch.autograd.grad(y[:, t].pow(2).sum(), x, retain_graph=True)
            sizes = gradient.abs().amax(dim=(0, 2))
            _must(bool(sizes.isfinite().all()), f"the gradient of the output at token {t} is not finite")
            own = mode or issubclass(mixer.kind, Guest) or sizes[t] > 0  # dropout may hide a token from itself
            _must(own, f"the output at token {t} ignores token {t}")
            later = sizes[t + 1 :]
            slack = max(1e-12, mixer.rounding / 10)  # a transform may round across positions
            _must(
                later.max() <= slack * sizes.max(),
                f"the output at token {t} changes with token {t + 1 + int(later.argmax())}; mask what comes later",
            )
    _later_tokens_change_nothing(mixer, built)


def _later_tokens_change_nothing(mixer: MixerUnderTest, built: nn.Module) -> None:
    """Look at values, too: no gradient passes through what is sorted or rounded."""
    n = min(LENGTHS[-1], mixer.length)
    x, other, cut = mixer.example(length=n), mixer.example(9, length=n), n // 2
    with torch.no_grad():
        mixed = torch.cat([x[:, :cut], other[:, cut:]], dim=1)
        first, second = (mixer.run(built, z)[:, :cut] for z in (x, mixed))
    _close(second, first, max(1e-11, mixer.rounding), f"outputs before token {cut} change with what comes later")


def rows_are_independent(mixer: MixerUnderTest) -> None:
    """Rows of a batch do not see each other."""
    built, _ = mixer.awake()
    x = mixer.example(length=mixer.short)
    with torch.no_grad():
        built.eval()
        alone = torch.cat([mixer.run(built, row[None]) for row in x])
        _close(mixer.run(built, x), alone, mixer.rounding, "a row in a batch differs from the row alone")
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixer.run(built.train(), x)[0].pow(2).sum(), x)
    others, own = gradient[1:].abs().max(), gradient.abs().max()
    _must(
        others <= mixer.rounding / 100 * own,
        "in training a row changes with the others of its batch, as under BatchNorm; use a norm over channels",
    )


def is_the_same_twice(mixer: MixerUnderTest) -> None:
    """In evaluation equal inputs give equal outputs."""
    built, x = mixer.build().eval(), mixer.example(length=mixer.short)
    with torch.no_grad():
        first, second = mixer.run(built, x), mixer.run(built, x)
    _must(
        torch.equal(first, second),
        "equal inputs give other outputs: draw only while self.training, and carry nothing from call to call",
    )


def survives_saving(mixer: MixerUnderTest) -> None:
    """Weights that are saved and loaded into another one give the same outputs."""
    built, other = mixer.build(seed=1).eval(), mixer.build(seed=2).eval()
    x = mixer.example(length=mixer.short)
    with torch.no_grad():
        wanted = mixer.run(built, x)
        try:
            other.load_state_dict(built.state_dict())
        except RuntimeError as error:
            raise Broken(f"its state_dict does not load: {reason(error)}") from error
        found = mixer.run(other, x)
    _must(
        torch.equal(wanted, found),
        "loaded weights give other outputs: something drawn is no parameter and no buffer; register_buffer keeps it",
    )


def has_a_size(mixer: MixerUnderTest) -> str:
    """Its parameters and its memory are counted."""
    built = mixer.build()
    parameters = sum(p.numel() for p in built.parameters() if p.requires_grad)
    state = built.state_size(mixer.length)
    said = [f"{parameters:,} parameters", "state unknown" if state is None else f"state {state:,}"]
    deltanet = plugins.mixer("deltanet")
    ours = deltanet(-(-mixer.width // 8) * 8, deltanet.Config(name="deltanet"))
    own = sum(p.numel() for p in ours.parameters()), ours.state_size(mixer.length) or 1
    for what, size, of_ours in (("parameters", parameters, own[0]), ("state", state or 0, own[1])):
        if size > FAR_LARGER * of_ours:
            said.append(f"its {what} are {size / of_ours:.0f} times deltanet's at this width: compare at equal size")
    return "; ".join(said)


LAYER_PROMISES: tuple[Promise, ...] = (
    seeds_decide_weights,
    trains,
    leaves_the_process_alone,
    is_causal,
    rows_are_independent,
    is_the_same_twice,
    survives_saving,
    has_a_size,
)
"""What anybody's layer is held to before the first run."""


def _close(found: Tensor, expected: Tensor, tolerance: float, broken: str) -> None:
    """Compare relative to the largest value expected."""
    _must(found.shape == expected.shape, f"{broken}: {found.shape} against {expected.shape}")
    found, expected = found.detach(), expected.detach()
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    _must(error <= tolerance, f"{broken} by {error:.1e} of the largest value")


# ------------------------------------------------------------------ examples of a task


def shapes_types_and_ids_are_as_stated(task: Task) -> None:
    """Examples have the stated length and ids, in the smallest type, and score something."""
    _must(task.vocabulary > 1, f"vocabulary={task.vocabulary} leaves nothing to choose from; it must be at least 2")
    world = task.world(data.stream(0, "world"))
    found = task.sample(30, data.stream(0, "train"), "train", world)
    shape, wanted = found.inputs.shape, (30, task.input_length)
    _must(shape == found.targets.shape == wanted, f"inputs are {shape}, not {wanted}")
    smallest = token_type(task.vocabulary)
    _must(
        found.inputs.dtype == found.targets.dtype == smallest,
        f"inputs are {found.inputs.dtype} and targets {found.targets.dtype}, not {np.dtype(smallest)}: "
        "ids are whole numbers of the smallest type; see token_type",
    )
    scored = found.targets != IGNORE
    _must(
        bool(scored.any(axis=1).all()), "a sequence has no scored position: every one needs a target that is no IGNORE"
    )
    for label, ids in (("inputs", found.inputs), ("targets", found.targets[scored])):
        low, high = ids.min(), ids.max()
        _must(
            low >= 0 and high < task.vocabulary,
            f"{label} hold ids {low} to {high}, the vocabulary has {task.vocabulary}",
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


def splits_are_disjoint(task: Task) -> None:
    """No sequence stands in two splits."""
    made = data.make(task, 0, split_sizes(task))
    rows = [{r.tobytes() for r in getattr(made, s).inputs} for s in data.SPLITS]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        shared = len(rows[i] & rows[j])
        _must(shared == 0, f"{data.SPLITS[i]} and {data.SPLITS[j]} share {shared} sequences")


def split_sizes(task: Task) -> DataConfig:
    """Return sizes of splits to check a task with: of a real one all that it has."""
    if not isinstance(task, RealTask):
        return SIZES
    train, test = (len(part.inputs) for part in task.corpus())
    return DataConfig(train_examples=train - train // 4, validation_examples=train // 4, test_examples=test)


EXAMPLE_PROMISES: tuple[Promise, ...] = (shapes_types_and_ids_are_as_stated, splits_are_disjoint)
"""What anybody's generated task is held to before the first run."""
