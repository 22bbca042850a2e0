"""Gated DeltaNet 2: what is erased is gated per key channel, what is written per value channel.

    S_t = (I - k (b k)^T) diag(a) S_{t-1} + k (w v)^T,  |k| = 1        o_t = S_t^T q_t
    b = sigmoid(x W_b)   w = sigmoid(x W_w)
    a = exp(-exp(a_log) softplus(x W_1 W_2 + dt_bias))

b is in (0, 1) per key channel and w per value channel, where KDA has one beta for both; products
without a sign are elementwise. With b = w = beta it is KDA, with one a per head Gated DeltaNet.
The body is that of the delta family, `delta.py`. `beta: 2sigmoid` doubles b and leaves w.

Source: arXiv 2605.22791, Eq. 8-12; initial weights from the layer in flash-linear-attention. The
maps are here `beta` (W_b) and `write` (W_w). Departure: no output gate by default, as in `kda`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from mad_efla.mixers.delta import Delta, Parts
from mad_kernels import l2_normalize


class GDN2(Delta):
    """The delta rule with gates of its own for erasing and writing."""

    class Config(Delta.Config):
        """Fields of Gated DeltaNet 2: those of the delta family that it leaves free."""

        name: Literal["gdn2"] = "gdn2"
        keys: Literal["l2"] = "l2"
        step: Literal["euler"] = "euler"
        beta: Literal["sigmoid", "2sigmoid"] = "sigmoid"
        decay: Literal["channel"] = "channel"
        householders: Literal[1] = 1
        reflect: Literal[False] = False

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        self.beta = nn.Linear(d_model, config.heads * self.Dk, bias=False)
        self.write = nn.Linear(d_model, config.heads * self.Dv, bias=False)

    def _parts(self, x: Tensor, qkv: Sequence[Tensor]) -> Parts:
        q, k, v = self._heads(qkv)
        erase, write = (
            rearrange(gate, "... (H D) -> ... H D", H=self.config.heads)
            for gate in (self._beta(x), torch.sigmoid(self.write(x)))
        )
        all_ = torch.ones_like(erase[..., 0])
        v = (write * v).to(v.dtype)
        return Parts(l2_normalize(q), l2_normalize(k), v, erase, all_, self._log_decay(x))

    def _flow(self, x: Tensor, parts: Parts) -> tuple[None, None]:
        del x, parts
        return None, None
