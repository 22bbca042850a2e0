"""The delta family: one mixer body, three choices.

    q, k, v = silu(conv(x W))            beta = act(x W_beta + b)        (per head)
    S_t = (I - alpha k k^T) S_{t-1} + alpha k v^T,   alpha = beta * r(beta |k|^2)
    o_t = S_t^T q_t                      y = W_o norm(o)

`keys` {raw, l2}: k as projected, or scaled to unit length. `step`: the factor r by which the flow
of a token is integrated (`euler` is the delta rule, `exact` EFLA; see `mad_kernels`). `beta`
{sigmoid, softplus, 2sigmoid}: the activation of the time to flow. `efla` and `deltanet` are the two
well-known corners.

Legend: H heads, Dk = key_dim, Dv = value_dim, S the state [Dk, Dv] of a head, beta > 0.
Source: Yang et al. 2024, arXiv 2406.06484 (DeltaNet, and the body around the rule); Lei et al.,
arXiv 2512.12602 Eq. 15 (EFLA). Departure: q is always scaled to unit length, as both authors do;
it is not multiplied by Dk^-1/2, which the output norm would undo.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import Mixer, MixerConfig, RMSNorm, State
from mad_kernels import (
    delta_rule,
    delta_rule_step,
    short_conv,
    short_conv_step,
    unit_key_form,
)


class Delta(Mixer):
    """A mixer of the delta family."""

    class Config(MixerConfig):
        """Fields of the delta family.

        Attributes:
            heads: Heads H.
            key_dim: Key width Dk of a head; none means width / heads.
            value_dim: Value width Dv of a head; none means width / heads.
            keys: `raw` or `l2`.
            step: How a token's flow is integrated.
            beta: Activation of beta.
            conv: Taps of the causal depthwise convolution before silu; 0 for none.
            output_norm: RMSNorm over each head's output.
            output_gate: Multiply the output with silu(x W_gate).
        """

        name: str = "delta"
        heads: int = Field(8, ge=1)
        key_dim: int | None = Field(None, ge=1)
        value_dim: int | None = Field(None, ge=1)
        keys: Literal["raw", "l2"] = "raw"
        step: Literal["euler", "rk2", "rk4", "exact", "implicit", "kaczmarz"] = "exact"
        beta: Literal["sigmoid", "softplus", "2sigmoid"] = "sigmoid"
        conv: int = Field(4, ge=0)
        output_norm: bool = True
        output_gate: bool = False

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        H = config.heads
        if d_model % H and (config.key_dim is None or config.value_dim is None):
            raise ValueError(
                f"heads={H} must divide model.width={d_model}, or give key_dim and value_dim"
            )
        self.Dk = config.key_dim or d_model // H
        self.Dv = config.value_dim or d_model // H
        self.widths = (H * self.Dk, H * self.Dk, H * self.Dv)
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=False)
        self.beta = nn.Linear(d_model, H)
        self.out = nn.Linear(H * self.Dv, d_model, bias=False)
        self.gate = nn.Linear(d_model, H * self.Dv, bias=False) if config.output_gate else None
        self.norm = RMSNorm(self.Dv, eps=1e-5) if config.output_norm else None
        self.conv = None
        if config.conv:
            self.conv = nn.Parameter(torch.empty(sum(self.widths), config.conv))
            nn.init.uniform_(self.conv, -(config.conv**-0.5), config.conv**-0.5)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the parallel form."""
        qkv = self.qkv(x)
        if self.conv is None:
            qkv = F.silu(qkv)
        else:
            qkv, _ = short_conv(qkv, self.conv, activation="silu")
        q, k, v = self._heads(qkv)
        key, erase, write = self._scalars(k, self._beta(x))
        o, _ = delta_rule(_unit(q), key.to(q.dtype), v, erase, write)
        return self._output(x, o)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state per head and the empty window of the convolution."""
        S = torch.zeros(batch, self.config.heads, self.Dk, self.Dv, device=device)
        if self.conv is None:
            return (S,)
        return S, torch.zeros(batch, sum(self.widths), self.config.conv - 1, device=device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        qkv = self.qkv(x)
        if self.conv is None:
            window, qkv = (), F.silu(qkv)
        else:
            qkv, past = short_conv_step(qkv, self.conv, None, state[1], activation="silu")
            window = (past,)
        q, k, v = self._heads(qkv)
        key, erase, write = self._scalars(k, self._beta(x))
        o, S = delta_rule_step(_unit(q), key.to(q.dtype), v, erase, write, None, state[0])
        return self._output(x, o), (S, *window)

    def _heads(self, qkv: Tensor) -> list[Tensor]:
        parts = qkv.split(self.widths, dim=-1)
        return [rearrange(p, "... (H Dh) -> ... H Dh", H=self.config.heads) for p in parts]

    def _beta(self, x: Tensor) -> Tensor:
        # Gates stay in float32: bfloat16 has three digits, and beta multiplies itself along L.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(self.beta.weight.dtype), self.beta.weight, self.beta.bias)
        if self.config.beta == "softplus":
            return F.softplus(logits)
        return torch.sigmoid(logits) * (2 if self.config.beta == "2sigmoid" else 1)

    def _scalars(self, k: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.config.keys == "raw":
            return unit_key_form(k, beta, self.config.step)
        key = _unit(k)
        if self.config.step == "euler":
            return key, beta, beta
        return unit_key_form(key, beta, self.config.step)

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o)
        o = rearrange(o, "... H Dv -> ... (H Dv)")
        if self.gate is not None:
            o = o * F.silu(self.gate(x))
        return self.out(o)


def _unit(x: Tensor) -> Tensor:
    """Scale the last axis to unit length; zero stays zero."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-12)).to(x.dtype)
