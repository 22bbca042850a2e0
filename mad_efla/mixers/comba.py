"""Comba: a decaying delta rule that erases less than it writes, and corrects what it reads.

    S_t = (a I - b beta k k^T) S_{t-1} + beta k v^T,  |k| = 1          b = sigmoid(feedback)
    o_t = S_t^T (q_t - d b k_t)

b and d are learned, one number per head: b weighs the feedback from the state to what is written,
d takes from the query what lies along the present key. What is erased is read before the state
decays: along k the state is multiplied by a - b beta, where Gated DeltaNet has a (1 - beta). With
a = b = 1 and d = 0 it is DeltaNet. The body is that of the delta family, `delta.py`.

Legend: a and beta as in `gated_deltanet`; `feedback`; `correction` d.
Source: Hu et al. 2025, arXiv 2506.02475 (scalar plus low rank, output correction), and
the chunk form that came with it in flash-linear-attention, whose token loop decays before it reads
and is another rule. Initial values: b = sigmoid(1) from there, d = 0.02 as the authors take it for
their smaller model (1 for the larger). Departures: that layer forms b k and q - d b k first and
then scales q, k and b k to unit length, which undoes b in the erasure; here q and k have unit
length before, so b acts. No output gate by default, as in `gated_deltanet`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mad_efla.mixers.delta import Delta, Parts


class Comba(Delta):
    """A decaying delta rule with feedback and output correction."""

    class Config(Delta.Config):
        """Fields of Comba: those of the delta family, less what it fixes.

        Attributes:
            correction: Where d starts.
        """

        name: Literal["comba"] = "comba"
        keys: Literal["l2"] = "l2"
        step: Literal["euler"] = "euler"
        decay: Literal["separate"] = "separate"
        householders: Literal[1] = 1
        correction: float = 0.02

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        self.feedback = nn.Parameter(torch.ones(config.heads))
        self.correction = nn.Parameter(torch.full((config.heads,), config.correction))

    def _parts(self, x: Tensor, qkv: Sequence[Tensor]) -> Parts:
        parts, b = super()._parts(x, qkv), torch.sigmoid(self.feedback)
        q = parts.q - (self.correction * b)[:, None] * parts.key
        erase = b * parts.erase
        return parts._replace(q=q, erase=erase, read=erase[..., None] * parts.key)

    def _flow(self, x: Tensor, parts: Parts) -> tuple[None, None]:
        del x, parts
        return None, None
