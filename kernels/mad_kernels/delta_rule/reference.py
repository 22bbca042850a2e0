"""The delta rule, one token at a time: the definition that every other backend has to meet.

    S_t = exp(log_decay_t) (I - erase_t k_t k_t^T) S_{t-1} + write_t k_t v_t^T
    o_t = S_t^T q_t

Plain operations and plain autograd, so gradients of any order exist. Sums run in float32, or in
float64 for float64 inputs.

Source: arXiv 2406.06484, the delta update rule (erase = write = beta); arXiv 2412.06464, the gated
delta rule (with decay).
Departure: erase and write are two scalars, and the state is [Dk, Dv], the papers' transposed.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype


def delta_rule_token(
    q: Float[Tensor, "B H Dk"],
    k: Float[Tensor, "B H Dk"],
    v: Float[Tensor, "B H Dv"],
    erase: Float[Tensor, "B H"],
    write: Float[Tensor, "B H"],
    log_decay: Float[Tensor, "B H"] | None,
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Read one token into the state, then query it.

    Returns:
        The output in the dtype of `v`, and the next state in float32 (float64 for float64).
    """
    wide = working_dtype(v)
    q_t, k_t, v_t, S = q.to(wide), k.to(wide), v.to(wide), state.to(wide)
    if log_decay is not None:
        S = S * log_decay.to(wide).exp()[..., None, None]
    with torch.autocast(v.device.type, enabled=False):
        recalled = torch.einsum("bhkv,bhk->bhv", S, k_t)
        update = write.to(wide)[..., None] * v_t - erase.to(wide)[..., None] * recalled
        S = S + k_t[..., None] * update[..., None, :]
        return torch.einsum("bhkv,bhk->bhv", S, q_t).to(v.dtype), S


def delta_rule_reference(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    erase: Float[Tensor, "B L H"],
    write: Float[Tensor, "B L H"],
    log_decay: Float[Tensor, "B L H"] | None,
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Apply `delta_rule_token` to every token in turn."""
    outputs = []
    for t in range(q.shape[1]):
        decay_t = None if log_decay is None else log_decay[:, t]
        o_t, state = delta_rule_token(q[:, t], k[:, t], v[:, t], erase[:, t], write[:, t], decay_t, state)
        outputs.append(o_t)
    return (torch.stack(outputs, dim=1) if outputs else v.clone()), state
