"""Mamba-2: a selective state space with one decay per head, in its matrix form (SSD).

    z, xbc, dt = x W_in                  xbc = silu(conv(xbc)),  u, b, c = split(xbc)
    dt = softplus(dt + dt_bias)          a = -exp(a_log)
    S_t = exp(dt a) S_{t-1} + dt b u^T   y_t = S_t^T c_t + d u_t
    out = W_out norm(y * silu(z))

Legend: H heads of width P = width * expand / H, N = state_dim; b and c are shared by all heads.
Source: Dao and Gu 2024, arXiv 2405.21060, section 7.
Departure: `expand` is 1 by default and state_dim 16, so that 8 heads of 16 x 16 hold as many
numbers as the delta family's; the authors' block is `expand: 2, state_dim: 64` and more.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import Mixer, MixerConfig, RMSNorm, ShortConv, State, step_size_bias
from mad_efla.mixers._dynamics import Dynamics
from mad_kernels import skip_gate, ssd, ssd_step


class Mamba2(Mixer):
    """Mamba-2's block."""

    class Config(MixerConfig):
        """Fields of Mamba-2.

        Attributes:
            heads: Heads H.
            expand: Inner width over model width.
            state_dim: State width N.
            conv: Taps of the causal depthwise convolution before silu; 0 for none.
            output_norm: RMSNorm over the gated output.
            dt_min: Smallest initial step size.
            dt_max: Largest initial step size.
        """

        name: Literal["mamba2"] = "mamba2"
        heads: int = Field(8, ge=1)
        expand: int = Field(1, ge=1)
        state_dim: int = Field(16, ge=1)
        conv: int = Field(4, ge=0)
        output_norm: bool = True
        dt_min: float = Field(1e-3, gt=0)
        dt_max: float = Field(0.1, gt=0)

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        H, N = config.heads, config.state_dim
        self.inner = d_model * config.expand
        if self.inner % H:
            raise ValueError(f"heads={H} must divide the inner width {self.inner}")
        self.widths = (self.inner, self.inner + 2 * N, H)
        self.inp = nn.Linear(d_model, sum(self.widths), bias=False)
        self.out = nn.Linear(self.inner, d_model, bias=False)
        self.norm = RMSNorm(self.inner, eps=1e-5) if config.output_norm else None
        self.d = nn.Parameter(torch.ones(H))
        self.a_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(step_size_bias(H, config.dt_min, config.dt_max))
        self.conv = ShortConv(self.widths[1], config.conv, bias=True, activation="silu")

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L with the matrix form."""
        z, xbc, dt = self.inp(x).split(self.widths, dim=-1)
        N = self.config.state_dim
        u, b, c = self._heads(*self.conv.parts(xbc, (self.inner, N, N)))
        y, _ = ssd(u, self._dt(dt), -self.a_log.exp(), b, c)
        return self._output(y, u, z)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return a zero state per head and the empty window of the convolution."""
        H, N = self.config.heads, self.config.state_dim
        S = torch.zeros(batch, H, N, self.inner // H, device=device)
        return S, *self.conv.initial_state(batch, device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        z, xbc, dt = self.inp(x).split(self.widths, dim=-1)
        xbc, window = self.conv.step(xbc, state[1:])
        u, b, c = self._parts(xbc)
        y, S = ssd_step(u, self._dt(dt), -self.a_log.exp(), b, c, state[0])
        return self._output(y, u, z), (S, *window)

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how the state moves."""
        _, xbc, dt = self.inp(x).split(self.widths, dim=-1)
        u, b, c = self._parts(self.conv(xbc))
        dt = self._dt(dt)[..., None]
        k = dt * b
        log_decay = -dt * self.a_log.exp()[:, None]
        return Dynamics(log_decay=log_decay.expand(k.shape), k=k, v=u, q=c.expand(k.shape))

    def mixing_flops(self, seq_len: int) -> int:
        """Count: decay one, write and read two each per number of state."""
        return 5 * self.inner * self.config.state_dim

    def _parts(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        N = self.config.state_dim
        return self._heads(*xbc.split((self.inner, N, N), dim=-1))

    def _heads(self, u: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = rearrange(u, "... (H P) -> ... H P", H=self.config.heads)
        return u, b[..., None, :], c[..., None, :]

    def _dt(self, dt: Tensor) -> Tensor:
        return F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)

    def _output(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        y = skip_gate(y.flatten(-2), u.flatten(-2), z, self.d.repeat_interleave(u.shape[-1]))
        return self.out(y if self.norm is None else self.norm(y))
