"""Longhorn: the delta rule as an implicit step, which no key and no beta can make grow.

    alpha = beta / (1 + beta |k|^2)
    S_t = (I - alpha k k^T) S_{t-1} + alpha k v^T      o_t = S_t^T q_t

S_t is the minimum of |S - S_{t-1}|^2 + beta |S^T k - v|^2; along k the state is multiplied by
1 / (1 + beta |k|^2). This is the corner `keys: raw, step: implicit` of the delta family; the body
is in `delta.py`.

Source: Liu et al. 2024, arXiv 2407.14207, the closed form of the online update. Departures: the
paper then keeps the diagonal of k k^T alone, to run it as a scan over single numbers, with a beta
per channel, inside Mamba's block; here k k^T is whole, beta is one number per head, and the block
is that of the family, so that only the step differs from EFLA.
"""

from typing import Literal

from mad_efla.mixers.delta import Delta


class Longhorn(Delta):
    """The implicit step on raw keys."""

    class Config(Delta.Config):
        """Fields of Longhorn: those of the delta family, with keys, step and decay fixed."""

        name: Literal["longhorn"] = "longhorn"
        keys: Literal["raw"] = "raw"
        step: Literal["implicit"] = "implicit"
        decay: Literal["none"] = "none"
