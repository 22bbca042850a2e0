"""Gated linear attention: a state whose key channels forget, each at its own rate.

    q, k, v = silu(conv(x W))            log alpha = log_sigmoid(x W_1 W_2 + b) / temperature
    S_t = diag(alpha_t) S_{t-1} + k v^T  o_t = S_t^T q_t
    y = W_o (norm(o) * silu(x W_gate))

alpha is one factor in (0, 1) per head and key channel; W_1 W_2 has rank `gate_rank`, and the
temperature keeps alpha near 1. Nothing is erased: what is under a key only fades, at a rate that
the token chooses.

Legend: H heads, Dk = key_dim, Dv = value_dim, S the state [Dk, Dv] of a head; the paper's tau is
`temperature`, its W_alpha^1 and W_alpha^2 are `decay`, its r_t is silu(x W_gate).
Source: Yang et al. 2023, arXiv 2312.06635, section 4; widths of the gate and initial weights from
the code that came with it.
Departures: by default a short convolution and silu on q, k and v, as in the delta family; the
published layer has neither, `conv: 0`. q is not multiplied by Dk^-1/2, which the output norm would
undo but for its eps: without the factor our eps of 1e-5 acts like 1e-5/Dk in their scale. The norm
is RMSNorm and the gate has no bias, both as in that code. 8 heads of 16 x 16 at width 128, where the
authors take 4 heads and keys half as wide as values.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import HeadsConfig, Mixer, RMSNorm, ShortConv, State, head_widths, in_full, split_heads
from mad_efla.mixers._dynamics import Dynamics
from mad_kernels import dplr, dplr_step

_GAIN = 2**-2.5  # of the authors' Glorot initialisation


class GLA(Mixer):
    """Gated linear attention."""

    class Config(HeadsConfig):
        """Fields of gated linear attention.

        Attributes:
            gate_rank: Rank of the map that gives the decay.
            temperature: What log alpha is divided by.
            conv: Taps of a causal depthwise convolution and silu on q, k and v; 0 for neither.
            output_norm: RMSNorm over each head's output.
            output_gate: Multiply the output with silu(x W_gate).
        """

        name: Literal["gla"] = "gla"
        gate_rank: int = Field(16, ge=1)
        temperature: float = Field(16.0, gt=0)
        conv: int = Field(4, ge=0)
        output_norm: bool = True
        output_gate: bool = True

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        H = config.heads
        self.Dk, self.Dv = head_widths(d_model, config)
        self.widths = (H * self.Dk, H * self.Dk, H * self.Dv)
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=False)
        self.decay = nn.Sequential(
            nn.Linear(d_model, config.gate_rank, bias=False), nn.Linear(config.gate_rank, H * self.Dk)
        )
        self.gate = nn.Linear(d_model, H * self.Dv, bias=False) if config.output_gate else None
        self.out = nn.Linear(H * self.Dv, d_model, bias=False)
        for linear in (*self.decay, self.gate, self.out):
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight, gain=_GAIN)
        for weight in self.qkv.weight.data.split(self.widths):
            nn.init.xavier_uniform_(weight, gain=_GAIN)
        self.norm = RMSNorm(self.Dv, eps=1e-5) if config.output_norm else None
        activation = "silu" if config.conv else None
        self.conv = ShortConv(sum(self.widths), config.conv, activation=activation)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the parallel form."""
        o, _ = dplr(*self._heads(self.conv(self.qkv(x))), self._log_decay(x))
        return self._output(x, o)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state per head and the empty window of the convolution."""
        S = torch.zeros(batch, self.config.heads, self.Dk, self.Dv, device=device)
        return S, *self.conv.initial_state(batch, device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        qkv, window = self.conv.step(self.qkv(x), state[1:])
        o, S = dplr_step(*self._heads(qkv), self._log_decay(x), None, None, state[0])
        return self._output(x, o), (S, *window)

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how the state moves: a decay per key channel."""
        q, k, v = self._heads(self.conv(self.qkv(x)))
        return Dynamics(log_decay=self._log_decay(x), k=k, v=v, q=q)

    def mixing_flops(self, seq_len: int) -> int:
        """Count: decay one, write and read two each per number of state."""
        return 5 * self.config.heads * self.Dk * self.Dv

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(qkv, self.widths, self.config.heads)
        return q, k, v

    def _log_decay(self, x: Tensor) -> Tensor:
        log_alpha = F.logsigmoid(in_full(self.decay, x)) / self.config.temperature
        return rearrange(log_alpha, "... (H Dk) -> ... H Dk", H=self.config.heads)

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o)
        o = rearrange(o, "... H Dv -> ... (H Dv)")
        if self.gate is not None:
            o = o * F.silu(self.gate(x))
        return self.out(o)
