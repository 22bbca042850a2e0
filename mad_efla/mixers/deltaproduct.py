"""DeltaProduct: a token is several delta-rule steps, one after the other.

    for j = 1 ... n:  S <- (I - beta_j k_j k_j^T) S + beta_j k_j v_j^T,  |k_j| = 1,  0 < beta_j < 2
    o_t = S_t^T q_t

The transition of a token is a product of n generalised Householder matrices. With beta near 2 each
is a reflection, two of which are a rotation: what a permutation of three things needs, and what no
product of matrices with positive eigenvalues along every k_j can be. This is the corner `keys: l2,
step: euler, householders: n` of the delta family, beta: 2sigmoid by default; the body is in
`delta.py`. `step: exact` there is the same product of EFLA's steps.

Source: Siems et al. 2025, arXiv 2502.10297. Departures: no output gate by default, as in
DeltaNet here. `decay: separate` is their Gated DeltaProduct.
"""

from typing import Literal

from pydantic import Field

from mad_efla.mixers.delta import Delta


class DeltaProduct(Delta):
    """Several Euler steps on unit keys in one token."""

    class Config(Delta.Config):
        """Fields of DeltaProduct: those of the delta family, with keys and step fixed."""

        name: Literal["deltaproduct"] = "deltaproduct"
        keys: Literal["l2"] = "l2"
        step: Literal["euler"] = "euler"
        beta: Literal["sigmoid", "softplus", "2sigmoid"] = "2sigmoid"
        decay: Literal["none", "separate"] = "none"
        householders: int = Field(2, ge=1)
