"""The gate of SwiGLU: arguments checked, backend chosen, operator called.

    h = [g, v]        y = silu(g) v

In bfloat16, all between is float32 and y is rounded once.

Source: Shazeer 2020, arXiv 2002.05202, Eq. 6, the product before the last projection.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mad_kernels.custom_ops import first_order_only
from mad_kernels.dispatch import choose_backend
from mad_kernels.memory import array, check_in_memory, constants, in_memory, lines

BACKENDS = ("reference", "numba")


def swiglu(h: Float[Tensor, "*axes twice_I"], *, backend: str = "auto") -> Float[Tensor, "*axes I"]:
    """Multiply the second half of the last axis by the SiLU of the first.

    Args:
        h: Gates, and behind them values.
        backend: "numba" (CPU), "reference" or "auto", see `mad_kernels.dispatch`.

    Returns:
        The product, in the dtype of `h`. The numba backend has gradients of first order only.

    Raises:
        ValueError: If the last axis is odd, or `backend` does not fit.
    """
    if h.dim() == 0 or h.shape[-1] % 2:
        raise ValueError(f"swiglu: h has shape {tuple(h.shape)}, but its last axis is cut into halves: make it even")
    automatic = "numba" if in_memory(h) else "reference"
    chosen = choose_backend("swiglu", backend, BACKENDS, automatic=automatic, like=h)
    if chosen == "reference":
        return swiglu_reference(h)
    check_in_memory("swiglu", h)
    return _SwiGLU.apply(h)


def swiglu_reference(h: Float[Tensor, "*axes twice_I"]) -> Float[Tensor, "*axes I"]:
    """Compute the gate in plain torch."""
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


def _forward(h):
    from mad_kernels.elementwise import loops  # brings numba, which takes its time

    y = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
    if y.numel():
        loops.swiglu_forward(*lines(h), y.shape[-1], array(y))
    return y


def _backward(h, dy):
    from mad_kernels.elementwise import loops

    dh = h.new_empty(h.shape)
    if dh.numel():
        loops.swiglu_backward(*lines(h), dy.shape[-1], *lines(dy), constants(h, 1.0), array(dh))
    return dh


_pull = first_order_only(_backward, "swiglu")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return _forward(h)

    @staticmethod
    def backward(ctx, dy):
        return _pull(*ctx.saved_tensors, dy)
