"""DeltaNet without what usually stands around it: the delta rule on unit keys, plain projections.

    S_t = (I - beta k k^T) S_{t-1} + beta k v^T,  |k| = 1

The corner `keys: l2, step: euler` of the plain layer in `plain_delta.py`, which says what is left
out; `decay: separate` makes it Gated DeltaNet.

Source: Yang et al. 2024, arXiv 2406.06484, Eq. 4, as Lei, Zhang, Poria, arXiv 2512.12602, compare
with it on sequential MNIST.
"""

from typing import Literal

from mad_efla.mixers.plain_delta import PlainDelta


class PlainDeltaNet(PlainDelta):
    """The Euler step on unit keys, on plain projections."""

    class Config(PlainDelta.Config):
        """Fields of the plain layer, with keys and step fixed."""

        name: Literal["plain_deltanet"] = "plain_deltanet"
        keys: Literal["l2"] = "l2"
        step: Literal["euler"] = "euler"
