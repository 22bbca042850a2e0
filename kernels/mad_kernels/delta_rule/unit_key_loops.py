"""Unit vectors and norms as compiled loops over rows of D numbers: one pass each way.

    key = x / norm,  norm = max(|x|, floor)
    dx = d_key / norm + key (d_norm - (d_key . key) / norm)     the bracket 0 where the floor held

Legend: R rows, the number of norms; `tail` what is left of a row behind its last 32 numbers.
"""

import numpy as np

from mad_kernels.lanes import LANES, aligned_zeros, compile_loop, copy, fma, load, mul, spread, store, total


@compile_loop
def forward(x, floor, key, norm):
    """Fill `key`, flat like `x`, and `norm`."""
    R, D = norm.size, x.size // max(norm.size, 1)
    rest = D % LANES
    tail, out = aligned_zeros(LANES, x.dtype), aligned_zeros(LANES, x.dtype)
    factor = np.zeros(2, x.dtype)
    for r in range(R):
        at, end = r * D, (r + 1) * D - rest
        copy(tail, 0, x, end, rest)
        last = load(tail, 0)
        squares = mul(last, last)
        for j in range(at, end, LANES):
            row = load(x, j)
            squares = fma(row, row, squares)
        factor[0] = np.sqrt(total(squares))
        if factor[0] < floor:
            factor[0] = floor
        norm[r] = factor[0]
        factor[1] = 1 / factor[0]
        scale = spread(factor, 1)
        for j in range(at, end, LANES):
            store(key, j, mul(scale, load(x, j)))
        store(out, 0, mul(scale, last))
        copy(key, end, out, 0, rest)


@compile_loop
def backward(key, norm, d_key, d_norm, floor, dx):
    """Fill `dx`, flat like `key`."""
    R, D = norm.size, key.size // max(norm.size, 1)
    rest = D % LANES
    tail, d_tail = aligned_zeros(LANES, key.dtype), aligned_zeros(LANES, key.dtype)
    out = aligned_zeros(LANES, key.dtype)
    factor = np.zeros(2, key.dtype)
    for r in range(R):
        at, end = r * D, (r + 1) * D - rest
        copy(tail, 0, key, end, rest)
        copy(d_tail, 0, d_key, end, rest)
        last, d_last = load(tail, 0), load(d_tail, 0)
        along = mul(last, d_last)
        for j in range(at, end, LANES):
            along = fma(load(key, j), load(d_key, j), along)
        factor[0], factor[1] = 1 / norm[r], 0
        if norm[r] > floor:
            factor[1] = d_norm[r] - total(along) * factor[0]
        scale, pull = spread(factor, 0), spread(factor, 1)
        for j in range(at, end, LANES):
            store(dx, j, fma(pull, load(key, j), mul(scale, load(d_key, j))))
        store(out, 0, fma(pull, last, mul(scale, d_last)))
        copy(dx, end, out, 0, rest)
