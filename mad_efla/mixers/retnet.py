"""Retention: a state that turns, and fades at a fixed rate of each head.

    q, k, v = silu(conv(x W))            gamma_h = 1 - 2^(-5 - h),  h = 0 ... H - 1
    S_t = gamma R S_{t-1} + k v^T        o_t = S_t^T q_t
    y = W_o (norm(o) * silu(x W_gate))

R turns each pair of key channels by a fixed angle, base^(-2i / Dk): the eigenvalues of the state's
transition are gamma exp(+- i angle). Nothing depends on the token. In the parallel form q and k
are turned by their position instead, as rotary positions do.

Legend: H heads, Dk = key_dim, Dv = value_dim, S the state [Dk, Dv] of a head.
Source: Sun et al. 2023, arXiv 2307.08621; angles of the rotary positions it refers to,
arXiv 2104.09864. Departures: by default a short convolution and silu on q, k and v, as in the delta
family; the published layer has neither, `conv: 0`. q is not multiplied by Dk^-1/2, which the output
norm would undo but for its eps. 8 heads of 16 x 16 at width 128, where the authors take values
twice as wide as keys. The norm has a weight.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import HeadsConfig, Mixer, RMSNorm, ShortConv, State, head_widths, split_heads, turn
from mad_efla.mixers._dynamics import Dynamics
from mad_kernels import delta_rule, delta_rule_step


class RetNet(Mixer):
    """Multi-scale retention."""

    class Config(HeadsConfig):
        """Fields of retention.

        Attributes:
            first_decay: The 5 in gamma; larger is nearer 1 in every head.
            rotary_base: Longest wavelength over 2 pi, in tokens.
            conv: Taps of a causal depthwise convolution and silu on q, k and v; 0 for neither.
            output_norm: RMSNorm over each head's output.
            output_gate: Multiply the output with silu(x W_gate).
        """

        name: Literal["retnet"] = "retnet"
        first_decay: float = Field(5.0, gt=0)
        rotary_base: float = Field(10_000.0, gt=1)
        conv: int = Field(4, ge=0)
        output_norm: bool = True
        output_gate: bool = True

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        H = config.heads
        self.Dk, self.Dv = head_widths(d_model, config)
        if self.Dk % 2:
            raise ValueError(f"key width {self.Dk} must be even: channels turn in pairs")
        self.widths = (H * self.Dk, H * self.Dk, H * self.Dv)
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=False)
        self.gate = nn.Linear(d_model, H * self.Dv, bias=False) if config.output_gate else None
        self.out = nn.Linear(H * self.Dv, d_model, bias=False)
        self.norm = RMSNorm(self.Dv, eps=1e-5) if config.output_norm else None
        activation = "silu" if config.conv else None
        self.conv = ShortConv(sum(self.widths), config.conv, activation=activation)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the parallel form."""
        q, k, v = self._heads(self.conv(self.qkv(x)))
        # In float64: in float32 an angle of thousands is off by more than the distances differ.
        angle = -torch.arange(x.shape[1], device=x.device)[:, None, None] * self._angles(x.device)
        o, _ = delta_rule(turn(q, angle), turn(k, angle), v, *self._strengths(v))
        return self._output(x, o)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state per head and the empty window of the convolution."""
        S = torch.zeros(batch, self.config.heads, self.Dk, self.Dv, device=device)
        return S, *self.conv.initial_state(batch, device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token; the state turns, so that no position is needed."""
        qkv, window = self.conv.step(self.qkv(x), state[1:])
        q, k, v = self._heads(qkv)
        S = turn(state[0].mT, self._angles(x.device)).mT
        o, S = delta_rule_step(q, k, v, *self._strengths(v), S)
        return self._output(x, o), (S, *window)

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how the state moves: decays and angles are constant."""
        q, k, v = self._heads(self.conv(self.qkv(x)))
        log_decay = self._strengths(v)[2][..., None].expand(k.shape)
        angle = self._angles(x.device).to(log_decay.dtype).expand(*k.shape[:-1], -1)
        return Dynamics(log_decay=log_decay, angle=angle, k=k, v=v, q=q)

    def mixing_flops(self, seq_len: int) -> int:
        """Count: decay one, write and read two each per number of state."""
        return 5 * self.config.heads * self.Dk * self.Dv

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(qkv, self.widths, self.config.heads)
        return q, k, v

    def _angles(self, device: torch.device) -> Float[Tensor, "half"]:
        pairs = torch.arange(0, self.Dk, 2, dtype=torch.float64, device=device)
        return self.config.rotary_base ** (-pairs / self.Dk)

    def _strengths(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return erase, write and log decay of every token: nothing, all, and the head's own."""
        powers = self.config.first_decay + torch.arange(self.config.heads, device=v.device)
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        log_decay = torch.log1p(-(2.0 ** -powers.double())).to(wide).expand(v.shape[:-1])
        return torch.zeros_like(log_decay), torch.ones_like(log_decay), log_decay

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o)
        o = rearrange(o, "... H Dv -> ... (H Dv)")
        if self.gate is not None:
            o = o * F.silu(self.gate(x))
        return self.out(o)
