"""The delta rule as compiled loops over tokens, the state held in the first-level cache.

Forward, with P the decayed state g S_{t-1}, g = exp(log_decay):

    u = w v - e P^T k            S = P + k u^T            o = S^T q

Backward. Only u is kept from the forward, and S^T before each chunk. The chunks are walked from the
last to the first; in each, dS runs backwards, then S^T forwards, then dS^T backwards:

    dS += q do^T     du = dS^T k     dS <- g (dS + k dr^T),  dr = -e du           `_pull`
    z = P du         dq = S do       d erase = -k z                               `_replay`
    dk = dS u - e z                  d log_decay = sum(dP * P)                    `_pull_turned`
    dv = w du        d write = du v

S and S^T are two layouts of one matrix: every sum then runs down the rows of a slab of 32 columns,
in registers, and none across a register. The columns of a state never meet, so each slab goes
through a whole chunk alone. One pass over a slab updates the state by one token, reads the result,
and begins the next token.

Legend: e erase, w write, g decay (None without), R the rows g dr; Wk, Wv widths filled up with
zeros to whole slabs; b sequence, h head, c chunk, first its first token, T its tokens.

Source: the pseudo values u are those of arXiv 2406.06484; the backward is ours.
Departures: dS twice in place of sums across registers; no sum of earlier gradients in d log_decay,
which would cancel under strong decay.
"""

import numpy as np

from mad_kernels.lanes import (
    LANES,
    add,
    aligned_zeros,
    compile_loop,
    filled,
    fma,
    from_slabs,
    gather,
    load,
    mul,
    scatter,
    spread,
    store,
    to_slabs,
    to_slabs_turned,
    total,
)


@compile_loop
def forward(q, k, v, e, w, g, state, C, o, final, U, states):
    """Fill `o` and `final`; and, unless `states` is empty, `U` and S^T before each chunk."""
    B, L, H, Dk = k.shape
    Dv = v.shape[3]
    Wk, Wv = filled(Dk), filled(Dv)
    rows = Dk + Dk % 2
    size = rows * Wv
    dtype = v.dtype
    Q, K = aligned_zeros(C * Wk, dtype), aligned_zeros((C + 1) * Wk, dtype)
    V, out = aligned_zeros(C * Wv, dtype), aligned_zeros(C * Wv, dtype)
    S = aligned_zeros(H * size, dtype)
    for b in range(B):
        for h in range(H):
            to_slabs(state[b, h], S[h * size : (h + 1) * size], rows)
        for c in range(-(-L // C)):
            first = c * C
            T = min(C, L - first)
            for h in range(H):
                gather(q, b, first, h, T, Q, Wk)
                gather(k, b, first, h, T, K, Wk)
                gather(v, b, first, h, T, V, Wv)
                own = S[h * size : (h + 1) * size]
                if states.size:
                    from_slabs(own, states[c, b, h], rows)
                for j in range(0, Wv, LANES):
                    slab = own[j * rows : (j + LANES) * rows]
                    _read(slab, rows, Q, K, V, out, e, w, g, b, first, h, T, j, Wk, Wv)
                scatter(out, Wv, o, b, first, h, T)
                if states.size:
                    scatter(V, Wv, U, b, first, h, T)
        for h in range(H):
            from_slabs(S[h * size :], final[b, h], rows)


@compile_loop
def _read(S, rows, Q, K, V, out, e, w, g, b, first, h, T, j, Wk, Wv):
    """Run a slab of S over a chunk; V turns into u. What the last token recalls is not used."""
    factor = np.zeros(4, V.dtype)
    zero = spread(factor, 3)
    r0, r1 = zero, zero
    for i in range(0, rows, 2):
        r0 = fma(spread(K, i), load(S, i * LANES), r0)
        r1 = fma(spread(K, i + 1), load(S, (i + 1) * LANES), r1)
    for t in range(T):
        factor[0] = w[b, first + t, h]
        factor[1] = -e[b, first + t, h]
        if g is not None:
            factor[2] = g[b, first + t, h]
            factor[1] *= factor[2]
        decay = spread(factor, 2)
        u = mul(spread(factor, 0), load(V, t * Wv + j))
        u = fma(spread(factor, 1), add(r0, r1), u)
        store(V, t * Wv + j, u)
        r0, r1, o0, o1 = zero, zero, zero, zero
        now, later = t * Wk, (t + 1) * Wk
        for i in range(0, rows, 2):
            s0, s1 = load(S, i * LANES), load(S, (i + 1) * LANES)
            if g is not None:
                s0, s1 = mul(decay, s0), mul(decay, s1)
            s0 = fma(spread(K, now + i), u, s0)
            s1 = fma(spread(K, now + i + 1), u, s1)
            store(S, i * LANES, s0)
            store(S, (i + 1) * LANES, s1)
            o0 = fma(spread(Q, now + i), s0, o0)
            o1 = fma(spread(Q, now + i + 1), s1, o1)
            r0 = fma(spread(K, later + i), s0, r0)
            r1 = fma(spread(K, later + i + 1), s1, r1)
        store(out, t * Wv + j, add(o0, o1))


@compile_loop
def backward(q, k, v, e, w, g, states, U, d_out, d_final, C, dq, dk, dv, de, dw, dg, d_initial):
    """Fill the gradients `dq` to `d_initial`; dg, by log_decay, has to come in as zeros."""
    B, L, H, Dk = k.shape
    Dv = v.shape[3]
    Wk, Wv = filled(Dk), filled(Dv)
    rows, columns = Dk + Dk % 2, Dv + Dv % 2
    size, turned = rows * Wv, columns * Wk
    dtype = v.dtype
    Q, K = aligned_zeros(C * Wk, dtype), aligned_zeros((C + 1) * Wk, dtype)
    dQ, dK = aligned_zeros(C * Wk, dtype), aligned_zeros(C * Wk, dtype)
    Z = aligned_zeros(C * Wk, dtype)
    u, do = aligned_zeros(C * Wv, dtype), aligned_zeros(C * Wv, dtype)
    du, R = aligned_zeros(C * Wv, dtype), aligned_zeros((C + 1) * Wv, dtype)
    dS, dSt = aligned_zeros(H * size, dtype), aligned_zeros(H * turned, dtype)
    St = aligned_zeros(turned, dtype)
    # Under decay, S^T after every token of the chunk; else one slab, updated in place.
    walk = aligned_zeros((1 if g is None else C + 1) * columns * LANES, dtype)
    for b in range(B):
        for h in range(H):
            to_slabs(d_final[b, h], dS[h * size : (h + 1) * size], rows)
            to_slabs_turned(d_final[b, h], dSt[h * turned : (h + 1) * turned], columns)
        for c in range(-(-L // C) - 1, -1, -1):
            first = c * C
            T = min(C, L - first)
            for h in range(H):
                gather(q, b, first, h, T, Q, Wk)
                gather(k, b, first, h, T, K, Wk)
                gather(U, b, first, h, T, u, Wv)
                gather(d_out, b, first, h, T, do, Wv)
                # Behind the chunk lie old numbers: times zero they vanish, if they are finite.
                K[T * Wk : (T + 1) * Wk] = 0
                R[T * Wv : (T + 1) * Wv] = 0
                for j in range(0, Wv, LANES):
                    at = h * size + j * rows
                    slab = dS[at : at + rows * LANES]
                    _pull(slab, rows, Q, K, do, du, R, e, g, b, first, h, T, j, Wk, Wv)
                to_slabs_turned(states[c, b, h], St, columns)
                for i in range(0, Wk, LANES):
                    walk[: columns * LANES] = St[i * columns : (i + LANES) * columns]
                    _replay(walk, columns, K, u, do, du, Z, dQ, g, b, first, h, T, i, Wk, Wv)
                    at = h * turned + i * columns
                    slab = dSt[at : at + columns * LANES]
                    _pull_turned(slab, columns, walk, Q, K, u, do, R, dK, g, dg, b, first, h, T, i, Wk, Wv)
                gather(v, b, first, h, T, do, Wv)
                _finish(K, do, e, w, Z, dK, du, b, first, h, T, Wk, Wv, de, dw)
                scatter(dQ, Wk, dq, b, first, h, T)
                scatter(dK, Wk, dk, b, first, h, T)
                scatter(du, Wv, dv, b, first, h, T)
        for h in range(H):
            from_slabs(dS[h * size :], d_initial[b, h], rows)


@compile_loop
def _pull(dS, rows, Q, K, do, du, R, e, g, b, first, h, T, j, Wk, Wv):
    """Run a slab of dS back over a chunk: du, and R."""
    factor = np.zeros(3, do.dtype)
    factor[0] = 1
    zero = spread(factor, 2)
    pulled = zero
    for t in range(T - 1, -1, -1):
        decay = spread(factor, 0)
        out = load(do, t * Wv + j)
        u0, u1 = zero, zero
        now, later = t * Wk, (t + 1) * Wk
        for i in range(0, rows, 2):
            s0, s1 = load(dS, i * LANES), load(dS, (i + 1) * LANES)
            if g is not None:
                s0, s1 = mul(decay, s0), mul(decay, s1)
            s0 = fma(spread(K, later + i), pulled, s0)
            s1 = fma(spread(K, later + i + 1), pulled, s1)
            s0 = fma(spread(Q, now + i), out, s0)
            s1 = fma(spread(Q, now + i + 1), out, s1)
            store(dS, i * LANES, s0)
            store(dS, (i + 1) * LANES, s1)
            u0 = fma(spread(K, now + i), s0, u0)
            u1 = fma(spread(K, now + i + 1), s1, u1)
        store(du, t * Wv + j, add(u0, u1))
        factor[1] = -e[b, first + t, h]
        if g is not None:
            factor[0] = g[b, first + t, h]
            factor[1] *= factor[0]
        pulled = mul(spread(factor, 1), add(u0, u1))
        store(R, t * Wv + j, pulled)
    decay = spread(factor, 0)
    for i in range(rows):
        s0 = mul(decay, load(dS, i * LANES))
        store(dS, i * LANES, fma(spread(K, i), pulled, s0))


@compile_loop
def _replay(walk, columns, K, u, do, du, Z, dQ, g, b, first, h, T, i, Wk, Wv):
    """Run a slab of S^T over a chunk: z and dq; under decay, keep it after every token."""
    factor = np.zeros(2, u.dtype)
    zero = spread(factor, 1)
    step = 0 if g is None else columns * LANES
    for t in range(T):
        if g is not None:
            factor[0] = g[b, first + t, h]
        decay = spread(factor, 0)
        key = load(K, t * Wk + i)
        z0, z1, q0, q1 = zero, zero, zero, zero
        now = t * Wv
        for j in range(0, columns, 2):
            at = t * step + j * LANES
            s0, s1 = load(walk, at), load(walk, at + LANES)
            if g is not None:
                s0, s1 = mul(decay, s0), mul(decay, s1)
            z0 = fma(spread(du, now + j), s0, z0)
            z1 = fma(spread(du, now + j + 1), s1, z1)
            s0 = fma(spread(u, now + j), key, s0)
            s1 = fma(spread(u, now + j + 1), key, s1)
            store(walk, at + step, s0)
            store(walk, at + step + LANES, s1)
            q0 = fma(spread(do, now + j), s0, q0)
            q1 = fma(spread(do, now + j + 1), s1, q1)
        store(Z, t * Wk + i, add(z0, z1))
        store(dQ, t * Wk + i, add(q0, q1))


@compile_loop
def _pull_turned(dSt, columns, walk, Q, K, u, do, R, dK, g, dg, b, first, h, T, i, Wk, Wv):
    """Run a slab of dS^T back over a chunk: dS u, and the slab's share of d log_decay."""
    factor = np.zeros(2, u.dtype)
    factor[0] = 1
    zero = spread(factor, 1)
    step = 0 if g is None else columns * LANES
    for t in range(T - 1, -1, -1):
        decay = spread(factor, 0)
        query, key = load(Q, t * Wk + i), load(K, (t + 1) * Wk + i)
        k0, k1, p0, p1 = zero, zero, zero, zero
        now, later = t * Wv, (t + 1) * Wv
        for j in range(0, columns, 2):
            s0, s1 = load(dSt, j * LANES), load(dSt, (j + 1) * LANES)
            if g is not None:
                s0, s1 = mul(decay, s0), mul(decay, s1)
            s0 = fma(spread(R, later + j), key, s0)
            s1 = fma(spread(R, later + j + 1), key, s1)
            if g is not None:
                at = (t + 1) * step + j * LANES
                p0 = fma(s0, load(walk, at), p0)
                p1 = fma(s1, load(walk, at + LANES), p1)
            s0 = fma(spread(do, now + j), query, s0)
            s1 = fma(spread(do, now + j + 1), query, s1)
            store(dSt, j * LANES, s0)
            store(dSt, (j + 1) * LANES, s1)
            k0 = fma(spread(u, now + j), s0, k0)
            k1 = fma(spread(u, now + j + 1), s1, k1)
        store(dK, t * Wk + i, add(k0, k1))
        if g is not None:
            factor[0] = g[b, first + t, h]
            if t + 1 < T:  # the token after the chunk has had its share from its own chunk
                dg[b, first + t + 1, h] += total(add(p0, p1))
    decay = spread(factor, 0)
    key = load(K, i)
    p0 = zero
    for j in range(columns):
        s0 = fma(spread(R, j), key, mul(decay, load(dSt, j * LANES)))
        store(dSt, j * LANES, s0)
        p0 = fma(s0, load(walk, j * LANES), p0)
    if g is not None:
        dg[b, first, h] += total(p0)


@compile_loop
def _finish(K, V, e, w, Z, dK, du, b, first, h, T, Wk, Wv, de, dw):
    """Put the parts of dk together, turn du into dv, and sum up d erase and d write."""
    factor = np.zeros(3, V.dtype)
    zero = spread(factor, 2)
    for t in range(T):
        factor[0], factor[1] = -e[b, first + t, h], w[b, first + t, h]
        erase, write = spread(factor, 0), spread(factor, 1)
        by_erase, by_write = zero, zero
        for i in range(t * Wk, (t + 1) * Wk, LANES):
            z = load(Z, i)
            by_erase = fma(z, load(K, i), by_erase)
            store(dK, i, fma(erase, z, load(dK, i)))
        for j in range(t * Wv, (t + 1) * Wv, LANES):
            update = load(du, j)
            by_write = fma(update, load(V, j), by_write)
            store(du, j, mul(write, update))
        de[b, first + t, h], dw[b, first + t, h] = -total(by_erase), total(by_write)
