"""Mamba-2's state space as a delta rule that never erases: what its fast backends run.

    write = dt    log_decay = dt a    k = b    q = c    v = x

On a CPU b and c are spelled out for every head: one C B^T per head costs less than products that
leave the heads of a group side by side. Per head of width P the backward keeps L (2 N + 2 P) +
(L/64) N P numbers. On a GPU the heads of a group share b and c in memory.

Source: arXiv 2405.21060, the block decomposition and its listing.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype
from mad_kernels.delta_rule.chunked import delta_rule_chunked
from mad_kernels.delta_rule.compiled import delta_rule_compiled


def ssd_chunked(*tensors: Any, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Run the state space chunk by chunk; arguments as in `ssd`, already checked."""
    return _spelled_out(delta_rule_chunked, *tensors, chunk=chunk)


def ssd_compiled(*tensors: Any, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Run the state space token by token; arguments as in `ssd`, already checked."""
    return _spelled_out(delta_rule_compiled, *tensors, chunk=chunk)


def ssd_triton(
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "B L G N"],
    c: Float[Tensor, "B L G N"],
    state: Float[Tensor, "B H N P"],
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H N P"]]:
    """Run the state space on a GPU; arguments as in `ssd`, already checked."""
    from mad_kernels.delta_rule.triton import delta_rule_triton  # triton only where it is used

    log_decay = dt.to(working_dtype(x)) * a.to(working_dtype(x))
    return delta_rule_triton(c, b, x, None, dt, log_decay, state)


def _spelled_out(
    run: Callable[..., tuple[Tensor, Tensor]],
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "B L G N"],
    c: Float[Tensor, "B L G N"],
    state: Float[Tensor, "B H N P"],
    *,
    chunk: int | None,
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H N P"]]:
    steps = dt.to(working_dtype(x))
    b, c = (z.repeat_interleave(x.shape[2] // b.shape[2], dim=2) for z in (b, c))
    return run(c, b, x, None, steps, steps * a.to(steps.dtype), state, chunk)
