"""Gated DeltaNet: the delta rule on unit keys, on a state that decays.

    S_t = a (I - beta k k^T) S_{t-1} + beta k v^T,  |k| = 1      o_t = S_t^T q_t
    a = exp(-exp(a_log) softplus(x W_a + dt_bias))                (per head)

The decay forgets everything, the delta rule one key. This is the corner `keys: l2, step: euler,
decay: separate` of the delta family; the body is in `delta.py`.

Source: Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464, Eq. 10. Departure: no output gate by
default, so that only the decay differs from DeltaNet; the authors' block has one,
`output_gate: true`.
"""

from typing import Literal

from mad_efla.mixers.delta import Delta


class GatedDeltaNet(Delta):
    """The Euler step on unit keys and a decaying state."""

    class Config(Delta.Config):
        """Fields of Gated DeltaNet: those of the delta family, with keys, step and decay fixed."""

        name: Literal["gated_deltanet"] = "gated_deltanet"
        keys: Literal["l2"] = "l2"
        step: Literal["euler"] = "euler"
        decay: Literal["separate"] = "separate"
