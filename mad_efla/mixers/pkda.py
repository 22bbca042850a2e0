"""Preconditioned KDA: a decay and a rate of writing for every key channel.

    S_t = (I - beta (m k) k^T) diag(a) S_{t-1} + beta (m k) v^T,  |k| = 1      o_t = S_t^T q_t

a as in `kda`, m as in `pgdn`, whose body this is with `decay: channel`.

Source: arXiv 2604.21100, and `precond_kda` in flash-linear-attention. Departure: a starts as in
`kda`, and no output gate by default.
"""

from typing import Literal

from mad_efla.mixers.pgdn import PGDN


class PKDA(PGDN):
    """KDA with a diagonal preconditioner on what it writes."""

    class Config(PGDN.Config):
        """Fields of preconditioned KDA: those of `pgdn`, with the decay fixed."""

        name: Literal["pkda"] = "pkda"
        decay: Literal["channel"] = "channel"
