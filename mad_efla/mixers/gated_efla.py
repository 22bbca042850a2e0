"""Gated EFLA: decay and delta rule as one flow, integrated without error.

    lambda = |k|^2      eta = (1 - a) + a beta lambda      a as in Gated DeltaNet
    S_t = e^-(1-a) (I - (1 - e^(-a beta lambda)) / lambda k k^T) S_{t-1}
          + beta (1 - e^-eta) / eta k v^T                  o_t = S_t^T q_t

The flow is dS/ds = -(1 - a) S + beta k (v - a S^T k)^T over unit time. What is erased and what is
written differ, and no token takes more than the share 1 - 1/e from what lies off its key. This is
the corner `keys: raw, step: exact, decay: joint` of the delta family; the body is in `delta.py`.

Source: Lei, Zhang, Poria, arXiv 2512.12602v4, Eq. 68. Departures: as `efla`, and no output gate by
default.
"""

from typing import Literal

from mad_efla.mixers.delta import Delta


class GatedEFLA(Delta):
    """The exact flow of decay and delta rule on raw keys."""

    class Config(Delta.Config):
        """Fields of gated EFLA: those of the delta family, with keys, step and decay fixed."""

        name: Literal["gated_efla"] = "gated_efla"
        keys: Literal["raw"] = "raw"
        step: Literal["exact"] = "exact"
        decay: Literal["joint"] = "joint"
