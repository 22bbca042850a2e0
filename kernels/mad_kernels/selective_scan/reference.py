"""Mamba's selective scan, one token at a time: the definition that the compiled form has to meet.

    S_t[d, n] = exp(dt_t[d] a[d, n]) S_{t-1}[d, n] + dt_t[d] x_t[d] b_t[n]
    y_t[d]    = sum_n c_t[n] S_t[d, n]

Every channel d has a state of N numbers of its own; b and c are shared by all channels. The
exponential is taken inside the step: a tensor of all of them would hold L D N numbers.

Legend: D channels, N state width; S is B D N.

Source: arXiv 2312.00752, the selective state space.
Departure: b is multiplied by dt, not integrated, as in the code that came with the paper.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype


def selective_scan_token(
    x: Float[Tensor, "B D"],
    dt: Float[Tensor, "B D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "B N"],
    c: Float[Tensor, "B N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D N"]]:
    """Read one token into the state, then query it.

    Returns:
        The output in the dtype of `x`, and the next state in float32 (float64 for float64).
    """
    wide = working_dtype(x)
    x_t, dt_t, a_t, b_t, c_t, S = (z.to(wide) for z in (x, dt, a, b, c, state))
    with torch.autocast(x.device.type, enabled=False):
        S = S * (dt_t[..., None] * a_t).exp()
        S = S + (dt_t * x_t)[..., None] * b_t[:, None, :]
        return torch.einsum("bdn,bn->bd", S, c_t).to(x.dtype), S


def selective_scan_reference(
    x: Float[Tensor, "B L D"],
    dt: Float[Tensor, "B L D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "B L N"],
    c: Float[Tensor, "B L N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B D N"]]:
    """Apply `selective_scan_token` to every token in turn."""
    outputs = []
    for t in range(x.shape[1]):
        y_t, state = selective_scan_token(x[:, t], dt[:, t], a, b[:, t], c[:, t], state)
        outputs.append(y_t)
    return (torch.stack(outputs, dim=1) if outputs else x.clone()), state
