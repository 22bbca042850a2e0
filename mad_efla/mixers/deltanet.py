"""DeltaNet: the delta rule on unit keys.

    S_t = (I - beta k k^T) S_{t-1} + beta k v^T,  |k| = 1      o_t = S_t^T q_t

One explicit Euler step of length beta; along k the state is multiplied by 1 - beta. This is the
corner `keys: l2, step: euler` of the delta family; the body is in `delta.py`.

Source: Yang et al. 2024, arXiv 2406.06484, Eq. 4 and section 3.3.
"""

from typing import Literal

from mad_efla.mixers.delta import Delta


class DeltaNet(Delta):
    """The Euler step on unit keys."""

    class Config(Delta.Config):
        """Fields of DeltaNet: those of the delta family, with keys, step and decay fixed."""

        name: Literal["deltanet"] = "deltanet"
        keys: Literal["l2"] = "l2"
        step: Literal["euler"] = "euler"
        decay: Literal["none"] = "none"
