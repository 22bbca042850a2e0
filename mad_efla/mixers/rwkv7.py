"""RWKV-7's time mixing: the delta rule with a decay, a rate and a key to erase per channel.

    x^c_t = x_t + (x_{t-1} - x_t) mu_c             for each of c in r, w, k, v, a, g
    r, k, v = x^r W_r, x^k W_k, x^v W_v            g = sigmoid(x^g G_1) G_2
    w = exp(-e^(-1/2) sigmoid(w_0 + tanh(x^w W_1) W_2))
    a = sigmoid(a_0 + x^a A_1 A_2)                 kappa = k xi / |k xi|     (per head)
    k~ = k (1 + (a - 1) alpha)
    S_t = diag(w) S_{t-1} - (a kappa) (kappa^T S_{t-1}) + k~ v^T       o_t = S_t^T r_t
    y = W_o (g (norm(o) + (r . (rho k~)) v))

w in (0.545, 1) is the decay of each key channel; a is how much of what lies under kappa is erased,
also per channel; k~ is what is written under, apart from what is erased. The last term, the bonus,
gives the present token a weight of its own. Products without a sign are elementwise.

Legend: H heads of Dk x Dk; `removal` xi, `replacement` alpha, `bonus` rho, `mix` mu; the low-rank
maps are `decay` (w_0, W_1, W_2), `rate` (a_0, A_1, A_2) and `gate` (G_1, G_2); `conv` 2 is the
token shift, whose two taps are 1 - mu and mu.
Source: Peng et al. 2025, arXiv 2503.14456; ranks and initial weights from the authors'
training code, those of its first layer, as a mixer here does not know how deep it sits.
Departures: no value residual, which mixes in the first layer's values and which that layer lacks
as well. W_o, W_1, A_1 and G_1 start at small random values, not at zero, so that every weight has
a gradient from the first step on. The norm's eps is 1e-5 Dk, the authors' at their Dk of 64. w_0
learns at the same rate as the rest, where the authors double it.
"""

import math
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import Mixer, MixerConfig, State, in_full
from mad_efla.mixers._dynamics import Dynamics
from mad_kernels import dplr, dplr_step, head_norm_gate, l2_normalize, token_shift

# Powers of the channel's place in 1 - place^p, where mu starts.
_MIX = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


class RWKV7(Mixer):
    """RWKV-7's time mixing."""

    class Config(MixerConfig):
        """Fields of RWKV-7.

        Attributes:
            heads: Heads H.
            decay_rank: Rank of the map that gives w; none means the authors' rule.
            rate_rank: Rank of the map that gives a; none means the authors' rule.
            gate_rank: Rank of the map that gives g; none means the authors' rule.
            conv: 2 for the token shift, 0 for none.
        """

        name: Literal["rwkv7"] = "rwkv7"
        heads: int = Field(8, ge=1)
        decay_rank: int | None = Field(None, ge=1)
        rate_rank: int | None = Field(None, ge=1)
        gate_rank: int | None = Field(None, ge=1)
        conv: Literal[0, 2] = 2

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        D, H = d_model, config.heads
        if D % H or D == H:
            raise ValueError(f"heads={H} must divide model.width={D} into heads of 2 channels or more; change heads")
        self.Dk = D // H
        place = torch.arange(D) / D
        slope = torch.arange(D) / (D - 1) - 0.5
        bend = torch.linspace(-1, 1, self.Dk).repeat(H)  # across each head
        bend = bend * bend.abs()
        self.mix = nn.ParameterDict({c: nn.Parameter(1 - place**power) for c, power in _MIX.items() if config.conv})
        self.r, self.k, self.v, self.out = (_linear(D, s) for s in (0.5, 0.05, 0.5, 0.5))
        decay, rate = 6 * slope - 2.5 + 2.5 * bend, 0.4 * slope - 0.19 + 0.3 * bend
        self.decay = _LowRank(D, config.decay_rank or _rank(2.5, D), nn.Tanh(), decay)
        self.rate = _LowRank(D, config.rate_rank or _rank(2.5, D), nn.Identity(), rate)
        self.gate = _LowRank(D, config.gate_rank or _rank(5.0, D), nn.Sigmoid())
        self.removal = nn.Parameter(0.71 - 0.1 * slope)
        self.replacement = nn.Parameter(torch.full((D,), 1.02))
        self.bonus = nn.Parameter(torch.full((D,), -0.04))
        self.norm = nn.GroupNorm(H, D, eps=1e-5 * self.Dk)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the parallel form."""
        r, k, v, log_decay, erased, key, gate = self._parts(self._shifted(x))
        o, _ = dplr(r, k, v, log_decay, erased, key)
        return self._output(o, r, k, v, gate)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state per head and, for the token shift, a zero token."""
        S = torch.zeros(batch, self.config.heads, self.Dk, self.Dk, device=device)
        return (S, torch.zeros(batch, self.d_model, device=device)) if self.mix else (S,)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        S, *before = state
        r, k, v, log_decay, erased, key, gate = self._parts(self._shifted_token(x, *before))
        o, S = dplr_step(r, k, v, log_decay, erased, key, S)
        return self._output(o, r, k, v, gate), (S, *(x for _ in before))

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how the state moves, without the bonus of the present token."""
        r, k, v, log_decay, erased, key, _ = self._parts(self._shifted(x))
        return Dynamics(log_decay=log_decay, a=erased, b=key, k=k, v=v, q=r, step="euler")

    def mixing_flops(self, seq_len: int) -> int:
        """Count: decay one; recall, erase, write and read two each per number of state."""
        return 9 * self.config.heads * self.Dk**2

    def _shifted(self, x: Tensor) -> dict[str, Tensor]:
        """Return x^c of whole sequences for each of r, w, k, v, a, g."""
        if not self.mix:
            return dict.fromkeys(_MIX, x)
        return dict(zip(_MIX, token_shift(x, torch.stack([self.mix[c] for c in _MIX])), strict=True))

    def _shifted_token(self, x: Tensor, before: Tensor | None = None) -> dict[str, Tensor]:
        """Return x^c of one token behind another; without a shift there is none."""
        if before is None:
            return dict.fromkeys(_MIX, x)
        return {c: x + (before - x) * self.mix[c].to(x.dtype) for c in _MIX}

    def _parts(self, shifted: dict[str, Tensor]) -> list[Tensor]:
        """Return r, k~, v, log w, -a kappa and kappa in heads, and g."""
        r, k, v = self.r(shifted["r"]), self.k(shifted["k"]), self.v(shifted["v"])
        log_decay = -math.exp(-0.5) * torch.sigmoid(in_full(self.decay, shifted["w"]))
        rate = torch.sigmoid(in_full(self.rate, shifted["a"]))
        wide = k.to(rate.dtype)
        key = l2_normalize(self._heads(wide * self.removal), floor=1e-12)
        k = (wide * (1 + (rate - 1) * self.replacement)).to(k.dtype)
        parts = [self._heads(z) for z in (r, k, v, log_decay, rate)]
        return [*parts[:4], -parts[4] * key, key, in_full(self.gate, shifted["g"])]

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "... (H Dk) -> ... H Dk", H=self.config.heads)

    def _output(self, o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        o, r, k, v, g = (z.reshape(-1, self.config.heads, self.Dk) for z in (o, r, k, v, gate))
        weight, bias, bonus = (self._heads(z) for z in (self.norm.weight, self.norm.bias, self.bonus))
        return self.out(head_norm_gate(o, r, k, v, g, weight, bias, bonus, self.norm.eps).view_as(gate))


class _LowRank(nn.Module):
    """bias + activation(x W_1) W_2."""

    def __init__(self, width: int, rank: int, activation: nn.Module, bias: Tensor | None = None):
        super().__init__()
        self.inner = _linear(width, 0.05, rank)
        self.outer = nn.Linear(rank, width, bias=bias is not None)
        self.activation = activation
        nn.init.orthogonal_(self.outer.weight, gain=0.1 * max(1, rank / width) ** 0.5)
        if bias is not None:
            self.outer.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.activation(self.inner(x)))


def _linear(inner: int, scale: float, outer: int | None = None) -> nn.Linear:
    """Build a map whose weights are uniform within scale * inner^-1/2, as wide as its input."""
    linear = nn.Linear(inner, outer or inner, bias=False)
    nn.init.uniform_(linear.weight, -scale * inner**-0.5, scale * inner**-0.5)
    return linear


def _rank(factor: float, width: int) -> int:
    """Round factor * width^1/2 to a multiple of 32, at least 32."""
    return max(32, round(factor * width**0.5 / 32) * 32)
