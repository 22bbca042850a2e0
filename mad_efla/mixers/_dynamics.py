"""How a mixer's memory moves, in one form for every mixer whose state has a fixed size.

    S_t = (diag(exp(log_decay_t)) R(angle_t) + a_t b_t^T) S_{t-1} + k_t v_t^T     o_t = S_t^T q_t

    delta family       log_decay one number per head, b the unit key, a = -exp(log_decay) erase b
    Mamba, Mamba-2     log_decay = dt a; no a, no b; in Mamba every channel is a head with P = 1
    GLA                log_decay per channel of the key; no a, no b
    KDA and kin        log_decay per channel, b the unit key as it decays, a = -erase times the key
    RWKV-7             log_decay per channel, b the unit key, a = -rate * b
    Mamba-3, RetNet    log_decay one number per head, angle per pair of rows; no a, no b
    linear attention   log_decay 0; no a, no b

R turns rows 2i and 2i + 1 of the state by angle_i: with a decay of one number, exp(log_decay + i
angle) and its conjugate are eigenvalues. A token may take several of these steps (`substeps`), as
DeltaProduct's does; it is read after the last.

A mixer hands it out by its method `dynamics`; `mad_efla.spectrum` reads it. Softmax attention has
no such state and hands out what its weights are computed from.

Legend: N rows of a head's state (the key's width), P columns (the value's).
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """The recurrence of one layer on one batch; tensors may be expanded views.

    Attributes:
        log_decay: Log of the factor on each row of the old state; -inf forgets it.
        k: Keys written under, scaled by the strength of the writing.
        v: Values.
        q: Queries.
        step: How the flow of a token is integrated: `exact`, `euler`, ...
        a: Where what `b` reads from the old state is added; None for a diagonal transition.
        b: What is read from the old state before it decays; None together with `a`.
        key_square: lambda = |k|^2 of the key that the step is taken on, 1 for keys of unit length;
            None outside of the delta family.
        beta: Time for which the token's flow -k k^T S acts on the old state; None likewise.
        angle: Angle in radians by which each pair of rows of the old state is turned; None for 0.
        substeps: Entries of L that make one token.

    Raises:
        ValueError: If only one of `a` and `b`, or of `key_square` and `beta`, is given, or L is no
            multiple of `substeps`.
    """

    log_decay: Float[Tensor, "B L H N"]
    k: Float[Tensor, "B L H N"]
    v: Float[Tensor, "B L H P"]
    q: Float[Tensor, "B L H N"]
    step: str = "exact"
    a: Float[Tensor, "B L H N"] | None = None
    b: Float[Tensor, "B L H N"] | None = None
    key_square: Float[Tensor, "B L H"] | None = None
    beta: Float[Tensor, "B L H"] | None = None
    angle: Float[Tensor, "B L H half"] | None = None
    substeps: int = 1

    def __post_init__(self):
        for one, other in (("a", "b"), ("key_square", "beta")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"Dynamics: {one} and {other} go together; give both or neither")
        if (L := self.k.shape[1]) % self.substeps:
            raise ValueError(f"Dynamics: L={L} must be a multiple of substeps={self.substeps}")

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return self.k.shape[1] // self.substeps


@dataclass(frozen=True, kw_only=True)
class AttentionTrace:
    """What softmax attention computes its weights from: softmax_s(q_t . k_s / sqrt(Dh)), s <= t.

    Attributes:
        q: Queries, rotated if the mixer rotates them.
        k: Keys, likewise.
        v: Values.
        window: Tokens attended to, the present one included; None for all up to it.
    """

    q: Float[Tensor, "B L H Dh"]
    k: Float[Tensor, "B L H Dh"]
    v: Float[Tensor, "B L H Dv"]
    window: int | None = None
