"""Mamba: a selective state space with a decay for every channel and state.

    u, z = split(x W_in)                 u = silu(conv(u))
    dt, b, c = split(u W_x)              dt = softplus(dt W_dt + dt_bias)     a = -exp(a_log)
    S_t[d,n] = exp(dt[d] a[d,n]) S_{t-1}[d,n] + dt[d] u[d] b[n]
    y_t[d] = sum_n c[n] S_t[d,n] + skip[d] u[d]
    out = W_out (y * silu(z))

Legend: d of width * expand channels, N = state_dim, dt of rank dt_rank before W_dt; the paper's
Delta, A, B, C, D are dt, a, b, c, skip.
Source: Gu and Dao 2023, arXiv 2312.00752, algorithm 2, section 3.6 (a_log = log(1..N), the real
S4D start; dt in [0.001, 0.1]).
Departure: `expand` is 1 and state_dim 16 by default, 2,048 numbers at width 128 beside the window;
the authors' block is `expand: 2`, MAD's is `expand: 2, state_dim: 4`. a_log is kept as one axis:
weight decay is for matrices, and this is a table of rates.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import Mixer, MixerConfig, ShortConv, State, in_full, step_size_bias
from mad_efla.mixers._dynamics import Dynamics
from mad_kernels import selective_scan, selective_scan_step, skip_gate


class Mamba(Mixer):
    """Mamba's block."""

    class Config(MixerConfig):
        """Fields of Mamba.

        Attributes:
            expand: Inner width over model width.
            state_dim: State width N.
            dt_rank: Rank of the step sizes; none means width / 16, rounded up.
            conv: Taps of the causal depthwise convolution before silu; 0 for none.
            dt_min: Smallest initial step size.
            dt_max: Largest initial step size.
        """

        name: Literal["mamba"] = "mamba"
        expand: int = Field(1, ge=1)
        state_dim: int = Field(16, ge=1)
        dt_rank: int | None = Field(None, ge=1)
        conv: int = Field(4, ge=0)
        dt_min: float = Field(1e-3, gt=0)
        dt_max: float = Field(0.1, gt=0)

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        N = config.state_dim
        self.inner = d_model * config.expand
        rank = config.dt_rank or math.ceil(d_model / 16)
        self.widths = (rank, N, N)
        self.inp = nn.Linear(d_model, 2 * self.inner, bias=False)
        self.select = nn.Linear(self.inner, sum(self.widths), bias=False)
        self.dt = nn.Linear(rank, self.inner)
        nn.init.uniform_(self.dt.weight, -(rank**-0.5), rank**-0.5)
        self.dt.bias = nn.Parameter(step_size_bias(self.inner, config.dt_min, config.dt_max))
        self.a_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(self.inner))
        self.skip = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, d_model, bias=False)
        self.conv = ShortConv(self.inner, config.conv, bias=True, activation="silu")

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the scan."""
        u, z = self.inp(x).chunk(2, dim=-1)
        u = self.conv(u)
        y, _ = selective_scan(u, *self._selected(u))
        return self._output(y, u, z)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state and the empty window of the convolution."""
        S = torch.zeros(batch, self.inner, self.config.state_dim, device=device)
        return S, *self.conv.initial_state(batch, device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        u, z = self.inp(x).chunk(2, dim=-1)
        u, window = self.conv.step(u, state[1:])
        y, S = selective_scan_step(u, *self._selected(u), state[0])
        return self._output(y, u, z), (S, *window)

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how the state moves, every channel a head with one column of values."""
        u = self.conv(self.inp(x).chunk(2, dim=-1)[0])
        dt, a, b, c = self._selected(u)
        log_decay = dt[..., None] * a
        k, q = (z[..., None, :].expand(log_decay.shape) for z in (b, c))
        return Dynamics(log_decay=log_decay, k=k, v=(dt * u)[..., None], q=q)

    def mixing_flops(self, seq_len: int) -> int:
        """Count: decay one, write and read two each per number of state."""
        return 5 * self.inner * self.config.state_dim

    def _selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return dt, a, b and c."""
        dt, b, c = self.select(u).split(self.widths, dim=-1)
        return F.softplus(in_full(self.dt, dt)), -self.a_log.exp().view(self.inner, -1), b, c

    def _output(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        return self.out(skip_gate(y, u, z, self.skip))
