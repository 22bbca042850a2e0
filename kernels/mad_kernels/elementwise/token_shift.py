"""RWKV's token shift: every token moved towards the one before it, by several shares at once.

    y^c_t = x_t + mix_c (x_{t-1} - x_t)        for each row c of mix, x_0 = 0

In bfloat16, all between is float32 and each y is rounded once.

Source: Peng et al. 2025, arXiv 2503.14456, the token shift of the time mixing.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors, working_dtype
from mad_kernels.custom_ops import first_order_only
from mad_kernels.dispatch import choose_backend
from mad_kernels.memory import array, check_in_memory, in_memory, lines, padded

BACKENDS = ("reference", "numba")


def token_shift(
    x: Float[Tensor, "B L D"], mix: Float[Tensor, "C D"], *, backend: str = "auto"
) -> tuple[Float[Tensor, "B L D"], ...]:
    """Move every token towards the one before it, nothing before the first, by each row of shares.

    Args:
        x: Tokens.
        mix: Shares of the token before, at least one row.
        backend: "numba" (CPU), "reference" or "auto", see `mad_kernels.dispatch`.

    Returns:
        The moved tokens of each row of `mix`, in the dtype of `x`. The numba backend has gradients
        of first order only.

    Raises:
        ValueError: If shapes, dtypes, devices or `backend` do not fit.
    """
    check_tensors("token_shift", {"x": (x, "B L D"), "mix": (mix, "C D")})
    if not len(mix):
        raise ValueError("token_shift: mix has no rows, and each row makes a result: give one or more")
    automatic = "numba" if in_memory(x, mix) else "reference"
    chosen = choose_backend("token_shift", backend, BACKENDS, automatic=automatic, like=x)
    if chosen == "reference":
        return token_shift_reference(x, mix)
    check_in_memory("token_shift", x, mix)
    return _TokenShift.apply(x, mix)


def token_shift_reference(x: Float[Tensor, "B L D"], mix: Float[Tensor, "C D"]) -> tuple[Float[Tensor, "B L D"], ...]:
    """Shift tokens in plain torch."""
    change = F.pad(x, (0, 0, 1, -1)) - x
    return tuple(x + change * share for share in mix.to(x.dtype))


def _forward(x, mix):
    from mad_kernels.elementwise import loops  # brings numba, which takes its time

    parts = tuple(x.new_empty(x.shape) for _ in mix)
    if x.numel():
        loops.token_shift_forward(*lines(x), _rows(x, mix), *x.shape[1:], tuple(map(array, parts)))
    return parts


def _backward(x, mix, *d_parts):
    from mad_kernels.elementwise import loops

    dx, rows = x.new_empty(x.shape), _rows(x, mix)
    d_rows = x.new_zeros(rows.size, dtype=working_dtype(x))
    if x.numel():
        arrays, steps = zip(*map(lines, d_parts), strict=True)
        gradients = (arrays, np.array(steps))
        loops.token_shift_backward(*lines(x), rows, *x.shape[1:], *gradients, array(dx), array(d_rows))
    return dx, d_rows.view(len(mix), -1)[:, : mix.shape[1]].to(mix.dtype)


_pull = first_order_only(_backward, "token_shift")


class _TokenShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mix):
        ctx.save_for_backward(x, mix)
        return _forward(x, mix)

    @staticmethod
    def backward(ctx, *d_parts):
        return _pull(*ctx.saved_tensors, *d_parts)


def _rows(x, mix):
    """Give the rows of mix as the loops read them, one after another."""
    return np.concatenate([padded(share, x) for share in mix.detach()])
