"""A short causal convolution through the compiled loops of `loops`, its output cut into parts.

Taps, bias and sums are float32 for bfloat16; each part is rounded once. Only the inputs are kept
for the backward.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype
from mad_kernels.custom_ops import first_order_only
from mad_kernels.memory import array, constants, lines, padded


def short_conv_compiled(
    x: Float[Tensor, "B L D"],
    weight: Float[Tensor, "D K"],
    bias: Float[Tensor, " D"] | None,
    activation: str | None,
    state: Float[Tensor, "B D K-1"],
    widths: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Convolve all tokens and cut the channels; arguments as in `short_conv_split`, checked.

    Returns:
        A contiguous [B L width] of `dtype` for each of the widths.
    """
    return _ShortConv.apply(x, weight, bias, state, activation == "silu", tuple(widths), dtype)


def _forward(x, weight, bias, state, silu, widths, dtype):
    from mad_kernels.short_conv import loops  # brings numba, which takes its time

    parts = tuple(x.new_empty(*x.shape[:2], width, dtype=dtype) for width in widths)
    if x.numel():
        *given, sizes = _given(x, weight, bias, state, widths)
        loops.forward(*given, silu, x.shape[1], sizes, tuple(map(array, parts)))
    return parts


def _backward(x, weight, bias, state, silu, widths, *d_parts):
    from mad_kernels.short_conv import loops

    dx, d_state = x.new_empty(x.shape), state.new_zeros(state.mT.shape)
    rows, step, before, taps, zeros, sizes = _given(x, weight, bias, state, widths)
    d_taps, d_bias = (x.new_zeros(z.size, dtype=working_dtype(x)) for z in (taps, zeros))
    if x.numel():
        arrays, steps = zip(*map(lines, _alike(d_parts)), strict=True)
        gradients = (arrays, np.array(steps), constants(x, 1.0))
        results = (array(dx), *map(array, (d_state, d_taps, d_bias)))
        loops.backward(rows, step, before, taps, zeros, silu, x.shape[1], sizes, *gradients, *results)
    D, K = weight.shape
    d_weight = d_taps.view(K, -1)[:, :D].mT.to(weight.dtype)
    d_bias = None if bias is None else d_bias[:D].to(bias.dtype)
    return dx, d_weight.contiguous(), d_bias, d_state.mT


_pull = first_order_only(_backward, "short_conv")


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, silu, widths, dtype):
        ctx.save_for_backward(x, weight, bias, state)
        ctx.silu, ctx.widths = silu, widths
        return _forward(x, weight, bias, state, silu, widths, dtype)

    @staticmethod
    def backward(ctx, *d_parts):
        return *_pull(*ctx.saved_tensors, ctx.silu, ctx.widths, *d_parts), None, None, None


def _given(x, weight, bias, state, widths):
    """Give x, its step, state, taps, bias and widths as the loops read them."""
    taps = np.concatenate([padded(tap, x) for tap in weight.detach().unbind(1)])
    zeros = padded(weight[:, 0] if bias is None else bias, x)
    if bias is None:
        zeros[:] = 0
    before = state.mT.to(x.dtype).contiguous()
    return *lines(x), array(before), taps, zeros, np.array(widths)


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bring gradients to one dtype: compiled loops take arrays of one type side by side."""
    dtype = tensors[0].dtype
    return [x.to(dtype) for x in tensors]
