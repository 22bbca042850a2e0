"""Sequence mixers: `(B, L, D) -> (B, L, D)`, causal. One file each; its name is the file's name.

What every mixer promises, and one test battery holds:

- the shape is kept, outputs depend on no later token and on no other row of the batch;
- every parameter gets a finite gradient, and the mixer's own initialisation is what it trains from.

`forward` is all that a mixer needs. What else it can do are abilities, and ours have all of them:

- decoding: `step` fed token by token from `initial_state` gives what `forward` gives at once;
- a known memory: `state_size` is the number of values carried from one token to the next;
- dynamics: how its memory moves, for `mad_efla.spectrum`.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.config import Section
from mad_efla.mixers._dynamics import AttentionTrace, Dynamics
from mad_kernels import add_rms_norm, rms_norm, short_conv, short_conv_split, short_conv_step
from mad_kernels.checks import working_dtype

State = tuple[Tensor, ...]
"""What a mixer carries between tokens; the first axis of every tensor is the batch."""


class Place(NamedTuple):
    """Where in a model a mixer stands.

    Attributes:
        layer: Its number among the mixers, from 0.
        depth: Mixers there are.
        length: Tokens of the longest sequence.
    """

    layer: int = 0
    depth: int = 1
    length: int = 128


class MixerConfig(Section):
    """The fields of a mixer; `name` says which."""

    name: str


class HeadsConfig(MixerConfig):
    """The fields of a mixer whose heads have a state [Dk, Dv] each.

    Attributes:
        heads: Heads H.
        key_dim: Key width Dk of a head; none means width / heads.
        value_dim: Value width Dv of a head; none means width / heads.
    """

    heads: int = Field(8, ge=1)
    key_dim: int | None = Field(None, ge=1)
    value_dim: int | None = Field(None, ge=1)


ConfigT = TypeVar("ConfigT", bound=MixerConfig)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in one pass over memory, alone or behind a residual."""

    weight: nn.Parameter
    eps: float

    def forward(self, x: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes D"]:
        """Normalise the last axis."""
        return rms_norm(x, self.weight, self.eps)

    def behind(
        self, x: Float[Tensor, "*axes D"], branch: Float[Tensor, "*axes D"] | None
    ) -> tuple[Float[Tensor, "*axes D"], Float[Tensor, "*axes D"]]:
        """Return the residual stream with a branch added to it, and its norm."""
        if branch is None:
            return x, self(x)
        return add_rms_norm(x, branch, self.weight, self.eps)


class ShortConv(nn.Module):
    """A causal depthwise convolution over a few tokens, and its window.

    Args:
        channels: Channels D.
        taps: Tokens seen, the present one included; 0 leaves only the activation.
        bias: Add one number per channel.
        activation: Applied to the output.
    """

    def __init__(self, channels: int, taps: int, *, bias: bool = False, activation: Literal["silu"] | None = None):
        super().__init__()
        self.channels, self.taps = channels, taps
        self.activation: Literal["silu"] | None = activation
        self.weight = nn.Parameter(torch.empty(channels, taps)) if taps else None
        self.bias = nn.Parameter(torch.empty(channels)) if taps and bias else None
        for p in self.parameters():
            nn.init.uniform_(p, -(taps**-0.5), taps**-0.5)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Convolve along L."""
        if self.weight is None:
            return self._activate(x)
        return short_conv(x, self.weight, self.bias, activation=self.activation)[0]

    def parts(self, x: Float[Tensor, "B L D"], widths: tuple[int, ...]) -> tuple[Float[Tensor, "B L _"], ...]:
        """Convolve along L and cut the channels; on a CPU in full precision, as loops take them."""
        if self.weight is None:
            return self._activate(x).split(list(widths), dim=-1)
        dtype = working_dtype(x) if x.device.type == "cpu" else x.dtype
        options = {"activation": self.activation, "dtype": dtype}
        return short_conv_split(x, self.weight, self.bias, widths, **options)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return the empty window: one tensor, or none where there are no taps."""
        if self.weight is None:
            return ()
        return (torch.zeros(batch, self.channels, self.taps - 1, device=device),)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Convolve one more token."""
        if self.weight is None:
            return self._activate(x), ()
        y, window = short_conv_step(x, self.weight, self.bias, *state, activation=self.activation)
        return y, (window,)

    def _activate(self, x: Tensor) -> Tensor:
        return x if self.activation is None else F.silu(x)


def step_size_bias(n: int, low: float = 1e-3, high: float = 0.1) -> Float[Tensor, " n"]:
    """Draw biases whose softplus, a step size, is log-uniform in [low, high].

    Raises:
        ValueError: If `low` is above `high`.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.6.
    """
    if low > high:
        raise ValueError(f"dt_min={low} must not be above dt_max={high}; swap them")
    dt = torch.empty(n).uniform_(math.log(low), math.log(high)).exp()
    return dt + torch.log(-torch.expm1(-dt))


def head_widths(d_model: int, config: "HeadsConfig") -> tuple[int, int]:
    """Return the widths Dk and Dv of a head.

    Raises:
        ValueError: The heads do not divide the model's width.
    """
    H = config.heads
    if d_model % H and (config.key_dim is None or config.value_dim is None):
        raise ValueError(f"heads={H} must divide model.width={d_model}, or give key_dim and value_dim")
    return config.key_dim or d_model // H, config.value_dim or d_model // H


def split_heads(
    x: Float[Tensor, "*axes HDs"], widths: tuple[int, ...], heads: int
) -> list[Float[Tensor, "*axes H Dh"]]:
    """Cut projections that lie side by side into their parts, and each into heads."""
    return [rearrange(part, "... (H Dh) -> ... H Dh", H=heads) for part in x.split(widths, dim=-1)]


def turn(x: Float[Tensor, "*axes D"], angle: Float[Tensor, "*angles half"]) -> Float[Tensor, "*axes D"]:
    """Turn channels 2i and 2i + 1 by angle_i, in radians; channels beyond the angles stay."""
    turned, rest = x[..., : 2 * angle.shape[-1]], x[..., 2 * angle.shape[-1] :]
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    turned = torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-1)
    return torch.cat([turned.flatten(-2), rest], dim=-1)


def in_full(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module in the precision of its weights, whatever autocast says.

    For gates: bfloat16 has three digits, and a gate multiplies itself along L.
    """
    with torch.autocast(x.device.type, enabled=False):
        return module(x.to(next(module.parameters()).dtype))


class Mixer(nn.Module, ABC, Generic[ConfigT]):
    """A causal sequence mixer.

    Args:
        d_model: Width of the model, D.
        config: The mixer's fields.

    Class attributes:
        Config: The model of its fields; without one it has none.
    """

    Config: ClassVar[type[MixerConfig]] = MixerConfig

    def __init__(self, d_model: int, config: ConfigT):
        super().__init__()
        self.d_model = d_model
        self.config = config

    @abstractmethod
    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L."""

    @classmethod
    def placed(cls, d_model: int, config: ConfigT, place: Place) -> "Mixer[ConfigT]":
        """Build it for a place in a model; mixers of ours are the same at every one."""
        del place
        return cls(d_model, config)

    @property
    def decodes(self) -> bool:
        """Whether it can go token by token: `initial_state` and `step` are defined."""
        return type(self).step is not Mixer.step and type(self).initial_state is not Mixer.initial_state

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return the state before the first token; an ability, together with `step`."""
        raise NotImplementedError(f"{self.config.name} has no `initial_state`: it cannot go token by token")

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token; an ability, together with `initial_state`."""
        raise NotImplementedError(f"{self.config.name} has no `step`: it cannot go token by token")

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics | AttentionTrace | None:
        """Return how the memory moves on this input, for `mad_efla.spectrum`.

        Mixers with a state of fixed size, and attention, override this; None is neither.
        """
        del x
        return None

    def flops(self, seq_len: int) -> int | None:
        """Count floating-point operations per token of `forward`, the mean over `seq_len` tokens.

        Two for each multiply-add; what is elementwise (norms, gates, activations) is left out.
        Every weight of two axes is used once per token; the rest is `mixing_flops`. None: unknown.
        """
        weights = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        mixing = self.mixing_flops(seq_len)
        return None if mixing is None else 2 * weights + mixing

    def mixing_flops(self, seq_len: int) -> int | None:
        """Count the operations per token by which tokens meet; None where that is unknown.

        A state that is read, erased and written, two operations per number for each of these,
        unless a mixer says otherwise.
        """
        state = self.state_size(seq_len)
        return None if state is None else 6 * state

    def state_size(self, seq_len: int) -> int | None:
        """Count the numbers carried to token `seq_len`, convolution included; None where unknown.

        Mixers whose state grows with the sequence override this, and so may one without `step`.
        """
        del seq_len
        return self.carried if self.decodes else None

    @property
    def carried(self) -> int:
        """Numbers of the state before the first token."""
        return sum(s.numel() for s in self.initial_state(1, torch.device("meta")))
