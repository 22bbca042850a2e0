"""mLSTM: a matrix memory with an exponential input gate, a forget gate and a normaliser.

    q, k, v = silu(conv(x W))            i = exp(cap(x W_i + b_i))   f = sigmoid(cap(x W_f + b_f))
    S_t = f S_{t-1} + i k v^T            n_t = f n_{t-1} + i k               (per head)
    o_t = S_t^T q' / max(|n_t . q'|, 1)  q' = Dk^-1/2 q
    y = W_o (norm(o) * sigmoid(x W_gate))

The input gate has no upper end within a sequence: a token can outweigh all before it, which a
sigmoid cannot. The normaliser n divides by the weights' sum. cap(u) = c tanh(u / c).

Legend: H heads, Dk = key_dim, Dv = value_dim, S the state [Dk, Dv] of a head; the paper's C is S,
its c is `soft_cap`.
Source: Beck et al. 2024, arXiv 2405.04517; the layer, its caps and its norm (mean taken
out, no bias) are those of xLSTM 7B, Beck et al. 2025, arXiv 2503.13427; gates start as in the first
paper's code, W_i = W_f = 0, b_i from N(0, 0.1), b_f from 3 to 6 over the heads, as the later -10
for b_i leaves almost nothing in a short training. Departures: no running maximum m: with a cap of
15, exp is at most 3.3e6 and nothing overflows in float32, and the output does not depend on m. By
default a short convolution and silu on q, k and v; xLSTM 7B has neither, `conv: 0`. 8 heads of
16 x 16 at width 128. The state is Dk numbers per head larger, n.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import HeadsConfig, Mixer, ShortConv, State, head_widths, in_full, split_heads
from mad_efla.mixers._dynamics import Dynamics
from mad_kernels import delta_rule, delta_rule_step


class MLSTM(Mixer):
    """The matrix memory of xLSTM."""

    class Config(HeadsConfig):
        """Fields of the mLSTM.

        Attributes:
            soft_cap: Size that the logits of both gates stay under.
            conv: Taps of a causal depthwise convolution and silu on q, k and v; 0 for neither.
            output_norm: LayerNorm over each head's output.
            output_gate: Multiply the output with sigmoid(x W_gate).
        """

        name: Literal["mlstm"] = "mlstm"
        soft_cap: float = Field(15.0, gt=0, le=30)
        conv: int = Field(4, ge=0)
        output_norm: bool = True
        output_gate: bool = True

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        H = config.heads
        self.Dk, self.Dv = head_widths(d_model, config)
        self.widths = (H * self.Dk, H * self.Dk, H * self.Dv)
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=False)
        self.input, self.forget = nn.Linear(d_model, H), nn.Linear(d_model, H)
        nn.init.zeros_(self.input.weight)
        nn.init.normal_(self.input.bias, std=0.1)
        nn.init.zeros_(self.forget.weight)
        self.forget.bias.data.copy_(torch.linspace(3.0, 6.0, H))
        self.gate = nn.Linear(d_model, H * self.Dv, bias=False) if config.output_gate else None
        self.out = nn.Linear(H * self.Dv, d_model, bias=False)
        self.norm = nn.LayerNorm(self.Dv, eps=1e-6, bias=False) if config.output_norm else None
        activation = "silu" if config.conv else None
        self.conv = ShortConv(sum(self.widths), config.conv, activation=activation)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the parallel form; n is one more column of the state, of values 1."""
        q, k, v = self._heads(self.conv(self.qkv(x)))
        o, _ = delta_rule(q, k, F.pad(v, (0, 1), value=1.0), *self._strengths(x))
        return self._output(x, o)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state and normaliser per head, and the convolution's empty window."""
        H = self.config.heads
        S = torch.zeros(batch, H, self.Dk, self.Dv, device=device)
        n = torch.zeros(batch, H, self.Dk, 1, device=device)
        return S, n, *self.conv.initial_state(batch, device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        S, n, *window = state
        qkv, window = self.conv.step(self.qkv(x), tuple(window))
        q, k, v = self._heads(qkv)
        v = F.pad(v, (0, 1), value=1.0)
        o, S = delta_rule_step(q, k, v, *self._strengths(x), torch.cat([S, n], dim=-1))
        return self._output(x, o), (*S.split((self.Dv, 1), dim=-1), *window)

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how the state moves, without the normaliser that its reading is divided by."""
        q, k, v = self._heads(self.conv(self.qkv(x)))
        _, write, log_decay = self._strengths(x)
        k = write[..., None] * k
        return Dynamics(log_decay=log_decay[..., None].expand(k.shape), k=k, v=v, q=q)

    def mixing_flops(self, seq_len: int) -> int:
        """Count: decay one, write and read two each per number of state and normaliser."""
        return 5 * self.config.heads * self.Dk * (self.Dv + 1)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(qkv, self.widths, self.config.heads)
        return self.Dk**-0.5 * q, k, v.to(self.input.weight.dtype)

    def _strengths(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return erase, write and log decay: nothing, the input gate, and that of the forget."""
        cap = self.config.soft_cap
        logits = (cap * torch.tanh(in_full(gate, x) / cap) for gate in (self.input, self.forget))
        write, log_decay = next(logits).exp(), F.logsigmoid(next(logits))
        return torch.zeros_like(write), write, log_decay

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        o = o[..., :-1] / o[..., -1:].abs().clamp_min(1.0)
        if self.norm is not None:
            o = self.norm(o)
        o = rearrange(o, "... H Dv -> ... (H Dv)")
        if self.gate is not None:
            o = o * torch.sigmoid(self.gate(x))
        return self.out(o)
