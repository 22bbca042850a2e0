"""A model, layer by layer: runs it, hands each layer to the pure functions, and names the scalars.

`diagnose` takes all there is; `training_scalars` takes the few that are cheap enough to log while a
model trains.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from mad_efla.mixers import Mixer
from mad_efla.mixers._dynamics import AttentionTrace, Dynamics
from mad_efla.spectrum.reach import Reach, effective_remembrance, gain_distance, perturbation_gain, reach
from mad_efla.spectrum.states import KeyOverlap, StateSpectrum, key_overlap, sampled, state_spectrum
from mad_efla.spectrum.transitions import (
    EULER_LIMIT,
    SATURATED,
    PerToken,
    Products,
    horizon,
    lyapunov,
    per_token,
    products,
    step_error,
)
from mad_efla.training.model import Backbone, LanguageModel, TokenEmbedding

_CUT = {"effective_remembrance_p25": 0.25, "effective_remembrance_p50": 0.5, "effective_remembrance_p75": 0.75}


class Gain(NamedTuple):
    """Gain of one token replaced by another, at `position`, and of noise on all embeddings."""

    token: Float[Tensor, "B L"]
    noise: Float[Tensor, "B L"]
    position: int = 0


# ------------------------------------------------------------------ a whole model


@dataclass(frozen=True, kw_only=True)
class LayerDiagnosis:
    """All of the above for one mixer; None where a quantity does not exist for its kind.

    Attributes:
        mixer: Its name.
        kind: Whether its memory is a state, attention, or neither.
        step: How a state's flow is integrated.
        finite: Whether what it computes from its input is finite; otherwise there is only `gain`.
        gain: From the mixer's input to its output, for the changes that arrive there.
    """

    mixer: str
    kind: Literal["state", "attention", "none"]
    gain: Gain
    finite: bool = True
    step: str | None = None
    tokens: PerToken | None = None
    products: Products | None = None
    lyapunov: Float[Tensor, "B H N"] | None = None
    state: StateSpectrum | None = None
    keys: KeyOverlap | None = None
    reach: Reach | None = None

    def scalars(self) -> dict[str, float]:
        """Reduce to numbers: means over batch, tokens and heads unless the name says otherwise.

        Those of the state are of the last token. `horizon` is that of the median singular value,
        `horizon_mean` and `horizon_slowest` of the others; `_p50` is the median over heads and
        starts, cut to the longest lag followed, and `_beyond` the share that lies beyond it.
        """
        found = {
            "finite": torch.tensor(float(self.finite)),
            "gain_token": _norm(self.gain.token),
            "gain_noise": _norm(self.gain.noise),
            "gain_distance": gain_distance(self.gain.token, self.gain.position),
        }
        if self.tokens is not None:
            found |= _token_scalars(self.tokens)
        if self.products is not None:
            found |= _horizon_scalars(self.products)
        if self.lyapunov is not None:
            found["lyapunov_max"] = self.lyapunov.max()
            found["lyapunov_p50"] = self.lyapunov.median()
        if self.state is not None:
            found |= _rank_scalars(self.state)
            found["state_stable_rank"] = self.state.stable_rank[-1]
            found["state_log_norm_max"] = self.state.log_singular_values[-1].max()
        if self.keys is not None:
            found["keys_condition_p50"] = self.keys.condition.median()
            found["keys_square_cosine"] = self.keys.square_cosine
            found["keys_effective_rank"] = self.keys.effective_rank
        if self.reach is not None:
            found |= _reach_scalars(self.reach)
        return {name: value.mean().item() for name, value in found.items()}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A model's layers, first one first, and what is seen from outside.

    Attributes:
        layers: Of each mixer.
        gain: From embeddings to logits.
        remembrance: By name, how much the last answer depends on the first quarter, half and three
            quarters of a sequence; see `effective_remembrance`. Empty for what is no language model.
    """

    layers: list[LayerDiagnosis]
    gain: Gain
    remembrance: dict[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """Return `spectrum/layer0/...` for each layer and `spectrum/...` for the model.

        The latter are means over the layers that have the quantity; the gains are the model's own.
        """
        layers = [layer.scalars() for layer in self.layers]
        names = {name: None for layer in layers for name in layer}
        found = {n: _mean([layer[n] for layer in layers if n in layer]) for n in names}
        found |= {"gain_token": _norm(self.gain.token).mean().item()}
        found |= {"gain_noise": _norm(self.gain.noise).mean().item()}
        found |= {"gain_distance": gain_distance(self.gain.token, self.gain.position).mean().item()}
        found |= self.remembrance
        for i, layer in enumerate(layers):
            found |= {f"layer{i}/{name}": value for name, value in layer.items()}
        return {f"spectrum/{name}": value for name, value in found.items()}


def finite(scalars: dict[str, float]) -> dict[str, float]:
    """Leave out what is infinite or no number, as an exponent of a memory that is wiped out."""
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


@torch.no_grad()
def diagnose(
    model: Backbone,
    tokens: Num[Tensor, "B L"],
    *,
    position: int | None = None,
    noise: float = 0.01,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    """Diagnose a model on a batch; neither its weights nor its mode are changed.

    Layers are taken one after the other; beside the dynamics of one, all mixers' inputs and
    outputs are kept, thrice.

    Args:
        model: In evaluation mode.
        tokens: Input; a few sequences are enough.
        position: The token replaced by another of the vocabulary; None takes the middle one. A
            real number is moved by the standard deviation of all inputs instead.
        noise: Size of the noise on the embeddings, as a share of theirs.
        generator: Draws noise and replacement, on the CPU; None takes a fixed seed.

    Raises:
        ValueError: If `position` is outside the sequence or the vocabulary has one token.
    """
    L = tokens.shape[1]
    position = L // 2 if position is None else position
    if not 0 <= position < L:
        raise ValueError(f"position={position} must lie in [0, {L}), the sequence's length")
    generator = generator or torch.Generator().manual_seed(0)
    other = tokens.clone()
    if tokens.is_floating_point():
        other[:, position] += tokens.std()
    else:
        other[:, position] = _others(model, tokens[:, position], generator)
    clean = _record(model, tokens)
    change = torch.randn(clean[0].x.shape, generator=generator).to(clean[0].x)
    change = change * (noise * clean[0].x.norm() / change.norm())
    replaced, noisy = _record(model, other), _record(model, tokens, change)
    gains = [Gain(_gain(c, r), _gain(c, n), position) for c, r, n in zip(clean, replaced, noisy, strict=True)]
    inputs = [passed.x for passed in clean]
    layers = map(_diagnose_layer, model.mixers, inputs[1:], gains[1:])
    return Diagnosis(layers=list(layers), gain=gains[0], remembrance=_remembrance(model, tokens, _CUT))


def _remembrance(model: Backbone, tokens: Tensor, cuts: dict[str, float]) -> dict[str, float]:
    L = tokens.shape[1]
    if not isinstance(model, LanguageModel) or L < 4:  # others know where a sequence starts
        return {}
    found = effective_remembrance(model, tokens, [int(share * L) for share in cuts.values()])
    return dict(zip(cuts, found.mean(-1).tolist(), strict=True))


def _others(model: Backbone, tokens: Int[Tensor, "B"], generator: torch.Generator) -> Tensor:
    """Draw another token of the vocabulary for each."""
    embed = model.stack.embed
    assert isinstance(embed, TokenEmbedding)
    V = embed.num_embeddings
    if V < 2:
        raise ValueError("a vocabulary of one token has no other to put in its place")
    shift = torch.randint(1, V, tokens.shape, generator=generator).to(tokens.device)
    return (tokens.long() + shift) % V


class _Passed(NamedTuple):
    """What went into a module, and what came out."""

    x: Tensor
    y: Tensor


def _record(model: Backbone, tokens: Tensor, change: Tensor | None = None) -> list[_Passed]:
    """Run a model on changed embeddings; return embeddings and logits, then each mixer's part."""
    embedded: list[Tensor] = []
    passed: list[_Passed] = []

    def embed(module, arguments, y):
        embedded.append(y if change is None else y + change)
        return embedded[0]

    def mix(module, arguments, y):
        passed.append(_Passed(arguments[0], y))

    hooks = [model.stack.embed.register_forward_hook(embed)]
    hooks += [mixer.register_forward_hook(mix) for mixer in model.mixers]
    try:
        logits = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return [_Passed(embedded[0], logits), *passed]


def _gain(clean: _Passed, changed: _Passed) -> Tensor:
    return perturbation_gain(clean.x, changed.x, clean.y, changed.y)


def _diagnose_layer(mixer: Mixer, x: Float[Tensor, "B L D"], gain: Gain) -> LayerDiagnosis:
    memory, name = mixer.dynamics(x), mixer.config.name
    if memory is None:
        return LayerDiagnosis(mixer=name, kind="none", gain=gain)
    kind = "attention" if isinstance(memory, AttentionTrace) else "state"
    if not _finite(memory):
        return LayerDiagnosis(mixer=name, kind=kind, gain=gain, finite=False)
    looked = reach(memory, sampled(x.shape[1]))
    if isinstance(memory, AttentionTrace):
        return LayerDiagnosis(mixer=name, kind=kind, gain=gain, reach=looked)
    return LayerDiagnosis(
        mixer=name,
        kind=kind,
        gain=gain,
        step=memory.step,
        tokens=per_token(memory),
        products=products(memory),
        lyapunov=lyapunov(memory),
        state=state_spectrum(memory),
        keys=key_overlap(memory),
        reach=looked,
    )


def _finite(memory: Dynamics | AttentionTrace) -> bool:
    tensors = {n: x for n, x in vars(memory).items() if isinstance(x, Tensor)}
    decay = tensors.pop("log_decay", None)
    return all(bool(x.isfinite().all()) for x in tensors.values()) and (decay is None or bool((decay < math.inf).all()))


def _token_scalars(tokens: PerToken) -> dict[str, Tensor]:
    found = _eigenvalue_scalars(tokens) | {
        "erase_mean": tokens.erase,
        "wiped": (tokens.erase > 1 - math.exp(-SATURATED)).double(),
    }
    if tokens.key_square is not None and tokens.beta is not None:
        found |= {"lambda_mean": tokens.key_square, "beta_mean": tokens.beta}
    if (x := tokens.x) is not None:
        found |= {"x_mean": x, "x_p50": x.median(), "x_max": x.max()}
        found |= {f"error_{step}": step_error(x, step) for step in ("euler", "rk2", "rk4")}
    return found


def _eigenvalue_scalars(tokens: PerToken) -> dict[str, Tensor]:
    found = {
        "eigenvalue_mean": tokens.eigenvalue,
        "eigenvalue_min": tokens.eigenvalue.min(),
        "eigenvalue_max": tokens.eigenvalue.max(),
    }
    if tokens.angle is not None:
        found["angle_mean"], found["angle_max"] = tokens.angle.abs(), tokens.angle.abs().max()
    if tokens.x is not None:
        found["saturated"] = (tokens.x > SATURATED).double()
        found["beyond_euler"] = (tokens.x > EULER_LIMIT).double()
    return found


def _horizon_scalars(products: Products) -> dict[str, Tensor]:
    found, longest = {}, float(products.lags[-1])
    for name, lags in horizon(products)._asdict().items():
        name = "horizon" if name == "median" else f"horizon_{name}"
        found[f"{name}_p50"] = lags.clamp_max(longest).median()
        found[f"{name}_beyond"] = lags.isinf().double()
    return found


def _rank_scalars(state: StateSpectrum) -> dict[str, Tensor]:
    return {"state_effective_rank": state.effective_rank[-1], "state_capacity_used": state.capacity_used[-1]}


def _reach_scalars(looked: Reach) -> dict[str, Tensor]:
    return {"reach_entropy": looked.entropy, "reach_distance": looked.distance}


# ------------------------------------------------------------------ while training


@torch.no_grad()
def training_scalars(model: Backbone, inputs: Tensor) -> dict[str, float]:
    """Take the scalars of `diagnose` that cost little: decay, horizon, rank, attention's reach.

    Names and definitions are those of `Diagnosis.scalars`, means over layers; horizons are followed
    over powers of two from two starts only, and interpolated between them. What is not finite is
    left out, and so is a layer that hands out no dynamics; what the last answer owes to the first half
    of a sequence is known of any. Nothing of the model is changed, no random number is drawn, and on a
    GPU only the forward passes run there.

    Args:
        model: A language model or an autoencoder.
        inputs: What it takes; two sequences are enough. Autocast holds for the forward pass alone.
    """
    device = inputs.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        layers = [
            _training_layer(mixer, x.float())
            for mixer, x in zip(model.mixers, _mixer_inputs(model, inputs), strict=True)
        ]
    means = [{name: value.mean().item() for name, value in layer.items()} for layer in layers]
    names = {name: None for layer in means for name in layer}
    found = {n: _mean([layer[n] for layer in means if n in layer]) for n in names}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        found |= _remembrance(model, inputs, {"effective_remembrance_p50": 0.5})
    return finite({f"spectrum/{name}": value for name, value in found.items()})


def _mixer_inputs(model: Backbone, inputs: Tensor) -> list[Tensor]:
    """Run a model; return what went into each mixer."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for m in model.mixers]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _training_layer(mixer: Mixer, x: Float[Tensor, "B L D"]) -> dict[str, Tensor]:
    if x.device.type != "cpu":  # token loops are quicker there, and no kernel is compiled for them
        mixer, x = copy.deepcopy(mixer).cpu(), x.cpu()
    with torch.autocast(x.device.type, enabled=False):
        memory = mixer.dynamics(x)
    if memory is None or not _finite(memory):
        return {}
    L = x.shape[1]
    if isinstance(memory, AttentionTrace):
        return _reach_scalars(reach(memory, sampled(L)))
    longest = max(1, L // 2)
    lags = sorted({longest, *(2**i for i in range(longest.bit_length()))})
    horizons = _horizon_scalars(products(memory, lags, starts=2))
    return {
        **_eigenvalue_scalars(per_token(memory)),
        **{name: horizons[name] for name in ("horizon_p50", "horizon_beyond")},
        **_rank_scalars(state_spectrum(memory, [L - 1])),
    }


def _norm(gain: Float[Tensor, "B L"]) -> Float[Tensor, "B"]:
    return gain.square().sum(-1).sqrt()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
