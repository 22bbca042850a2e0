"""Preconditioned Gated DeltaNet: each key channel is written at a rate of its own.

    S_t = (I - beta (m k) k^T) a S_{t-1} + beta (m k) v^T,  |k| = 1    o_t = S_t^T q_t
    c_t = a_c c_{t-1} + beta_c k k                                     (per key channel)
    m = squash^(-s),   s = r / (1 + |r|),   r = log(c + eps) - center

c sums how much has come along each key channel: the diagonal of the keys' second moment. m turns
it into a factor in (1/squash, squash), small where much has come, as the diagonal of Newton's
step on the memory's loss; products without a sign are elementwise. With m = 1 it is Gated
DeltaNet. The body is that of the delta family, `delta.py`.

Legend: a, beta as in `gated_deltanet`; a_c, beta_c the same of their own weights; eps 1e-6;
`center` learned, one number per head.
Source: arXiv 2604.21100; the squash, its constants and initial weights from
`precond_gated_delta_rule` and its layer in flash-linear-attention. `squash` up to 2 leaves no
eigenvalue beyond 1 in size for beta in (0, 1). Departure: no output gate by default, as in
`gated_deltanet`. The state is Dk numbers per head larger.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import State, in_full, step_size_bias
from mad_efla.mixers.delta import Delta, Parts
from mad_kernels import delta_rule

_EPS = 1e-6


class PGDN(Delta):
    """A decaying delta rule with a diagonal preconditioner on what it writes."""

    class Config(Delta.Config):
        """Fields of preconditioned Gated DeltaNet: those of the delta family, less what it fixes.

        Attributes:
            squash: Largest factor on a channel; its inverse is the smallest.
        """

        name: str = "pgdn"
        keys: Literal["l2"] = "l2"
        step: Literal["euler"] = "euler"
        decay: Literal["separate", "channel"] = "separate"
        householders: Literal[1] = 1
        reflect: Literal[False] = False
        squash: float = Field(1.5, gt=1)

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        H = config.heads
        self.moment_beta = nn.Linear(d_model, H, bias=False)
        self.moment_decay = nn.Linear(d_model, H, bias=False)
        self.moment_a_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        self.moment_dt_bias = nn.Parameter(step_size_bias(H))
        self.center = nn.Parameter(torch.full((H,), -0.2))

    def parts(self, x: Float[Tensor, "B L D"]) -> Parts:
        """Compute all that the recurrence is run on."""
        return self._preconditioned(x, super().parts(x), None)[0]

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return zero states, that of the keys' moment second, and the convolution's window."""
        S, *window = super().initial_state(batch, device)
        return S, torch.zeros(batch, self.config.heads, 1, self.Dk, device=device), *window

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        S, c, *window = state
        qkv, window = self.conv.step(self.qkv(x), tuple(window))
        parts = self._parts(x[:, None], qkv[:, None].split(self.widths, dim=-1))
        parts, c = self._preconditioned(x[:, None], parts, c)
        o, S = self._read(parts, S)
        return self._output(x, o), (S, c, *window)

    def _preconditioned(self, x: Tensor, parts: Parts, c: Tensor | None) -> tuple[Parts, Tensor]:
        """Scale what is written; return the new parts, and the moment after the last token."""
        beta = torch.sigmoid(in_full(self.moment_beta, x))
        rate = F.softplus(in_full(self.moment_decay, x) + self.moment_dt_bias)
        log_decay, added = -self.moment_a_log.exp() * rate, beta[..., None] * parts.key.square()
        one = torch.ones_like(added[..., :1])  # a state of one row that only adds
        nothing = torch.zeros_like(beta)
        more = {"initial_state": c, "output_final_state": True}
        moment, last = delta_rule(one, one, added, nothing, one[..., 0], log_decay, **more)
        assert last is not None
        r = torch.log(moment + _EPS) - self.center[:, None]
        factor = torch.exp(-math.log(self.config.squash) * r / (1 + r.abs()))
        return parts._replace(written=factor * parts.key), last

    def _flow(self, x: Tensor, parts: Parts) -> tuple[None, None]:
        del x, parts
        return None, None
