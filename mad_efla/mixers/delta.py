"""The delta family: one mixer body, four choices.

    q, k, v = silu(conv(x W))            beta = act(x W_beta + b)        (per head)
    S_t = a (I - alpha k k^T) S_{t-1} + alpha k v^T,   alpha = beta * r(beta |k|^2)
    o_t = S_t^T q_t                      y = W_o norm(o)

`keys` {raw, l2}: k as projected, or scaled to unit length. `step`: the factor r by which the flow
of a token is integrated (`euler` is the delta rule, `exact` EFLA; see `mad_kernels`). `beta`
{sigmoid, softplus, 2sigmoid}: the activation of the time to flow. `decay`: the factor a in (0, 1)
on the old state,

    none        a = 1
    separate    a = exp(-exp(a_log) softplus(x W_a + dt_bias)), before the step (Gated DeltaNet)
    joint       decay and step as one flow, dS/ds = -(1 - a) S + beta k (v - a S^T k)^T (gated EFLA)

`efla`, `deltanet`, `longhorn`, `gated_deltanet` and `gated_efla` are the well-known corners.

Legend: H heads, Dk = key_dim, Dv = value_dim, S the state [Dk, Dv] of a head, beta > 0.
Source: Yang et al. 2024, arXiv 2406.06484 (DeltaNet, and the body around the rule); Lei et al.,
arXiv 2512.12602 Eq. 15 (EFLA), Eq. 68 (joint); Yang et al. 2024, arXiv 2412.06464 (separate; a
starts as in Mamba-2). Departure: q is always scaled to unit length, as these authors do; it is not
multiplied by Dk^-1/2, which the output norm would undo but for its eps: 1e-5 here is as 1e-5/Dk to
them.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.dynamics import Dynamics
from mad_efla.mixers import (
    HeadsConfig,
    Mixer,
    RMSNorm,
    ShortConv,
    State,
    head_widths,
    in_full,
    split_heads,
    step_size_bias,
)
from mad_kernels import (
    delta_rule,
    delta_rule_step,
    gated_unit_key_form,
    l2_normalize,
    unit_key_form,
)


class Parts(NamedTuple):
    """What a layer of the delta family takes from its input, token by token.

    Attributes:
        q: Queries of unit length.
        key: Keys of unit length.
        v: Values.
        erase: Share of what lies under the key that is erased.
        write: Factor on what is written there.
        log_decay: Log of the decay of the old state; None where it does not decay.
    """

    q: Float[Tensor, "B L H Dk"]
    key: Float[Tensor, "B L H Dk"]
    v: Float[Tensor, "B L H Dv"]
    erase: Float[Tensor, "B L H"]
    write: Float[Tensor, "B L H"]
    log_decay: Float[Tensor, "B L H"] | None


class Delta(Mixer):
    """A mixer of the delta family."""

    class Config(HeadsConfig):
        """Fields of the delta family.

        Attributes:
            keys: `raw` or `l2`.
            step: How a token's flow is integrated.
            beta: Activation of beta.
            decay: How the old state decays; `joint` goes with the exact step.
            conv: Taps of the causal depthwise convolution before silu; 0 for none.
            output_norm: RMSNorm over each head's output.
            output_gate: Multiply the output with silu(x W_gate).
        """

        name: str = "delta"
        keys: Literal["raw", "l2"] = "raw"
        step: Literal["euler", "rk2", "rk4", "exact", "implicit", "kaczmarz"] = "exact"
        beta: Literal["sigmoid", "softplus", "2sigmoid"] = "sigmoid"
        decay: Literal["none", "separate", "joint"] = "none"
        conv: int = Field(4, ge=0)
        output_norm: bool = True
        output_gate: bool = False

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        H = config.heads
        if config.decay == "joint" and config.step != "exact":
            raise ValueError(
                f"decay=joint is one exact flow, not step={config.step}; take step: exact, or "
                "decay: separate"
            )
        self.Dk, self.Dv = head_widths(d_model, config)
        self.widths = (H * self.Dk, H * self.Dk, H * self.Dv)
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=False)
        self.beta = nn.Linear(d_model, H)
        self.out = nn.Linear(H * self.Dv, d_model, bias=False)
        self.gate = nn.Linear(d_model, H * self.Dv, bias=False) if config.output_gate else None
        self.norm = RMSNorm(self.Dv, eps=1e-5) if config.output_norm else None
        self.conv = ShortConv(sum(self.widths), config.conv, activation="silu")
        if config.decay != "none":
            self.decay = nn.Linear(d_model, H, bias=False)
            self.a_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
            self.dt_bias = nn.Parameter(step_size_bias(H))

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the parallel form."""
        return self.mix(x, self.parts(x))

    def parts(self, x: Float[Tensor, "B L D"]) -> Parts:
        """Compute all that the recurrence is run on."""
        q, k, v = (self._heads_of(part) for part in self.conv.parts(self.qkv(x), self.widths))
        key, erase, write, log_decay = self._strengths(x, k)
        return Parts(l2_normalize(q), key, v, erase, write, log_decay)

    def mix(self, x: Float[Tensor, "B L D"], parts: Parts) -> Float[Tensor, "B L D"]:
        """Run the recurrence on parts, which an experiment may have changed."""
        o, _ = delta_rule(*parts)
        return self._output(x, o)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state per head and the empty window of the convolution."""
        S = torch.zeros(batch, self.config.heads, self.Dk, self.Dv, device=device)
        return S, *self.conv.initial_state(batch, device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        qkv, window = self.conv.step(self.qkv(x), state[1:])
        q, k, v = self._heads(qkv)
        key, erase, write, log_decay = self._strengths(x, k)
        o, S = delta_rule_step(l2_normalize(q), key, v, erase, write, log_decay, state[0])
        return self._output(x, o), (S, *window)

    def mixing_flops(self, seq_len: int) -> int:
        """Count: recall, write and read two each per number of state, a decay one."""
        each = 6 if self.config.decay == "none" else 7
        return each * self.config.heads * self.Dk * self.Dv

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how the state moves; with `joint`, k k^T acts for the time a beta."""
        q, k, v = self._heads(self.conv(self.qkv(x)))
        key, erase, write, log_decay = self._strengths(x, k)
        beta = self._beta(x)
        if log_decay is None:
            log_decay = torch.zeros_like(erase)
        elif self.config.decay == "joint":
            beta = beta * (1 + log_decay)  # its log decay is a - 1
        return Dynamics(
            log_decay=log_decay[..., None].expand(key.shape),
            a=-(log_decay.exp() * erase)[..., None] * key,
            b=key,
            k=write[..., None] * key,
            v=v,
            q=l2_normalize(q),
            step=self.config.step,
            key_square=(l2_normalize(k) if self.config.keys == "l2" else k).square().sum(-1),
            beta=beta,
        )

    def _heads_of(self, part: Tensor) -> Tensor:
        return rearrange(part, "... (H Dh) -> ... H Dh", H=self.config.heads)

    def _heads(self, qkv: Tensor) -> list[Tensor]:
        return split_heads(qkv, self.widths, self.config.heads)

    def _strengths(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return key, erase, write and log decay of each token."""
        config, beta = self.config, self._beta(x)
        log_decay = None if config.decay == "none" else self._log_decay(x)
        if config.keys == "l2":
            k = l2_normalize(k)
        if config.decay == "joint" and log_decay is not None:
            (key, erase, write), log_decay = gated_unit_key_form(k, beta, log_decay.exp())
        elif config.keys == "l2" and config.step == "euler":
            key, erase, write = k, beta, beta
        else:
            key, erase, write = unit_key_form(k, beta, config.step)
        return key, erase, write, log_decay

    def _beta(self, x: Tensor) -> Tensor:
        logits = in_full(self.beta, x)
        if self.config.beta == "softplus":
            return F.softplus(logits)
        return torch.sigmoid(logits) * (2 if self.config.beta == "2sigmoid" else 1)

    def _log_decay(self, x: Tensor) -> Tensor:
        return -self.a_log.exp() * F.softplus(in_full(self.decay, x) + self.dt_bias)

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o)
        o = rearrange(o, "... H Dv -> ... (H Dv)")
        if self.gate is not None:
            o = o * F.silu(self.gate(x))
        return self.out(o)
