"""Linear attention: a state that only adds, the delta rule without erasure.

    q, k, v = conv(x W)            phi(u) = elu(u) + 1
    S_t = S_{t-1} + phi(k) v^T     z_t = z_{t-1} + phi(k)
    o_t = S_t^T phi(q)             with `normalizer`, divided by z_t . phi(q)
    y = W_o norm(o)

Legend: H heads, Dk = key_dim, Dv = value_dim, S the state [Dk, Dv] of a head, z its normaliser.
Source: Katharopoulos et al. 2020, arXiv 2006.16236, Eq. 7, 16-20. It runs as the delta rule with
erase 0 and write 1; z is one more column of values, all 1.
Departures: by default a short convolution and an output norm, as in the delta family, and no
normaliser: the norm undoes any factor on a head's output (but for its eps), and z would be Dk more
numbers of state.
The published layer is `normalizer: true, output_norm: false, conv: 0`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import HeadsConfig, Mixer, RMSNorm, ShortConv, State, head_widths, split_heads
from mad_efla.mixers._dynamics import Dynamics
from mad_kernels import delta_rule, delta_rule_step


class LinearAttention(Mixer):
    """Linear attention with positive features."""

    class Config(HeadsConfig):
        """Fields of linear attention.

        Attributes:
            normalizer: Divide by the weights' sum.
            conv: Taps of a causal depthwise convolution on q, k and v; 0 for none.
            output_norm: RMSNorm over each head's output.
        """

        name: Literal["linear_attention"] = "linear_attention"
        normalizer: bool = False
        conv: int = Field(4, ge=0)
        output_norm: bool = True

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        H = config.heads
        self.Dk, self.Dv = head_widths(d_model, config)
        self.widths = (H * self.Dk, H * self.Dk, H * self.Dv)
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=False)
        self.out = nn.Linear(H * self.Dv, d_model, bias=False)
        self.norm = RMSNorm(self.Dv, eps=1e-5) if config.output_norm else None
        self.conv = ShortConv(sum(self.widths), config.conv)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the parallel form."""
        q, k, v = self._parts(self.conv(self.qkv(x)))
        o, _ = delta_rule(q, k, v, *_strengths(v))
        return self._output(o)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state per head and the empty window of the convolution."""
        columns = self.Dv + self.config.normalizer
        S = torch.zeros(batch, self.config.heads, self.Dk, columns, device=device)
        return S, *self.conv.initial_state(batch, device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        qkv, window = self.conv.step(self.qkv(x), state[1:])
        q, k, v = self._parts(qkv)
        o, S = delta_rule_step(q, k, v, *_strengths(v), None, state[0])
        return self._output(o), (S, *window)

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how the state moves: nothing is forgotten."""
        q, k, v = self._parts(self.conv(self.qkv(x)))
        return Dynamics(log_decay=torch.zeros_like(k), k=k, v=v, q=q)

    def mixing_flops(self, seq_len: int) -> int:
        """Count: write and read, two each per number of state."""
        return 4 * self.config.heads * self.Dk * (self.Dv + self.config.normalizer)

    def _parts(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(qkv, self.widths, self.config.heads)
        if self.config.normalizer:
            v = F.pad(v, (0, 1), value=1.0)
        return F.elu(q) + 1, F.elu(k) + 1, v

    def _output(self, o: Tensor) -> Tensor:
        if self.config.normalizer:
            o = o[..., :-1] / o[..., -1:]
        if self.norm is not None:
            o = self.norm(o)
        return self.out(rearrange(o, "... H Dv -> ... (H Dv)"))


def _strengths(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return erase and write of every token: nothing and all."""
    return v.new_zeros(v.shape[:-1]), v.new_ones(v.shape[:-1])
