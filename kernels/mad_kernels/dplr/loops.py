"""Diagonal plus low rank as compiled loops over tokens, the state held in the first-level cache.

Forward, with g = exp(log_decay) and S the state before the token:

    r = S^T b            S <- diag(g) S + a r^T + k v^T            o = S^T q

Backward. Only r is kept from the forward, and S before each chunk. The chunks are walked from the
last to the first; in each, dS runs backwards, then S^T forwards, then dS^T backwards:

    dS += q do^T     dv = dS^T k     dr = dS^T a     dS <- diag(g) dS + b dr^T    `_pull`
    db = S_{t-1} dr  dq = S_t do                                                  `_replay`
    dk = dS v        da = dS r       d log_decay = g sum_j(dS * S_{t-1})_j        `_pull_turned`

As in `delta_rule.loops`, S and S^T are two layouts of one matrix, cut into slabs of 32 columns, so
that every sum runs down the rows of a slab in registers; the columns of a state never meet, and
each slab goes through a whole chunk alone. The replay keeps S^T after every token of the chunk:
d log_decay is a sum of products, where a running sum of earlier gradients would cancel under strong
decay. `a` and `b` are arrays or None together; None leaves out r and all that comes of it.

Legend: G the factors g of a chunk; Wk, Wv widths filled up with zeros to whole slabs; s sequence,
h head, c chunk, first its first token, T its tokens.
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
)


@compile_loop
def forward(q, k, v, g, a, b, state, C, o, final, recalled, states):
    """Fill `o` and `final`; and, unless `states` is empty, `recalled` and S before each chunk."""
    Bs, L, H, Dk = k.shape
    Dv = v.shape[3]
    Wk, Wv = filled(Dk), filled(Dv)
    rows = Dk + Dk % 2
    size = rows * Wv
    dtype = v.dtype
    Q, K, G = (aligned_zeros(C * Wk, dtype), aligned_zeros(C * Wk, dtype), aligned_zeros(C * Wk, dtype))
    A, B = aligned_zeros(C * Wk, dtype), aligned_zeros((C + 1) * Wk, dtype)
    V, R = aligned_zeros(C * Wv, dtype), aligned_zeros(C * Wv, dtype)
    S = aligned_zeros(H * size, dtype)
    for s in range(Bs):
        for h in range(H):
            to_slabs(state[s, h], S[h * size : (h + 1) * size], rows)
        for c in range(-(-L // C)):
            first = c * C
            T = min(C, L - first)
            for h in range(H):
                gather(q, s, first, h, T, Q, Wk)
                gather(k, s, first, h, T, K, Wk)
                gather(g, s, first, h, T, G, Wk)
                gather(v, s, first, h, T, V, Wv)
                if a is not None:
                    gather(a, s, first, h, T, A, Wk)
                    gather(b, s, first, h, T, B, Wk)
                own = S[h * size : (h + 1) * size]
                if states.size:
                    from_slabs(own, states[s, h, c], rows)
                for j in range(0, Wv, LANES):
                    slab = own[j * rows : (j + LANES) * rows]
                    _read(slab, rows, Q, K, G, a, A, B, V, R, T, j, Wk, Wv)
                scatter(V, Wv, o, s, first, h, T)
                if a is not None and states.size:
                    scatter(R, Wv, recalled, s, first, h, T)
        for h in range(H):
            from_slabs(S[h * size :], final[s, h], rows)


@compile_loop
def _read(S, rows, Q, K, G, a, A, B, V, R, T, j, Wk, Wv):
    """Run a slab of S over a chunk; V turns into o. What the last token reads ahead is not used."""
    zero = spread(np.zeros(1, V.dtype), 0)
    r0, r1 = zero, zero
    if a is not None:
        for i in range(0, rows, 2):
            r0 = fma(spread(B, i), load(S, i * LANES), r0)
            r1 = fma(spread(B, i + 1), load(S, (i + 1) * LANES), r1)
    for t in range(T):
        value, read = load(V, t * Wv + j), add(r0, r1)
        if a is not None:
            store(R, t * Wv + j, read)
        r0, r1, o0, o1 = zero, zero, zero, zero
        now, later = t * Wk, (t + 1) * Wk
        for i in range(0, rows, 2):
            s0 = mul(spread(G, now + i), load(S, i * LANES))
            s1 = mul(spread(G, now + i + 1), load(S, (i + 1) * LANES))
            if a is not None:
                s0 = fma(spread(A, now + i), read, s0)
                s1 = fma(spread(A, now + i + 1), read, s1)
            s0 = fma(spread(K, now + i), value, s0)
            s1 = fma(spread(K, now + i + 1), value, s1)
            store(S, i * LANES, s0)
            store(S, (i + 1) * LANES, s1)
            o0 = fma(spread(Q, now + i), s0, o0)
            o1 = fma(spread(Q, now + i + 1), s1, o1)
            if a is not None:
                r0 = fma(spread(B, later + i), s0, r0)
                r1 = fma(spread(B, later + i + 1), s1, r1)
        store(V, t * Wv + j, add(o0, o1))


@compile_loop
def backward(q, k, v, g, a, b, recalled, states, d_out, d_final, C, dq, dk, dv, dg, da, db, d_initial):
    """Fill the gradients `dq` to `d_initial`; dg is the one by log_decay."""
    Bs, L, H, Dk = k.shape
    Dv = v.shape[3]
    Wk, Wv = filled(Dk), filled(Dv)
    rows, columns = Dk + Dk % 2, Dv + Dv % 2
    size, turned = rows * Wv, columns * Wk
    dtype = v.dtype
    Q, K, A = (aligned_zeros(C * Wk, dtype), aligned_zeros(C * Wk, dtype), aligned_zeros(C * Wk, dtype))
    G, B = aligned_zeros((C + 1) * Wk, dtype), aligned_zeros((C + 1) * Wk, dtype)
    V, R, do = (aligned_zeros(C * Wv, dtype), aligned_zeros(C * Wv, dtype), aligned_zeros(C * Wv, dtype))
    dV, dR = aligned_zeros(C * Wv, dtype), aligned_zeros((C + 1) * Wv, dtype)
    dQ, dK, dG = (aligned_zeros(C * Wk, dtype), aligned_zeros(C * Wk, dtype), aligned_zeros(C * Wk, dtype))
    dA, dB = aligned_zeros(C * Wk, dtype), aligned_zeros(C * Wk, dtype)
    dS, dSt = aligned_zeros(H * size, dtype), aligned_zeros(H * turned, dtype)
    St = aligned_zeros(turned, dtype)
    walk = aligned_zeros((C + 1) * columns * LANES, dtype)
    for s in range(Bs):
        for h in range(H):
            to_slabs(d_final[s, h], dS[h * size : (h + 1) * size], rows)
            to_slabs_turned(d_final[s, h], dSt[h * turned : (h + 1) * turned], columns)
        for c in range(-(-L // C) - 1, -1, -1):
            first = c * C
            T = min(C, L - first)
            for h in range(H):
                gather(q, s, first, h, T, Q, Wk)
                gather(k, s, first, h, T, K, Wk)
                gather(g, s, first, h, T, G, Wk)
                gather(v, s, first, h, T, V, Wv)
                gather(d_out, s, first, h, T, do, Wv)
                # The chunk behind has already taken its own first token's decay and reading.
                G[T * Wk : (T + 1) * Wk] = 1
                if a is not None:
                    gather(a, s, first, h, T, A, Wk)
                    gather(b, s, first, h, T, B, Wk)
                    gather(recalled, s, first, h, T, R, Wv)
                    B[T * Wk : (T + 1) * Wk] = 0
                    dR[T * Wv : (T + 1) * Wv] = 0
                for j in range(0, Wv, LANES):
                    at = h * size + j * rows
                    slab = dS[at : at + rows * LANES]
                    _pull(slab, rows, Q, K, G, a, A, B, do, dV, dR, T, j, Wk, Wv)
                to_slabs_turned(states[s, h, c], St, columns)
                for i in range(0, Wk, LANES):
                    walk[: columns * LANES] = St[i * columns : (i + LANES) * columns]
                    _replay(walk, columns, K, G, a, A, V, R, do, dR, dB, dQ, T, i, Wk, Wv)
                    at = h * turned + i * columns
                    slab = dSt[at : at + columns * LANES]
                    _pull_turned(slab, columns, walk, Q, G, a, B, V, R, do, dR, dK, dG, dA, T, i, Wk, Wv)
                scatter(dQ, Wk, dq, s, first, h, T)
                scatter(dK, Wk, dk, s, first, h, T)
                scatter(dV, Wv, dv, s, first, h, T)
                scatter(dG, Wk, dg, s, first, h, T)
                if a is not None:
                    scatter(dA, Wk, da, s, first, h, T)
                    scatter(dB, Wk, db, s, first, h, T)
        for h in range(H):
            from_slabs(dS[h * size :], d_initial[s, h], rows)


@compile_loop
def _pull(dS, rows, Q, K, G, a, A, B, do, dV, dR, T, j, Wk, Wv):
    """Run a slab of dS back over a chunk: dv and dr."""
    zero = spread(np.zeros(1, do.dtype), 0)
    pulled = zero
    for t in range(T - 1, -1, -1):
        out = load(do, t * Wv + j)
        v0, v1, r0, r1 = zero, zero, zero, zero
        now, later = t * Wk, (t + 1) * Wk
        for i in range(0, rows, 2):
            s0 = mul(spread(G, later + i), load(dS, i * LANES))
            s1 = mul(spread(G, later + i + 1), load(dS, (i + 1) * LANES))
            if a is not None:
                s0 = fma(spread(B, later + i), pulled, s0)
                s1 = fma(spread(B, later + i + 1), pulled, s1)
            s0 = fma(spread(Q, now + i), out, s0)
            s1 = fma(spread(Q, now + i + 1), out, s1)
            store(dS, i * LANES, s0)
            store(dS, (i + 1) * LANES, s1)
            v0 = fma(spread(K, now + i), s0, v0)
            v1 = fma(spread(K, now + i + 1), s1, v1)
            if a is not None:
                r0 = fma(spread(A, now + i), s0, r0)
                r1 = fma(spread(A, now + i + 1), s1, r1)
        store(dV, t * Wv + j, add(v0, v1))
        if a is not None:
            pulled = add(r0, r1)
            store(dR, t * Wv + j, pulled)
    for i in range(rows):
        s0 = mul(spread(G, i), load(dS, i * LANES))
        if a is not None:
            s0 = fma(spread(B, i), pulled, s0)
        store(dS, i * LANES, s0)


@compile_loop
def _replay(walk, columns, K, G, a, A, V, R, do, dR, dB, dQ, T, i, Wk, Wv):
    """Run a slab of S^T over a chunk and keep it after every token: db and dq."""
    zero = spread(np.zeros(1, V.dtype), 0)
    step = columns * LANES
    for t in range(T):
        decay, key, along = load(G, t * Wk + i), load(K, t * Wk + i), load(A, t * Wk + i)
        b0, b1, q0, q1 = zero, zero, zero, zero
        now = t * Wv
        for j in range(0, columns, 2):
            at = t * step + j * LANES
            s0, s1 = load(walk, at), load(walk, at + LANES)
            if a is not None:
                b0 = fma(spread(dR, now + j), s0, b0)
                b1 = fma(spread(dR, now + j + 1), s1, b1)
            s0, s1 = mul(decay, s0), mul(decay, s1)
            if a is not None:
                s0 = fma(spread(R, now + j), along, s0)
                s1 = fma(spread(R, now + j + 1), along, s1)
            s0 = fma(spread(V, now + j), key, s0)
            s1 = fma(spread(V, now + j + 1), key, s1)
            store(walk, at + step, s0)
            store(walk, at + step + LANES, s1)
            q0 = fma(spread(do, now + j), s0, q0)
            q1 = fma(spread(do, now + j + 1), s1, q1)
        store(dQ, t * Wk + i, add(q0, q1))
        if a is not None:
            store(dB, t * Wk + i, add(b0, b1))


@compile_loop
def _pull_turned(dSt, columns, walk, Q, G, a, B, V, R, do, dR, dK, dG, dA, T, i, Wk, Wv):
    """Run a slab of dS^T back over a chunk: dk, da and d log_decay."""
    zero = spread(np.zeros(1, V.dtype), 0)
    step = columns * LANES
    for t in range(T - 1, -1, -1):
        query, decay = load(Q, t * Wk + i), load(G, (t + 1) * Wk + i)
        reader = load(B, (t + 1) * Wk + i)
        k0, k1, a0, a1, g0, g1 = zero, zero, zero, zero, zero, zero
        now, later = t * Wv, (t + 1) * Wv
        for j in range(0, columns, 2):
            s0, s1 = mul(decay, load(dSt, j * LANES)), mul(decay, load(dSt, (j + 1) * LANES))
            if a is not None:
                s0 = fma(spread(dR, later + j), reader, s0)
                s1 = fma(spread(dR, later + j + 1), reader, s1)
            s0 = fma(spread(do, now + j), query, s0)
            s1 = fma(spread(do, now + j + 1), query, s1)
            store(dSt, j * LANES, s0)
            store(dSt, (j + 1) * LANES, s1)
            k0 = fma(spread(V, now + j), s0, k0)
            k1 = fma(spread(V, now + j + 1), s1, k1)
            if a is not None:
                a0 = fma(spread(R, now + j), s0, a0)
                a1 = fma(spread(R, now + j + 1), s1, a1)
            at = t * step + j * LANES
            g0 = fma(s0, load(walk, at), g0)
            g1 = fma(s1, load(walk, at + LANES), g1)
        store(dK, t * Wk + i, add(k0, k1))
        store(dG, t * Wk + i, mul(load(G, t * Wk + i), add(g0, g1)))
        if a is not None:
            store(dA, t * Wk + i, add(a0, a1))
    decay, reader = load(G, i), load(B, i)
    for j in range(columns):
        s0 = mul(decay, load(dSt, j * LANES))
        if a is not None:
            s0 = fma(spread(dR, j), reader, s0)
        store(dSt, j * LANES, s0)
