"""Mamba's selective scan as compiled loops over tokens, 32 channels at a time.

Forward, for a slab of 32 channels whose state is N rows of 32 numbers in the first-level cache:

    E = exp(dt a)        S = E S + (dt x) b_n        y = sum_n c_n S

Backward, chunk by chunk from the last: a replay from the state before the chunk keeps S and E of
its tokens, then dS runs backwards:

    dS += c_n dy         d c_n = sum(dy S)           d b_n = sum(dS dt x)
    d(dt x) = sum_n dS b_n                           d(dt a) = dS E S_{t-1}       dS <- E dS

Sums over channels are kept as rows of 32 until every slab has added its share.

Legend: W channels filled up with zeros to whole slabs; c chunk, first its first token, T its
tokens; a is given turned, slab by slab [W/32, N, 32], and so are states.
"""

import numpy as np

from mad_kernels.lanes import LANES, aligned_zeros, compile_loop, copy, exp, fma, load, mul, spread, store, total


@compile_loop
def forward(x, dt, a, b, c, S, C, y, states):
    """Fill `y`, run `S` [B, W/32 * N * 32] to the last state, keep it before each chunk."""
    B, L, D = x.shape
    N = b.shape[2]
    W = -(-D // LANES) * LANES
    X, dT = aligned_zeros(C * W, x.dtype), aligned_zeros(C * W, x.dtype)
    own = aligned_zeros(W * N, x.dtype)
    A = aligned_zeros(W * N, x.dtype)
    A[:] = a
    for s in range(B):
        own[:] = S[s]
        for chunk in range(-(-L // C)):
            first = chunk * C
            T = min(C, L - first)
            _gather(x, s, first, T, X, W)
            _gather(dt, s, first, T, dT, W)
            if states.size:
                states[s, chunk] = own
            for d in range(0, W, LANES):
                slab = own[d * N : (d + LANES) * N]
                _read(slab, A[d * N : (d + LANES) * N], X, dT, b[s], c[s], first, T, d, W, N)
            _scatter(X, W, y, s, first, T)
        S[s] = own


@compile_loop
def _read(S, A, X, dT, b, c, first, T, d, W, N):
    """Run a slab over a chunk; X turns into y."""
    zero = spread(np.zeros(1, X.dtype), 0)
    read, asked = b.reshape(b.size), c.reshape(c.size)
    for t in range(T):
        step = load(dT, t * W + d)
        poured = mul(step, load(X, t * W + d))
        y = zero
        for n in range(N):
            at = n * LANES
            now = (first + t) * N + n
            s = mul(exp(mul(step, load(A, at))), load(S, at))
            s = fma(poured, spread(read, now), s)
            store(S, at, s)
            y = fma(spread(asked, now), s, y)
        store(X, t * W + d, y)


@compile_loop
def backward(x, dt, a, b, c, states, dy, C, dS, dx, ddt, da, db, dc):
    """Fill `dx` to `dc`, and run `dS` from the last state's gradient to the first's."""
    B, L, D = x.shape
    N = b.shape[2]
    W = -(-D // LANES) * LANES
    X, dT, dY = (aligned_zeros(C * W, x.dtype), aligned_zeros(C * W, x.dtype), aligned_zeros(C * W, x.dtype))
    dA, A = aligned_zeros(W * N, x.dtype), aligned_zeros(W * N, x.dtype)
    walk = aligned_zeros((C + 1) * N * LANES, x.dtype)
    E = aligned_zeros(C * N * LANES, x.dtype)
    by_b, by_c = aligned_zeros(C * N * LANES, x.dtype), aligned_zeros(C * N * LANES, x.dtype)
    own = aligned_zeros(W * N, x.dtype)
    A[:] = a
    da[:] = 0
    for s in range(B):
        own[:] = dS[s]
        for chunk in range(-(-L // C) - 1, -1, -1):
            first = chunk * C
            T = min(C, L - first)
            _gather(x, s, first, T, X, W)
            _gather(dt, s, first, T, dT, W)
            _gather(dy, s, first, T, dY, W)
            dA[:] = 0  # of one chunk: a sum of sums keeps its digits over many tokens
            by_b[:] = 0
            by_c[:] = 0
            for d in range(0, W, LANES):
                at, end = d * N, (d + LANES) * N
                walk[: N * LANES] = states[s, chunk, at:end]
                _replay(walk, A[at:end], E, X, dT, b[s], first, T, d, W, N)
                _pull(own[at:end], A[at:end], dA[at:end], walk, E, X, dT, dY, b[s], c[s], by_b, by_c, first, T, d, W, N)
            for t in range(T):
                for n in range(N):
                    at = (t * N + n) * LANES
                    db[s, first + t, n] = total(load(by_b, at))
                    dc[s, first + t, n] = total(load(by_c, at))
            _scatter(X, W, dx, s, first, T)
            _scatter(dT, W, ddt, s, first, T)
            da += dA
        dS[s] = own


@compile_loop
def _replay(walk, A, E, X, dT, b, first, T, d, W, N):
    """Run a slab over a chunk again and keep every state and decay."""
    read = b.reshape(b.size)
    for t in range(T):
        step = load(dT, t * W + d)
        poured = mul(step, load(X, t * W + d))
        for n in range(N):
            at = (t * N + n) * LANES
            decay = exp(mul(step, load(A, n * LANES)))
            store(E, at, decay)
            s = fma(poured, spread(read, (first + t) * N + n), mul(decay, load(walk, at)))
            store(walk, at + N * LANES, s)


@compile_loop
def _pull(dS, A, dA, walk, E, X, dT, dY, b, c, by_b, by_c, first, T, d, W, N):
    """Run a slab of dS back over a chunk; X turns into dx and dT into d dt."""
    zero = spread(np.zeros(1, X.dtype), 0)
    read, asked = b.reshape(b.size), c.reshape(c.size)
    for t in range(T - 1, -1, -1):
        step, token, out = load(dT, t * W + d), load(X, t * W + d), load(dY, t * W + d)
        poured = mul(step, token)
        d_poured, d_step = zero, zero
        for n in range(N):
            at, row = (t * N + n) * LANES, n * LANES
            now = (first + t) * N + n
            s = fma(out, spread(asked, now), load(dS, row))
            store(by_c, at, fma(out, load(walk, at + N * LANES), load(by_c, at)))
            store(by_b, at, fma(s, poured, load(by_b, at)))
            d_poured = fma(s, spread(read, now), d_poured)
            s = mul(s, load(E, at))
            store(dS, row, s)
            exponent = mul(s, load(walk, at))
            d_step = fma(exponent, load(A, row), d_step)
            store(dA, row, fma(exponent, step, load(dA, row)))
        store(X, t * W + d, mul(d_poured, step))
        store(dT, t * W + d, fma(d_poured, token, d_step))


@compile_loop
def _gather(x, s, first, T, into, W):
    _, L, D = x.shape
    flat = x.reshape(x.size)
    for t in range(T):
        into[t * W + D : (t + 1) * W] = 0
        copy(into, t * W, flat, (s * L + first + t) * D, D)


@compile_loop
def _scatter(x, W, into, s, first, T):
    _, L, D = into.shape
    flat = into.reshape(into.size)
    for t in range(T):
        copy(flat, (s * L + first + t) * D, x, t * W, D)
