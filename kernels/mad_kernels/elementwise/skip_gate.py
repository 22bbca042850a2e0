"""What stands behind Mamba's state space: the input past the state, and the gate.

    out = (y + skip u) silu(z)

In bfloat16, all between is float32 and each result is rounded once.

Source: Gu and Dao 2023, arXiv 2312.00752, the block around the state space.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype
from mad_kernels.custom_ops import first_order_only
from mad_kernels.dispatch import choose_backend
from mad_kernels.memory import array, check_in_memory, constants, in_memory, lines, padded

BACKENDS = ("reference", "numba")


def skip_gate(
    y: Float[Tensor, "*axes D"],
    u: Float[Tensor, "*axes D"],
    z: Float[Tensor, "*axes D"],
    skip: Float[Tensor, " D"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "*axes D"]:
    """Add each channel's share of the input to what the state gave, and gate the sum.

    Args:
        y: Outputs of the state.
        u: Inputs of the state.
        z: Gates, before SiLU.
        skip: Share of each channel of `u`.
        backend: "numba" (CPU), "reference" or "auto", see `mad_kernels.dispatch`.

    Returns:
        The gated sum, in the widest of the dtypes of `y`, `u` and `z`. The numba backend has
        gradients of first order only.

    Raises:
        ValueError: If shapes, dtypes, devices or `backend` do not fit.
    """
    for name, x, shape in (("u", u, y.shape), ("z", z, y.shape), ("skip", skip, y.shape[-1:])):
        if x.shape != shape:
            raise ValueError(
                f"skip_gate: {name} has shape {tuple(x.shape)} but y has {tuple(y.shape)}: make it {tuple(shape)}"
            )
    automatic = "numba" if in_memory(y, u, z, skip) else "reference"
    chosen = choose_backend("skip_gate", backend, BACKENDS, automatic=automatic, like=y)
    if chosen == "reference":
        return skip_gate_reference(y, u, z, skip)
    check_in_memory("skip_gate", y, u, z, skip)
    return _SkipGate.apply(y, u, z, skip)


def skip_gate_reference(
    y: Float[Tensor, "*axes D"], u: Float[Tensor, "*axes D"], z: Float[Tensor, "*axes D"], skip: Float[Tensor, " D"]
) -> Float[Tensor, "*axes D"]:
    """Compute the gated sum in plain torch."""
    return (y + u * skip.to(u.dtype)) * F.silu(z)


def _forward(y, u, z, skip):
    from mad_kernels.elementwise import loops  # brings numba, which takes its time

    dtype = torch.promote_types(torch.promote_types(y.dtype, u.dtype), z.dtype)
    out = y.new_empty(y.shape, dtype=dtype)
    if out.numel():
        loops.skip_gate_forward(*lines(y), *lines(u), *lines(z), padded(skip, y), y.shape[-1], array(out))
    return out


def _backward(y, u, z, skip, d_out):
    from mad_kernels.elementwise import loops

    grads = [x.new_empty(x.shape) for x in (y, u, z)]
    shares = padded(skip, y)
    d_skip = y.new_zeros(shares.size, dtype=working_dtype(y))
    if y.numel():
        given = (*lines(y), *lines(u), *lines(z), shares, constants(y, 1.0), y.shape[-1], *lines(d_out))
        loops.skip_gate_backward(*given, *map(array, (*grads, d_skip)))
    return *grads, d_skip[: skip.numel()].to(skip.dtype)


_pull = first_order_only(_backward, "skip_gate")


class _SkipGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, u, z, skip):
        ctx.save_for_backward(y, u, z, skip)
        return _forward(y, u, z, skip)

    @staticmethod
    def backward(ctx, d_out):
        return _pull(*ctx.saved_tensors, d_out)
