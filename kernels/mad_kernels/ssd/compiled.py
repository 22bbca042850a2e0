"""Mamba-2's state space as a delta rule that never erases, through its compiled loops.

    write = dt    log_decay = dt a    k = b    q = c    v = x

With b and c spelled out for every head. Per head of width P the backward keeps
L (2 N + 2 P) + (L/64) N P numbers.
"""

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype
from mad_kernels.delta_rule.compiled import delta_rule_compiled


def ssd_compiled(
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "B L G N"],
    c: Float[Tensor, "B L G N"],
    state: Float[Tensor, "B H N P"],
    chunk: int | None,
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H N P"]]:
    """Run the state space token by token; arguments as in `ssd`, already checked."""
    steps = dt.to(working_dtype(x))
    b, c = (z.repeat_interleave(x.shape[2] // b.shape[2], dim=2) for z in (b, c))
    return delta_rule_compiled(c, b, x, None, steps, steps * a.to(steps.dtype), state, chunk)
