"""EFLA: the delta rule integrated without error; the key's length is its gate.

    lambda = |k|^2      alpha = (1 - exp(-beta lambda)) / lambda
    S_t = (I - alpha k k^T) S_{t-1} + alpha k v^T      o_t = S_t^T q_t

Along k the state decays by exp(-beta lambda), whatever beta and k: it can never grow. Keys are not
normalised, so lambda is a decay that the model learns for every token. This is the corner `keys:
raw, step: exact` of the delta family; the body is in `delta.py`.

Source: Lei, Zhang, Poria, arXiv 2512.12602, Eq. 15. Departure: beta is a sigmoid by default, as in
the paper's MAD runs; its later language models use softplus, `beta: softplus`.
"""

from typing import Literal

from mad_efla.mixers.delta import Delta


class EFLA(Delta):
    """The exact step on raw keys."""

    class Config(Delta.Config):
        """Fields of EFLA: those of the delta family, with keys, step and decay fixed."""

        name: Literal["efla"] = "efla"
        keys: Literal["raw"] = "raw"
        step: Literal["exact"] = "exact"
        decay: Literal["none"] = "none"
