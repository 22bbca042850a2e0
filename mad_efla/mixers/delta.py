"""The delta family: one mixer body, a few choices.

    q, k, v = silu(conv(x W))            beta = act(x W_beta + b)        (per head)
    S_t = a (I - alpha k k^T) S_{t-1} + alpha k v^T,   alpha = beta * r(beta |k|^2)
    o_t = S_t^T q_t                      y = W_o norm(o)

`keys` {raw, l2}: k as projected, or scaled to unit length. `step`: the factor r by which the flow
of a token is integrated (`euler` is the delta rule, `exact` EFLA; see `mad_kernels`). `beta`
{sigmoid, softplus, 2sigmoid}: the activation of the time to flow. `decay`: the factor a in (0, 1)
on the old state,

    none        a = 1
    separate    a = exp(-exp(a_log) softplus(x W_a + dt_bias)), before the step (Gated DeltaNet)
    channel     the same for each row of S, x W_1 W_2 in place of x W_a (KDA):
                S_t = (I - alpha k k^T) diag(a) S_{t-1} + alpha k v^T
    joint       decay and step as one flow, dS/ds = -(1 - a) S + beta k (v - a S^T k)^T (gated EFLA)

`householders` n: a token has n keys, values and betas and takes n steps one after the other; it
decays once, before the first (with `joint`, in the first one's flow), and reads after the last
(DeltaProduct). `reflect`: twice what the step erases and writes, alpha = 2 (1 - r) / |k|^2 for a
step that multiplies the state along k by r. It is then multiplied by 2 r - 1, in (-1, 1] for every
r in (0, 1]: EFLA's r = exp(-beta |k|^2) is positive and never changes a sign, its reflection can.
With euler on unit keys this is 2sigmoid in place of sigmoid.

`efla`, `deltanet`, `longhorn`, `gated_deltanet`, `gated_efla`, `kda` and `deltaproduct` are the
well-known corners; `gdn2`, `comba`, `pgdn` and `pkda` give the body another rule.

Legend: H heads, Dk = key_dim, Dv = value_dim, S the state [Dk, Dv] of a head, beta > 0.
Source: Yang et al. 2024, arXiv 2406.06484 (DeltaNet, and the body around the rule); Lei et al.,
arXiv 2512.12602 Eq. 15 (EFLA), Eq. 68 (joint); Yang et al. 2024, arXiv 2412.06464 (separate; a
starts as in Mamba-2); Kimi Team 2025, arXiv 2510.26692 (channel); Siems et al. 2025, arXiv
2502.10297 (householders); Grazzi et al. 2024, arXiv 2411.12537 (what negative eigenvalues are for;
`reflect` is our form of it). Departure: q is always scaled to unit length, as these authors do; it
is not multiplied by Dk^-1/2, which the output norm would undo but for its eps: without the
factor our eps of 1e-5 acts like 1e-5/Dk in their scale.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import HeadsConfig, Mixer, RMSNorm, ShortConv, State, head_widths, in_full, step_size_bias
from mad_efla.mixers._dynamics import Dynamics
from mad_kernels import delta_rule, delta_rule_step, dplr, dplr_step, gated_unit_key_form, l2_normalize, unit_key_form


class Parts(NamedTuple):
    """What a layer of the delta family takes from its input, step by step.

        S <- (I - written (erase key)^T) exp(log_decay) S + write written v^T

    A token is one entry of L, or `householders` of them, one after the other.

    Attributes:
        q: Queries of unit length.
        key: Keys of unit length.
        v: Values.
        erase: Share of what lies under the key that is erased; of one per channel, of each of
            the key's channels.
        write: Factor on what is written there.
        log_decay: Log of the decay of the old state, of each of its rows if it is one per channel;
            None where it does not decay.
        written: Where to erase and write; None for the key itself.
        read: What is read from the old state before it decays, to be erased; None for erase key
            from the state that has decayed.
    """

    q: Float[Tensor, "B L H Dk"]
    key: Float[Tensor, "B L H Dk"]
    v: Float[Tensor, "B L H Dv"]
    erase: Float[Tensor, "B L H *Dk"]
    write: Float[Tensor, "B L H"]
    log_decay: Float[Tensor, "B L H *Dk"] | None
    written: Float[Tensor, "B L H Dk"] | None = None
    read: Float[Tensor, "B L H Dk"] | None = None

    @property
    def one_key(self) -> bool:
        """Whether the step is a delta rule on a single key with a single decay."""
        strengths = (self.erase,) if self.log_decay is None else (self.erase, self.log_decay)
        plain = self.written is None and self.read is None
        return plain and all(x.ndim < self.key.ndim for x in strengths)

    def transition(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log decay, a and b of the transition diag(exp(log_decay)) + a b^T; see `dplr`."""
        log_decay, erase = self.log_decay, self.erase
        if log_decay is None:
            log_decay = torch.zeros_like(self.write)
        log_decay, erase = (
            x if x.ndim == self.key.ndim else x[..., None].expand(self.key.shape) for x in (log_decay, erase)
        )
        written = self.key if self.written is None else self.written
        if self.one_key:
            return log_decay, -(log_decay.exp() * erase) * written, self.key
        read = log_decay.exp() * erase * self.key if self.read is None else self.read
        return log_decay, -written, read

    @property
    def k(self) -> Float[Tensor, "*tokens H Dk"]:
        """What v is written under, by the strength of the writing."""
        return self.write[..., None] * (self.key if self.written is None else self.written)


class Delta(Mixer):
    """A mixer of the delta family."""

    class Config(HeadsConfig):
        """Fields of the delta family.

        Attributes:
            keys: `raw` or `l2`.
            step: How a token's flow is integrated.
            beta: Activation of beta.
            decay: How the old state decays; `joint` goes with the exact step.
            householders: Steps that a token takes one after the other, each on a key of its own.
            reflect: Erase and write twice as much.
            conv: Taps of the causal depthwise convolution before silu; 0 for none.
            output_norm: RMSNorm over each head's output.
            output_gate: Multiply the output with silu(x W_gate), or, `low_rank`, with
                sigmoid(x G_1 G_2) of rank Dv.
        """

        name: str = "delta"
        keys: Literal["raw", "l2"] = "raw"
        step: Literal["euler", "rk2", "rk4", "exact", "implicit", "kaczmarz"] = "exact"
        beta: Literal["sigmoid", "softplus", "2sigmoid"] = "sigmoid"
        decay: Literal["none", "separate", "channel", "joint"] = "none"
        householders: int = Field(1, ge=1)
        reflect: bool = False
        conv: int = Field(4, ge=0)
        output_norm: bool = True
        output_gate: bool | Literal["low_rank"] = False

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        H = config.heads
        if config.decay == "joint" and config.step != "exact":
            raise ValueError(
                f"decay=joint is one exact flow, not step={config.step}; take step: exact, or decay: separate"
            )
        self.Dk, self.Dv = head_widths(d_model, config)
        n = config.householders
        self.widths = (H * self.Dk, n * H * self.Dk, n * H * self.Dv)
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=False)
        self.beta = nn.Linear(d_model, n * H)
        self.out = nn.Linear(H * self.Dv, d_model, bias=False)
        self.gate = None
        if config.output_gate == "low_rank":
            self.gate = _low_rank(d_model, self.Dv, H * self.Dv)
        elif config.output_gate:
            self.gate = nn.Linear(d_model, H * self.Dv, bias=False)
        self.norm = RMSNorm(self.Dv, eps=1e-5) if config.output_norm else None
        self.conv = ShortConv(sum(self.widths), config.conv, activation="silu")
        if config.decay != "none":
            rows = H * self.Dk if config.decay == "channel" else H
            if config.decay == "channel":
                self.decay = _low_rank(d_model, self.Dv, rows)
            else:
                self.decay = nn.Linear(d_model, H, bias=False)
            self.a_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
            self.dt_bias = nn.Parameter(step_size_bias(rows))

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the parallel form."""
        return self.mix(x, self.parts(x))

    def parts(self, x: Float[Tensor, "B L D"]) -> Parts:
        """Compute all that the recurrence is run on."""
        return self._parts(x, self.conv.parts(self.qkv(x), self.widths))

    def mix(self, x: Float[Tensor, "B L D"], parts: Parts) -> Float[Tensor, "B L D"]:
        """Run the recurrence on parts, which an experiment may have changed."""
        if parts.one_key:
            o, _ = delta_rule(*parts[:6])
        else:
            o, _ = dplr(parts.q, parts.k, parts.v, *parts.transition())
        n = self.config.householders
        return self._output(x, o[:, n - 1 :: n])

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state per head and the empty window of the convolution."""
        S = torch.zeros(batch, self.config.heads, self.Dk, self.Dv, device=device)
        return S, *self.conv.initial_state(batch, device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        qkv, window = self.conv.step(self.qkv(x), state[1:])
        o, S = self._read(self._parts(x[:, None], qkv[:, None].split(self.widths, dim=-1)), state[0])
        return self._output(x, o), (S, *window)

    def mixing_flops(self, seq_len: int) -> int:
        """Count: recall, write and read two each per number of state, a decay one."""
        n = self.config.householders
        each = 4 * n + 2 + (self.config.decay != "none")
        return each * self.config.heads * self.Dk * self.Dv

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how the state moves; with `joint`, k k^T acts for the time a beta."""
        parts = self.parts(x)
        lambda_, beta = self._flow(x, parts)
        log_decay, a, b = parts.transition()
        return Dynamics(
            log_decay=log_decay,
            a=a,
            b=b,
            k=parts.k,
            v=parts.v,
            q=parts.q,
            step=self.config.step,
            key_square=lambda_,
            beta=beta,
            substeps=self.config.householders,
        )

    def _heads(self, qkv: Sequence[Tensor]) -> list[Tensor]:
        """Return q in H heads, k and v in n H, those of the first step first."""
        q, k, v = qkv
        return [
            rearrange(z, "... (H D) -> ... H D", D=width) for z, width in ((q, self.Dk), (k, self.Dk), (v, self.Dv))
        ]

    def _parts(self, x: Tensor, qkv: Sequence[Tensor]) -> Parts:
        q, k, v = self._heads(qkv)
        key, erase, write, log_decay = self._strengths(x, k)
        key, erase, write = map(self._in_turn, (key, erase, write))
        log_decay = None if log_decay is None else self._in_turn(log_decay)
        q, n = l2_normalize(q), self.config.householders
        if n > 1:
            q = q.repeat_interleave(n, dim=1)
        return Parts(q, key, self._in_turn(v), erase, write, log_decay)

    def _in_turn(self, z: Tensor) -> Tensor:
        """Give the n steps of a token a place each in L."""
        if self.config.householders == 1:
            return z
        return rearrange(z, "B L (n H) ... -> B (L n) H ...", n=self.config.householders)

    def _read(self, parts: Parts, S: Tensor) -> tuple[Tensor, Tensor]:
        """Take the steps of one token; return what it reads, and the state."""
        o = parts.v[:, 0]
        for j in range(self.config.householders):
            now = Parts._make(None if z is None else z[:, j] for z in parts)
            if now.one_key:
                o, S = delta_rule_step(*now[:6], S)
            else:
                o, S = dplr_step(now.q, now.k, now.v, *now.transition(), S)
        return o, S

    def _flow(self, x: Tensor, parts: Parts) -> tuple[Tensor | None, Tensor | None]:
        """Return |k|^2 and the time of each step; a rule that is no step of a flow has neither."""
        _, k, _ = self._heads(self.conv.parts(self.qkv(x), self.widths))
        if self.config.keys == "l2":
            k = l2_normalize(k)
        beta = self._in_turn(self._beta(x))
        if self.config.decay == "joint" and parts.log_decay is not None:
            beta = beta * (1 + parts.log_decay)  # its log decay is a - 1
        return self._in_turn(k.square().sum(-1)), beta

    def _strengths(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return key, erase, write and log decay of each step."""
        config, beta = self.config, self._beta(x)
        log_decay = None if config.decay == "none" else self._log_decay(x)
        if log_decay is not None and config.householders > 1:  # only before the first step
            still = (0, beta.shape[-1] - config.heads)
            log_decay = F.pad(log_decay, still if log_decay.ndim == beta.ndim else (0, 0, *still))
        if config.keys == "l2":
            k = l2_normalize(k)
        if config.decay == "joint" and log_decay is not None:
            (key, erase, write), log_decay = gated_unit_key_form(k, beta, log_decay.exp())
        elif config.keys == "l2" and config.step == "euler":
            key, erase, write = k, beta, beta
        else:
            key, erase, write = unit_key_form(k, beta, config.step)
        if config.reflect:
            erase, write = 2 * erase, 2 * write
        return key, erase, write, log_decay

    def _beta(self, x: Tensor) -> Tensor:
        logits = in_full(self.beta, x)
        if self.config.beta == "softplus":
            return F.softplus(logits)
        return torch.sigmoid(logits) * (2 if self.config.beta == "2sigmoid" else 1)

    def _log_decay(self, x: Tensor) -> Tensor:
        rate = F.softplus(in_full(self.decay, x) + self.dt_bias)
        if self.config.decay != "channel":
            return -self.a_log.exp() * rate
        rate = rearrange(rate, "... (H Dk) -> ... H Dk", H=self.config.heads)
        return -self.a_log.exp()[:, None] * rate

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o)
        o = rearrange(o, "... H Dv -> ... (H Dv)")
        if self.gate is not None:
            act = torch.sigmoid if self.config.output_gate == "low_rank" else F.silu
            o = o * act(self.gate(x))
        return self.out(o)


def _low_rank(width: int, rank: int, outer: int) -> nn.Sequential:
    """Build x W_1 W_2."""
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, outer, bias=False))
