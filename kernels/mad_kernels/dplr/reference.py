"""Diagonal plus low rank, one token at a time: the definition that every other backend has to meet.

    S_t = diag(exp(log_decay_t)) S_{t-1} + a_t (b_t^T S_{t-1}) + k_t v_t^T
    o_t = S_t^T q_t

Every key channel, a row of S, decays by itself; b reads the state before it has decayed, and what
it reads is added along a. Without a and b this is gated linear attention. Plain operations and
plain autograd, so gradients of any order exist. Sums run in float32, or in float64 for float64.

Source: arXiv 2503.14456, the state update of RWKV-7, with a = -(in-context rate * removal key) and
b = removal key; arXiv 2312.06635, gated linear attention, without a and b.
Departure: the state is [Dk, Dv], which is RWKV-7's transposed.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype


def dplr_token(
    q: Float[Tensor, "B H Dk"],
    k: Float[Tensor, "B H Dk"],
    v: Float[Tensor, "B H Dv"],
    log_decay: Float[Tensor, "B H Dk"],
    a: Float[Tensor, "B H Dk"] | None,
    b: Float[Tensor, "B H Dk"] | None,
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Read one token into the state, then query it.

    Returns:
        The output in the dtype of `v`, and the next state in float32 (float64 for float64).
    """
    wide = working_dtype(v)
    q_t, k_t, v_t, before = q.to(wide), k.to(wide), v.to(wide), state.to(wide)
    with torch.autocast(v.device.type, enabled=False):
        S = before * log_decay.to(wide).exp()[..., None] + k_t[..., None] * v_t[..., None, :]
        if a is not None and b is not None:
            recalled = torch.einsum("bhkv,bhk->bhv", before, b.to(wide))
            S = S + a.to(wide)[..., None] * recalled[..., None, :]
        return torch.einsum("bhkv,bhk->bhv", S, q_t).to(v.dtype), S


def dplr_reference(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    log_decay: Float[Tensor, "B L H Dk"],
    a: Float[Tensor, "B L H Dk"] | None,
    b: Float[Tensor, "B L H Dk"] | None,
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Apply `dplr_token` to every token in turn."""
    outputs = []
    for t in range(q.shape[1]):
        a_t, b_t = (None if x is None else x[:, t] for x in (a, b))
        o_t, state = dplr_token(q[:, t], k[:, t], v[:, t], log_decay[:, t], a_t, b_t, state)
        outputs.append(o_t)
    return (torch.stack(outputs, dim=1) if outputs else v.clone()), state
