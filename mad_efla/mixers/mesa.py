"""Mesa layer: the best linear map from the keys so far to their values, solved at every token.

    H_t = a H_{t-1} + beta k k^T,  |k| = 1     G_t = a G_{t-1} + beta k v^T       (per head)
    o_t = G_t^T (H_t + Lambda)^-1 q_t          Lambda = softplus(ridge) + 1/4     (per key channel)

G (H + Lambda)^-1 minimises the sum of all |S^T k_s - v_s|^2, weighed by what beta and a have left
of them, plus a ridge. The delta rule, Kaczmarz' and EFLA's are each one step towards that minimum
per token, so this is the bound of what such rules can recall. It costs a solve of Dk unknowns per
token. The body is that of the delta family, `delta.py`.

Legend: a, beta as in `gated_deltanet`; `decay: none` leaves a = 1, recursive least squares.
Source: von Oswald et al. 2025, arXiv 2506.05233; Lambda from the layer in
flash-linear-attention. Departures: solved by Cholesky's method where the authors take up to 30
steps of conjugate gradients; a as in Gated DeltaNet here, where they have a sigmoid; v goes through
convolution and silu as q and k do. 16 heads, so that H and G of a layer are 2,048 numbers at width
128. All H_t of a sequence are kept at once: Dk^2 numbers per head and token.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import State
from mad_efla.mixers._dynamics import Dynamics
from mad_efla.mixers.delta import Delta, Parts
from mad_kernels import delta_rule

_FLOOR = 0.25  # of Lambda


class Mesa(Delta):
    """Least squares with a ridge, at every token."""

    class Config(Delta.Config):
        """Fields of the Mesa layer: those of the delta family, less what it fixes.

        Attributes:
            ridge: Where Lambda starts.
        """

        name: Literal["mesa"] = "mesa"
        heads: int = Field(16, ge=1)
        keys: Literal["l2"] = "l2"
        step: Literal["euler"] = "euler"
        decay: Literal["none", "separate"] = "separate"
        householders: Literal[1] = 1
        reflect: Literal[False] = False
        ridge: float = Field(1.0, gt=_FLOOR)

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        start = torch.tensor(config.ridge - _FLOOR).expm1().log()
        self.ridge = nn.Parameter(start.repeat(config.heads * self.Dk))

    def mix(self, x: Float[Tensor, "B L D"], parts: Parts) -> Float[Tensor, "B L D"]:
        """Run the recurrence on parts, which an experiment may have changed."""
        moments, _ = self._moments(parts, None)
        o, _ = _recall(parts._replace(q=self._solve(parts.q, moments)), None)
        return self._output(x, o)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return zero G and H per head and the empty window of the convolution."""
        G, *window = super().initial_state(batch, device)
        H = torch.zeros(batch, self.config.heads, 1, self.Dk**2, device=device)
        return G, H, *window

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""
        G, H, *window = state
        qkv, window = self.conv.step(self.qkv(x), tuple(window))
        parts = self._parts(x[:, None], qkv[:, None].split(self.widths, dim=-1))
        moments, H = self._moments(parts, H)
        o, G = _recall(parts._replace(q=self._solve(parts.q, moments)), G)
        return self._output(x, o[:, 0]), (G, H, *window)

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics:
        """Return how G moves, read with what the solve makes of the query."""
        parts = self.parts(x)
        log_decay = torch.zeros_like(parts.write) if parts.log_decay is None else parts.log_decay
        return Dynamics(
            log_decay=log_decay[..., None].expand(parts.key.shape),
            k=parts.k,
            v=parts.v,
            q=self._solve(parts.q, self._moments(parts, None)[0]),
        )

    def mixing_flops(self, seq_len: int) -> int:
        """Count: decay one and write two per number of H and G; read; factor and solve."""
        Dk, Dv = self.Dk, self.Dv
        decay = self.config.decay != "none"
        updates = (2 + decay) * (Dk**2 + Dk * Dv) + 2 * Dk * Dv
        return self.config.heads * (updates + Dk**3 // 3 + 2 * Dk**2)

    def _moments(self, parts: Parts, H: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return H after every token, as a state of one row, and after the last."""
        outer = (parts.k[..., :, None] * parts.key[..., None, :]).flatten(-2)
        one = torch.ones_like(outer[..., :1])
        return _recall(Parts(one, one, outer, parts.erase, one[..., 0], parts.log_decay), H)

    def _solve(self, q: Tensor, moments: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            ridge = (F.softplus(self.ridge) + _FLOOR).view(-1, self.Dk)
            H = moments.unflatten(-1, (self.Dk, self.Dk)) + torch.diag_embed(ridge)
            return torch.cholesky_solve(q[..., None], torch.linalg.cholesky(H))[..., 0]


def _recall(parts: Parts, S: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a state that only decays and adds; return what is read, and the last state."""
    nothing = torch.zeros_like(parts.write)
    q, key, v, _, write, log_decay = parts[:6]
    more = {"initial_state": S, "output_final_state": True}
    o, last = delta_rule(q, key, v, nothing, write, log_decay, **more)
    assert last is not None
    return o, last
