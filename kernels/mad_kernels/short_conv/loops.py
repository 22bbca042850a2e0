"""The short convolution and its activation as compiled loops over tokens: one pass each way.

    line = [state, x]    z_t = bias + sum_j taps[j] line_{t+j},  j in 0..K-1    y = act(z)

    d line_m = sum_j taps[j] dz_{m-j}       d taps[j] = sum_t dz_t line_{t+j}

The last K rows of the line, and of dz, stand in rings in the first-level cache: a row of all
channels is read once, and nothing but inputs is kept for the backward, which computes z again.
Shares of d taps are added per sequence. Outputs may be cut along the channels: a part is an array.

Legend: W channels, filled up to whole vectors; `step` the distance between tokens in memory.
"""

import numpy as np

from mad_kernels.lanes import (
    LANES,
    add,
    aligned_zeros,
    compile_loop,
    fetch,
    fma,
    load,
    mul,
    put,
    sigmoid,
    spread,
    store,
    sub,
)


@compile_loop
def forward(x, step, state, taps, bias, silu, L, widths, parts):
    """Fill `parts`, arrays of B L rows each.

    Args:
        state: The K-1 rows before each sequence, flat [B K-1 D].
        taps: Flat [K W].
        bias: [W].
        widths: Channels of each part; their sum is D.
    """
    D, W = widths.sum(), bias.size
    K = taps.size // W
    ring, out = aligned_zeros(K * W, taps.dtype), aligned_zeros(W, taps.dtype)
    places = np.zeros(K, np.intp)  # in the ring, of what each tap meets
    for b in range(parts[0].size // (L * widths[0])):
        for m in range(K - 1):
            widen(state, (b * (K - 1) + m) * D, D, ring, m * W)
        for t in range(L):
            row = b * L + t
            for i in range(K):
                places[i] = (t + i) % K * W
            widen(x, row * step, D, ring, places[K - 1])
            for j in range(0, W, LANES):
                z = convolved(ring, places, taps, bias, j)
                if silu:
                    z = mul(z, sigmoid(z))
                store(out, j, z)
            at = 0
            for p in range(len(parts)):
                width = widths[p]
                for j in range(0, width, LANES):
                    put(parts[p], row * width + j, fetch(out, at + j, width - j), width - j)
                at += width


@compile_loop
def backward(x, step, state, taps, bias, silu, L, widths, d_parts, steps, ones, dx, d_state, d_taps, d_bias):
    """Fill `dx`, `d_state`, and add to `d_taps` and `d_bias`, all zeros.

    Args:
        d_parts: Gradients of the parts.
        steps: The distance between tokens of each.
        ones: One number, 1.
    """
    D, W = widths.sum(), bias.size
    K = taps.size // W
    one = spread(ones, 0)
    ring, slopes = aligned_zeros(K * W, taps.dtype), aligned_zeros(K * W, taps.dtype)
    shares, dy = aligned_zeros((K + 1) * W, taps.dtype), aligned_zeros(W, taps.dtype)
    nothing = load(dy, 0)
    places, behind = np.zeros(K, np.intp), np.zeros(K, np.intp)
    for b in range(dx.size // (L * D)):
        slopes[:] = 0
        for m in range(K - 1):
            widen(state, (b * (K - 1) + m) * D, D, ring, m * W)
        for m in range(L + K - 1):
            for i in range(K):
                places[i] = (m + i) % K * W
                behind[i] = (m - i + K) % K * W
            into = behind[0]
            if m < L:
                widen(x, (b * L + m) * step, D, ring, places[K - 1])
                at = 0
                for p in range(len(d_parts)):
                    widen(d_parts[p], (b * L + m) * steps[p], widths[p], dy, at)
                    at += widths[p]
                for j in range(0, W, LANES):
                    dz = load(dy, j)
                    if silu:
                        z = convolved(ring, places, taps, bias, j)
                        s = sigmoid(z)
                        dz = mul(dz, mul(s, fma(z, sub(one, s), one)))
                    store(slopes, into + j, dz)
                    for i in range(K):
                        place = i * W + j
                        row = load(ring, places[i] + j)
                        store(shares, place, fma(dz, row, load(shares, place)))
                    store(shares, K * W + j, add(dz, load(shares, K * W + j)))
            else:
                slopes[into : into + W] = 0
            for j in range(0, D, LANES):
                d_line = nothing
                for i in range(K):
                    d_line = fma(load(taps, i * W + j), load(slopes, behind[i] + j), d_line)
                if m < K - 1:
                    put(d_state, (b * (K - 1) + m) * D + j, d_line, D - j)
                else:
                    put(dx, (b * L + m - (K - 1)) * D + j, d_line, D - j)
        for j in range(0, K * W, LANES):
            store(d_taps, j, add(load(d_taps, j), load(shares, j)))
        for j in range(0, W, LANES):
            store(d_bias, j, add(load(d_bias, j), load(shares, K * W + j)))
        shares[:] = 0


@compile_loop
def widen(x, at, width, into, place):
    """Copy numbers into scratch, in its own type."""
    for j in range(0, width, LANES):
        put(into, place + j, fetch(x, at + j, width - j), width - j)


@compile_loop
def convolved(ring, places, taps, bias, j):
    """Give z of the 32 channels from j on."""
    z = load(bias, j)
    for i in range(places.size):
        z = fma(load(taps, i * bias.size + j), load(ring, places[i] + j), z)
    return z
