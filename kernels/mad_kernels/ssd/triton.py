"""Mamba-2's state space on a GPU: the delta rule that erases nothing.

    S_t = exp(dt_t a) S_{t-1} + dt_t b_t x_t^T        y_t = S_t^T c_t

is the delta rule with q = c, k = b, v = x, write = dt, log_decay = dt a and no erase, so one pair
of kernels serves both; see `mad_kernels.delta_rule.triton`. Groups that share b and c stay shared
in memory.
"""

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype
from mad_kernels.delta_rule.triton import delta_rule_triton


def ssd_triton(
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "B L G N"],
    c: Float[Tensor, "B L G N"],
    state: Float[Tensor, "B H N P"],
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H N P"]]:
    """Run the state space on a GPU; arguments as in `ssd`, already checked."""
    log_decay = dt.to(working_dtype(x)) * a.to(working_dtype(x))
    return delta_rule_triton(c, b, x, None, dt, log_decay, state)
