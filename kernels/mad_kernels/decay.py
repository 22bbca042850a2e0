"""Decay factors inside a chunk, and the gradient that comes back through them.

With l the log decay of C tokens, G_i = l_1 + ... + l_i and G_C the whole chunk's:

    inside_i = exp(G_i)    rest_i = exp(G_C - G_i)    pairs_ij = exp(l_{j+1} + ... + l_i) for j <= i

The sums between two tokens are added up as they stand, by a product with a triangle of ones: the
difference G_i - G_j of two long sums would lose the digits of a short one. Every exponent is a sum
of log decays, so none is positive when they are not; above the diagonal it is empty and masked.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

# exp(-1e4) is 0 in every dtype: the floor changes no factor, and keeps -inf out of 0 * -inf.
_FLOOR = -1e4


class Decay(NamedTuple):
    """Factors of chunks of C tokens; `pairs` is zero above the diagonal."""

    inside: Tensor  # [... C]
    rest: Tensor  # [... C]
    pairs: Tensor  # [... C C]

    @property
    def whole(self) -> Tensor:
        """The factor of the whole chunk, exp(G_C)."""
        return self.inside[..., -1]


def decay_factors(log_decay: Tensor) -> Decay:
    """Compute the factors of log decays [... C], finite or -inf."""
    steps = log_decay.clamp_min(_FLOOR)
    lower = steps.new_ones(steps.shape[-1:] * 2).tril()
    between = (steps[..., None, :] * lower) @ lower.tril(-1)
    rest = between[..., -1, :].exp()
    return Decay(steps.cumsum(-1).exp(), rest, between.exp_().mul_(lower))


def log_decay_gradient(inside: Tensor, rest: Tensor, pairs: Tensor) -> Tensor:
    """Gather the gradient of the log decay from that of the three exponents.

    Args:
        inside: Gradient by the exponent of `inside`, [... C]; a part due to `whole` is added to the
            last entry.
        rest: Gradient by the exponent of `rest`, [... C].
        pairs: Gradient by the exponent of `pairs`, [... C C], zero above the diagonal.

    Returns:
        The gradient by each token's log decay, [... C].
    """
    ones = pairs.new_ones(pairs.shape[-2:])
    before = pairs @ ones.triu(1)  # [i, m]: summed over j < m
    crossing = before.mul_(ones.tril()).sum(-2)
    later = inside.flip(-1).cumsum(-1).flip(-1)
    earlier = pad(rest[..., :-1], (1, 0)).cumsum(-1)
    return crossing + later + earlier
