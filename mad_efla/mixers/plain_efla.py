"""EFLA without what usually stands around it: the exact step on raw keys, plain projections.

    S_t = (I - alpha k k^T) S_{t-1} + alpha k v^T,   alpha = (1 - exp(-beta |k|^2)) / |k|^2

The corner `keys: raw, step: exact` of the plain layer in `plain_delta.py`, which says what is left
out; `decay: joint` makes it gated EFLA.

Source: Lei, Zhang, Poria, arXiv 2512.12602, Eq. 15, in their experiment on sequential MNIST.
"""

from typing import Literal

from mad_efla.mixers.plain_delta import PlainDelta


class PlainEFLA(PlainDelta):
    """The exact step on raw keys, on plain projections."""

    class Config(PlainDelta.Config):
        """Fields of the plain layer, with keys and step fixed."""

        name: Literal["plain_efla"] = "plain_efla"
        keys: Literal["raw"] = "raw"
        step: Literal["exact"] = "exact"
