"""Kimi delta attention: the delta rule on unit keys, on a state whose rows decay each at a rate.

    S_t = (I - beta k k^T) diag(a) S_{t-1} + beta k v^T,  |k| = 1      o_t = S_t^T q_t
    a = exp(-exp(a_log) softplus(x W_1 W_2 + dt_bias))                 (per head and key channel)

It is Gated DeltaNet with a decay for every key channel; W_1 W_2 has the rank of a head's values.
This is the corner `keys: l2, step: euler, decay: channel` of the delta family; the body is in
`delta.py`. `step: exact` integrates the token exactly on the decayed state, with `keys: raw` as
EFLA does; `step` and `keys` are free.

Source: Kimi Team 2025, arXiv 2510.26692; initial weights from the layer of
flash-linear-attention that came with it. Departures: no output gate by default, so that only the
decay differs from Gated DeltaNet; the authors' block has one, `output_gate: low_rank`.
"""

from typing import Literal

from mad_efla.mixers.delta import Delta


class KDA(Delta):
    """The Euler step on unit keys, and a decay per key channel."""

    class Config(Delta.Config):
        """Fields of Kimi delta attention: those of the delta family, with the decay fixed."""

        name: Literal["kda"] = "kda"
        keys: Literal["raw", "l2"] = "l2"
        step: Literal["euler", "rk2", "rk4", "exact", "implicit", "kaczmarz"] = "euler"
        decay: Literal["channel"] = "channel"
