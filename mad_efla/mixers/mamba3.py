"""Mamba-3: a selective state space with complex eigenvalues and a trapezoidal rule for its input.

    z, u, b, c = x W_in     dt, a, trap, theta = x W_gates
    b = norm(b) + bias_b    c = norm(c) + bias_c                       (the biases per head)
    dt = softplus(dt + dt_bias)   a = -tail(a)   lambda = sigmoid(trap)
    S_t = exp(dt a) R^-1 (S_{t-1} + (1 - lambda) dt b_{t-1} u_{t-1}^T) + lambda dt b u^T
    y_t = S_t^T c_t + d u_t      out = W_out (y * silu(z))

R turns pairs of rows, a share `rotary` of them all, by dt pi tanh(theta): the eigenvalues of the
transition are exp(dt a +- i dt pi tanh(theta)), which come near -1, so that a state can hold a
parity. A token's input is weighed between its own place and the next token's, by lambda.
tail(a) = 1 + a for a >= 0, 1 / (1 - a) below: positive, with a slope everywhere.

In the parallel form b and c are turned by the sum of all angles so far, which leaves decays alone,
and what a token finds, S_t without its own lambda dt b u^T, is a sum of one term per token:
its neighbour's two weights add up.

Legend: H heads of width P = width * expand / H, N = state_dim; b and c are shared by all heads but
for their biases; products without a sign of rows of the state are per pair.
Source: Lahoti et al. 2026, arXiv 2603.15569 (single input, single output); `tail`, the floor of
1e-4 under -a and initial values from the authors' code. Departures: `expand` 1 and state_dim 16, so
that 8 heads of 16 x 16 hold as many numbers as the others' memories; the authors' block is
`expand: 2, state_dim: 128` and heads of 64. `conv` puts Mamba-2's short convolution on u, b and c;
the authors have none. The last b and u are N + inner width more numbers of state.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import Mixer, MixerConfig, RMSNorm, ShortConv, State, in_full, step_size_bias, turn
from mad_efla.mixers._dynamics import Dynamics
from mad_kernels import delta_rule, skip_gate

_SLOWEST = 1e-4


class Mamba3(Mixer):
    """Mamba-3's block."""

    class Config(MixerConfig):
        """Fields of Mamba-3.

        Attributes:
            heads: Heads H.
            expand: Inner width over model width.
            state_dim: State width N.
            rotary: Share of the state's rows that turn in pairs.
            conv: Taps of a causal depthwise convolution before silu; 0 for neither.
            dt_min: Smallest initial step size.
            dt_max: Largest initial step size.
        """

        name: Literal["mamba3"] = "mamba3"
        heads: int = Field(8, ge=1)
        expand: int = Field(1, ge=1)
        state_dim: int = Field(16, ge=2, multiple_of=2)
        rotary: float = Field(0.5, gt=0, le=1)
        conv: int = Field(0, ge=0)
        dt_min: float = Field(1e-3, gt=0)
        dt_max: float = Field(0.1, gt=0)

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        H, N = config.heads, config.state_dim
        self.inner, pairs = d_model * config.expand, int(config.rotary * N) // 2
        if self.inner % H:
            raise ValueError(f"heads={H} must divide the inner width {self.inner}")
        if not pairs:
            raise ValueError(f"rotary={config.rotary} of state_dim={N} rows leaves no pair to turn")
        self.widths, self.gate_widths = (self.inner, self.inner + 2 * N), (H, H, H, pairs)
        self.inp = nn.Linear(d_model, sum(self.widths), bias=False)
        self.gates = nn.Linear(d_model, sum(self.gate_widths), bias=False)
        self.out = nn.Linear(self.inner, d_model, bias=False)
        self.norm_b, self.norm_c = RMSNorm(N, eps=1e-5), RMSNorm(N, eps=1e-5)
        self.bias_b, self.bias_c = (nn.Parameter(torch.ones(H * N)) for _ in "bc")
        self.d = nn.Parameter(torch.ones(H))
        self.dt_bias = nn.Parameter(step_size_bias(H, config.dt_min, config.dt_max))
        activation = "silu" if config.conv else None
        self.conv = ShortConv(self.widths[1], config.conv, bias=True, activation=activation)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the parallel form."""
        z, ubc = self.inp(x).split(self.widths, dim=-1)
        u, b, c = self._parts(self.conv(ubc))
        b, c = self._biased(b, c)
        log_decay, early, late, angle = self._gates(x)
        turned = angle.double().cumsum(1)  # a sum of thousands loses its digits in float32
        k, q = turn(b, turned), turn(c, turned)
        before = F.pad(late, (0, 0, 1, -1)) + early
        k, v = (F.pad(y, (0, 0, 0, 0, 1, -1)) for y in (k, u))  # of the token before
        write = log_decay.exp() * before
        found, _ = delta_rule(q, k, v, torch.zeros_like(write), write, log_decay)
        own = (late * (b * c).sum(-1))[..., None] * u
        return self._output(found + own, u, z)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state per head, no last b and u, and the empty window."""
        H, N = self.config.heads, self.config.state_dim
        S = torch.zeros(batch, H, N, self.inner // H, device=device)
        b, u = (torch.zeros(batch, width, device=device) for width in (N, self.inner))
        return S, b, u, *self.conv.initial_state(batch, device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token; the state turns, so that no sum of angles is kept."""
        S, b_last, u_last, *window = state
        z, ubc = self.inp(x).split(self.widths, dim=-1)
        ubc, window = self.conv.step(ubc, tuple(window))
        u, b, c = self._parts(ubc)
        now, read = self._biased(b, c)
        # With no token before, u_last is zero, whatever the bias makes of b_last.
        last, _ = self._biased(b_last[:, None], c)
        log_decay, early, late, angle = self._gates(x)
        S = S + (early[..., None] * last)[..., None] * self._heads(u_last)[..., None, :]
        S = log_decay.exp()[..., None, None] * turn(S.mT, -angle[..., None, :]).mT
        S = S + (late[..., None] * now)[..., None] * u[..., None, :]
        y = torch.einsum("bhnp,bhn->bhp", S, read.to(S.dtype)).to(u.dtype)
        return self._output(y, u, z), (S, b[:, 0], u.flatten(1), *window)

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how the state moves, as the next token finds it.

        A token's input is there with both its weights, where the token itself reads only lambda dt
        of it.
        """
        u, b, c = self._parts(self.conv(self.inp(x).split(self.widths, dim=-1)[1]))
        b, c = self._biased(b, c)
        log_decay, early, late, angle = self._gates(x)
        k = (late + F.pad(early, (0, 0, -1, 1)))[..., None] * b
        log_decay = log_decay[..., None].expand(k.shape)
        still = k.shape[-1] // 2 - angle.shape[-1]
        return Dynamics(log_decay=log_decay, angle=F.pad(-angle, (0, still)), k=k, v=u, q=c)

    def mixing_flops(self, seq_len: int) -> int:
        """Count: decay one, write and read two each per number of state."""
        return 5 * self.inner * self.config.state_dim

    def _parts(self, ubc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return u in heads, and b and c, normalised, of the one head that all share."""
        N = self.config.state_dim
        u, b, c = ubc.split((self.inner, N, N), dim=-1)
        return self._heads(u), self.norm_b(b)[..., None, :], self.norm_c(c)[..., None, :]

    def _heads(self, u: Tensor) -> Tensor:
        return rearrange(u, "... (H P) -> ... H P", H=self.config.heads)

    def _biased(self, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.config.heads, self.config.state_dim)
        return b + self.bias_b.view(shape), c + self.bias_c.view(shape)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log decay, the weights (1 - lambda) dt and lambda dt, and the angles."""
        dt, a, trap, theta = in_full(self.gates, x).split(self.gate_widths, dim=-1)
        dt, share = F.softplus(dt + self.dt_bias), torch.sigmoid(trap)
        tail = a.clamp_min(0) + 1 / (1 - a.clamp_max(0))
        angle = dt[..., None] * (math.pi * torch.tanh(theta))[..., None, :]
        return -tail.clamp_min(_SLOWEST) * dt, (1 - share) * dt, share * dt, angle

    def _output(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        return self.out(skip_gate(y.flatten(-2), u.flatten(-2), z, self.d.repeat_interleave(u.shape[-1])))
