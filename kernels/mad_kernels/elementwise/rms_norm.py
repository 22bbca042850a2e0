"""RMSNorm, alone or behind a residual: arguments checked, backend chosen, operator called.

    s = x + r        y = w s / sqrt(mean(s^2) + eps)

In bfloat16, sums and all between are float32 and y is rounded once.

Source: Zhang and Sennrich 2019, arXiv 1910.07467, Eq. 4.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype
from mad_kernels.custom_ops import first_order_only
from mad_kernels.dispatch import choose_backend
from mad_kernels.memory import array, check_in_memory, constants, in_memory, lines, padded

BACKENDS = ("reference", "numba")


def rms_norm(
    x: Float[Tensor, "*axes D"],
    weight: Float[Tensor, " D"],
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Float[Tensor, "*axes D"]:
    """Scale the last axis to a mean square of one, then by a weight.

    Args:
        x: Vectors.
        weight: Factor of each channel.
        eps: Added to the mean square, at least 0. With 0 a vector of zeros has no norm and gives NaN.
        dtype: Of the output; None is that of `x`.
        backend: "numba" (CPU), "reference" or "auto", see `mad_kernels.dispatch`.

    Returns:
        The scaled vectors. The numba backend has gradients of first order only.

    Raises:
        ValueError: If shapes, dtypes, devices, `eps` or `backend` do not fit.
    """
    return _run(x, None, weight, eps, dtype, backend)[1]


def add_rms_norm(
    x: Float[Tensor, "*axes D"],
    r: Float[Tensor, "*axes D"],
    weight: Float[Tensor, " D"],
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "*axes D"], Float[Tensor, "*axes D"]]:
    """Add a branch to a residual stream and normalise the sum, see `rms_norm`.

    Returns:
        The sum, in the dtype that x + r has, and the scaled vectors.
    """
    return _run(x, r, weight, eps, dtype, backend)


def rms_norm_reference(
    x: Float[Tensor, "*axes D"], weight: Float[Tensor, " D"], eps: float, dtype: torch.dtype
) -> Float[Tensor, "*axes D"]:
    """Normalise in plain torch, whose own pass warns where the dtypes of x and weight differ."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).to(dtype)


def _run(x, r, weight, eps, dtype, backend) -> tuple[Tensor, Tensor]:
    for name, other, shape in (("weight", weight, x.shape[-1:]), ("r", r, x.shape)):
        if other is not None and other.shape != shape:
            raise ValueError(
                f"rms_norm: {name} has shape {tuple(other.shape)} but x has {tuple(x.shape)}: make it {tuple(shape)}"
            )
    if not eps >= 0:
        raise ValueError(f"rms_norm: eps={eps} must be at least 0, since it is added to a mean square: take 1e-5")
    able = in_memory(x, r, weight)
    automatic = "numba" if able else "reference"
    chosen = choose_backend("rms_norm", backend, BACKENDS, automatic=automatic, like=x)
    total = x.dtype if r is None else torch.promote_types(x.dtype, r.dtype)
    if chosen == "reference":
        s = x if r is None else x + r
        return s, rms_norm_reference(s, weight, eps, dtype or total)
    check_in_memory("rms_norm", x, r, weight)
    s, y = _RMSNorm.apply(x, r, weight, eps, total, dtype or total)
    return (x if r is None else s), y


def _forward(x, r, weight, eps, total, dtype):
    from mad_kernels.elementwise import loops  # brings numba, which takes its time

    s = x.new_empty(() if r is None else x.shape, dtype=total)
    y = x.new_empty(x.shape, dtype=dtype)
    if not y.numel():
        return s, y
    flat, step, *rest = _lines(x, weight, eps)
    branch, step_r = (None, 0) if r is None else _in_lines(r, rest[2])
    loops.rms_norm_forward(flat, step, branch, step_r, *rest, array(s), array(y))
    return s, y


def _backward(s, weight, d_sum, dy, eps, dtypes):
    from mad_kernels.elementwise import loops

    dx = s.new_empty(s.shape, dtype=dtypes[0])
    dr = None if dtypes[1] in (None, dtypes[0]) else s.new_empty(s.shape, dtype=dtypes[1])
    if not s.numel():
        return dx, dx if dr is None else dr, torch.zeros_like(weight)
    *given, tiled, numbers, line, group = _lines(s, weight, eps)
    d_tiled = s.new_zeros(tiled.size, dtype=working_dtype(s))
    flat = ((None, 0) if z is None else _in_lines(z, line) for z in (dy, d_sum))
    results = (array(dx), None if dr is None else array(dr), array(d_tiled))
    arguments = (z for pair in flat for z in pair)
    loops.rms_norm_backward(*given, tiled, numbers, line, group, *arguments, *results)
    D = weight.numel()
    d_weight = d_tiled.view(-1, D).sum(0) if line > D else d_tiled[:D]
    return dx, dx if dr is None else dr, d_weight.to(weight.dtype)


_pull = first_order_only(_backward, "rms_norm")


class _RMSNorm(torch.autograd.Function):
    """x, r -> x + r, nothing where r is None, and its norm."""

    @staticmethod
    def forward(ctx, x, r, weight, eps, total, dtype):
        ctx.set_materialize_grads(False)
        s, y = _forward(x, r, weight, eps, total, dtype)
        ctx.eps, ctx.dtypes = eps, (x.dtype, None if r is None else r.dtype)
        ctx.save_for_backward(x if r is None else s, weight)
        if r is None:
            ctx.mark_non_differentiable(s)
        return s, y

    @staticmethod
    def backward(ctx, d_sum, dy):
        s, weight = ctx.saved_tensors
        r = ctx.dtypes[1]
        if dy is None:
            dy = torch.zeros_like(s)
        dx, dr, d_weight = _pull(s, weight, d_sum if r else None, dy, ctx.eps, ctx.dtypes)
        return dx, dr if r else None, d_weight, None, None, None


def _lines(x, weight, eps):
    """Give x, its step, weight, constants, and the length of a line and of a group of sums.

    Rows that divide a vector fill it together.
    """
    from mad_kernels.lanes import LANES

    D = weight.numel()
    short = D < LANES and LANES % D == 0
    tiled = padded(weight, x)
    if short:
        tiled = np.resize(tiled[:D], LANES)
    line, group = (LANES, D) if short else (D, LANES)
    return *_in_lines(x, line), tiled, constants(x, 1.0, 1 / D, eps), line, group


def _in_lines(x, line):
    return lines(x) if x.shape[-1] == line else (array(x.contiguous()), line)
