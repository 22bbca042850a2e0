"""Parts that the GPU kernels share: products, the decay inside a chunk, the inverse of I + A.

They are called inside kernels only, on one chunk of C tokens held by one program. A name of a
product says how its operands are rounded before they are multiplied; sums are always float32:

    "ieee"    not at all              "tf32x3"  to two tf32 terms, about 2^-21
    "tf32"    to tf32, 2^-11          "bf16"    to bfloat16, 2^-9

`mad_kernels.decay` holds the same equations for the decay, with their derivation.

Importing this module imports triton; only the GPU backends do so, and only when they run.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor


def interpreted() -> bool:
    """Say whether kernels run in triton's interpreter, on tensors in the memory of the CPU."""
    return not isinstance(dot, triton.runtime.JITFunction)


def padded(width: int) -> int:
    """Round a width up to what a matrix product takes: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def readable(x: Tensor | None, otherwise: Tensor) -> Tensor:
    """Prepare an operand: contiguous, and float32 in the interpreter, which garbles bfloat16.

    An operand that is None becomes `otherwise`, which the kernel does not read.
    """
    if x is None:
        return otherwise
    return (x.float() if interpreted() else x).contiguous()


@no_type_check  # sizes are symbols while torch.compile traces
def writable(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make room for a result: of `dtype`, but float32 in the interpreter."""
    return like.new_empty(shape, dtype=torch.float32 if interpreted() else dtype)


@triton.jit
@no_type_check
def dot(x, y, PRODUCT: tl.constexpr):
    """Multiply two matrices, with their elements rounded as `PRODUCT` says."""
    if PRODUCT == "bf16":
        product = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16))
    else:
        product = tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRODUCT)
    return product


@triton.jit
@no_type_check
def long_dot(x, y, PRODUCT: tl.constexpr):
    """Multiply [M K] by [K N] as a sum over parts of K, at most 32 wide.

    Operands of a product sit in registers whole, in three roundings for "tf32x3": parts of them
    spill nothing.
    """
    M: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    N: tl.constexpr = y.shape[1]
    if K <= 32:
        product = dot(x, y, PRODUCT)
    else:
        x0, x1 = tl.split(tl.permute(tl.reshape(x, (M, 2, K // 2)), (0, 2, 1)))
        y0, y1 = tl.split(tl.permute(tl.reshape(y, (2, K // 2, N)), (1, 2, 0)))
        product = long_dot(x0, y0, PRODUCT) + long_dot(x1, y1, PRODUCT)
    return product


@triton.jit
@no_type_check
def unit_lower_inverse(A, C: tl.constexpr, LEVELS: tl.constexpr):
    """Invert I + A, A strictly lower triangular, by doubling the solved diagonal blocks.

    Level by level, T - T (A * M) T with M the lower left quarter of each block; C is 2^LEVELS.
    """
    i = tl.arange(0, C)
    T = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for level in tl.static_range(LEVELS):
        block = i >> level
        odd = (block[:, None] & 1) == 1
        step = tl.where(odd & (block[:, None] - 1 == block[None, :]), A, 0.0)
        if level == 0:
            T -= step
        else:
            T -= dot(T, dot(step, T, "ieee"), "ieee")
    return T


@triton.jit
@no_type_check
def load_tokens(pointer, at, here):
    """Load one number per token as float32, 0 past the end."""
    return tl.load(pointer + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def store_tokens(pointer, at, here, x):
    """Store one number per token."""
    tl.store(pointer + at, x.to(pointer.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def decay_ends(log_decay, C: tl.constexpr):
    """Compute inside [C], rest [C] and whole of `mad_kernels.decay`."""
    i = tl.arange(0, C)
    later = i[:, None] > i[None, :]
    # exp(-1e4) is 0: the floor changes no factor, and keeps -inf out of 0 * -inf.
    steps = tl.maximum(log_decay, -1e4)
    inside = tl.exp(tl.sum(tl.where(later, 0.0, steps[:, None]), axis=0))
    rest = tl.exp(tl.sum(tl.where(later, steps[:, None], 0.0), axis=0))
    return inside, rest, tl.exp(tl.sum(steps, axis=0))


@triton.jit
@no_type_check
def decay_pairs(log_decay, C: tl.constexpr):
    """Compute pairs [C C] of `mad_kernels.decay`."""
    i = tl.arange(0, C)
    after = tl.where(i[:, None] > i[None, :], tl.maximum(log_decay, -1e4)[:, None], 0.0)  # [m, j]
    # Added up as they stand: a difference of two long sums would lose the digits of a short one.
    between = tl.cumsum(after, axis=0)
    return tl.where(i[:, None] >= i[None, :], tl.exp(between), 0.0)


@triton.jit
@no_type_check
def log_decay_gradient(by_inside, by_rest, by_pairs, by_whole, C: tl.constexpr):
    """Gather the gradient of the log decay [C] from that of the exponents of its factors."""
    i = tl.arange(0, C)
    upto = tl.cumsum(by_pairs, axis=1)  # [i, m]: summed over j <= m
    # What crosses from m to m + 1 belongs to m + 1: moved there by the second sum.
    crossing = tl.sum(tl.where(i[:, None] > i[None, :], upto, 0.0), axis=0)
    crossing = tl.where(i[:, None] == i[None, :] + 1, tl.expand_dims(crossing, 0), 0.0)
    crossing = tl.sum(crossing, axis=1)
    late = tl.where(i[:, None] >= i[None, :], by_inside[:, None], by_rest[:, None])
    return by_whole + crossing + tl.sum(late, axis=0)
