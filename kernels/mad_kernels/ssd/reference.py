"""Mamba-2's state space, one token at a time: the definition that every other backend has to meet.

    S_t = exp(dt_t a) S_{t-1} + dt_t b_t x_t^T
    y_t = S_t^T c_t

Legend: x is B L H P with head width P; b and c are B L G N with G groups of H/G neighbouring heads
each and state width N; S is B H N P.

Source: arXiv 2405.21060, the selective state space with one scalar a per head; b and c shared in a
group, as in its Mamba-2 block.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype


def ssd_token(
    x: Float[Tensor, "B H P"],
    dt: Float[Tensor, "B H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "B G N"],
    c: Float[Tensor, "B G N"],
    state: Float[Tensor, "B H N P"],
) -> tuple[Float[Tensor, "B H P"], Float[Tensor, "B H N P"]]:
    """Read one token into the state, then query it.

    Returns:
        The output in the dtype of `x`, and the next state in float32 (float64 for float64).
    """
    wide = working_dtype(x)
    x_t, dt_t, a_t, b_t, c_t, S = (z.to(wide) for z in (x, dt, a, b, c, state))
    heads = x.shape[1] // max(b.shape[1], 1)
    b_t, c_t = b_t.repeat_interleave(heads, dim=1), c_t.repeat_interleave(heads, dim=1)
    with torch.autocast(x.device.type, enabled=False):
        S = S * (dt_t * a_t).exp()[..., None, None]
        S = S + b_t[..., None] * (dt_t[..., None] * x_t)[..., None, :]
        return torch.einsum("bhnp,bhn->bhp", S, c_t).to(x.dtype), S


def ssd_reference(
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "B L G N"],
    c: Float[Tensor, "B L G N"],
    state: Float[Tensor, "B H N P"],
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H N P"]]:
    """Apply `ssd_token` to every token in turn."""
    outputs = []
    for t in range(x.shape[1]):
        y_t, state = ssd_token(x[:, t], dt[:, t], a, b[:, t], c[:, t], state)
        outputs.append(y_t)
    return (torch.stack(outputs, dim=1) if outputs else x.clone()), state
