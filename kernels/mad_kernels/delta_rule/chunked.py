"""The delta rule in chunks of C tokens: matrix products in place of a token loop, own backward.

With G the running sum of log_decay inside a chunk, D_ij = exp(G_i - G_j) for j <= i, and S the
state that enters the chunk:

    A = StrictTril(diag(erase) (K K^T * D))          T = (I + A)^-1
    X = diag(write) V - diag(erase exp(G)) K S       U = T X
    O = diag(exp(G)) Q S + (Q K^T * D) U             S <- exp(G_C) S + (diag(exp(G_C - G)) K)^T U

Backward, with dS the gradient of the state that leaves the chunk:

    dU = (Q K^T * D)^T dO + diag(exp(G_C - G)) K dS  dX = T^T dU      dA = -StrictTril(dX U^T)
    dS <- exp(G_C) dS + (diag(exp(G)) Q)^T dO - (diag(erase exp(G)) K)^T dX

Only S, X, U and dS, dU, dX are serial over chunks; the rest is batched over all of them.

Legend: gram K K^T, scores Q K^T * D, strength erase, update U, residual X; n chunks, N = B*H heads.

Source: arXiv 2406.06484, the chunkwise parallel form; arXiv 2412.06464, the same with decay.
Departures: no W and U matrices, one product by T instead; the backward of the inverse is dA above.
The inverse is by masked doubling: Neumann's product (I - A)(I + A^2)... is off by 3e6 at C = 64
when keys repeat. Memory of the backward, in numbers per head: L (2 Dk + 2 Dv + 3 C) + (L/C) Dk Dv.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mad_kernels.checks import working_dtype
from mad_kernels.decay import Decay, decay_factors, log_decay_gradient
from mad_kernels.layout import Chunks

# Chunk length by the larger head width, measured forward+backward on an AVX-512 CPU at L = 128.
_CHUNK_BY_WIDTH = ((64, 16),)
_LONGEST_CHUNK = 32


# Numbers in one [n, N, C, D] slab of a block of sequences: small enough for the second-level cache,
# and for the allocator to hand the same pages out again: fresh ones cost more than the arithmetic.
_BLOCK_NUMBERS = 1 << 17


def default_chunk(key_width: int, value_width: int) -> int:
    """Look up the chunk length for a head's widths, in tokens."""
    width = max(key_width, value_width)
    return next((chunk for limit, chunk in _CHUNK_BY_WIDTH if width <= limit), _LONGEST_CHUNK)


def delta_rule_chunked(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    erase: Float[Tensor, "B L H"],
    write: Float[Tensor, "B L H"],
    log_decay: Float[Tensor, "B L H"] | None,
    state: Float[Tensor, "B H Dk Dv"],
    chunk: int | None,
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Apply the delta rule chunk by chunk; arguments as in `delta_rule`, already checked."""
    chunk = chunk or default_chunk(k.shape[-1], v.shape[-1])
    return _ChunkedDeltaRule.apply(q, k, v, erase, write, log_decay, state, chunk)


def unit_lower_inverse(A: Float[Tensor, "*batch C C"]) -> Float[Tensor, "*batch C C"]:
    """Invert I + A, A strictly lower triangular, by doubling the solved diagonal blocks.

    From blocks of s solved, blocks of 2s follow: T - T (A * M_s) T, where M_s keeps the lower left
    quarter of each block of 2s. Every product is an exact step of substitution, so the error stays
    at rounding level where a series in A would overflow.
    """
    size = A.shape[-1]
    position = torch.arange(size, device=A.device)
    T = torch.eye(size, dtype=A.dtype, device=A.device).expand_as(A)
    s = 1
    while s < size:
        block = position // s
        quarter = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block)
        step = A * quarter
        T = T - step if s == 1 else T.baddbmm(T, step @ T, alpha=-1)
        s *= 2
    return T


class _Saved(NamedTuple):
    """What one block of sequences keeps for the backward."""

    Q: Tensor
    K: Tensor
    V: Tensor
    e: Tensor
    w: Tensor
    gram: Tensor
    scores: Tensor
    T: Tensor
    U: Tensor
    states: Tensor


class _ChunkedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, erase, write, log_decay, state, chunk):
        B, L, H, Dk = k.shape
        chunks = Chunks(B, L, H, max(1, min(chunk, L)))
        ctx.chunks, ctx.blocks = chunks, _blocks(chunks, max(Dk, v.shape[-1]))
        inputs = (q, k, v, erase, write, log_decay, state)
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in inputs]
        ctx.set_materialize_grads(False)
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        kept, final = [], []
        with torch.autocast(v.device.type, enabled=False):
            for rows in ctx.blocks:
                own = chunks._replace(B=rows.stop - rows.start)
                tensors = [x[rows] for x in (q, k, v, erase, write)]
                steps = None if log_decay is None else log_decay[rows]
                saved, decay, S = _forward(own, tensors, steps, state[rows], o[rows])
                kept += [*saved, *(decay or ())]
                final.append(S)
        ctx.save_for_backward(*kept)
        return o, torch.cat(final)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_state):
        like = zip(ctx.like, ctx.needs_input_grad[:-1], strict=True)
        tensors, fields = ctx.saved_tensors, len(_Saved._fields)
        empty = tensors[0].new_empty
        grads = [empty(x[0], dtype=x[1]) if x and needed else None for x, needed in like]
        width = len(tensors) // len(ctx.blocks)
        with torch.autocast(tensors[0].device.type, enabled=False):
            for i, rows in enumerate(ctx.blocks):
                own = ctx.chunks._replace(B=rows.stop - rows.start)
                kept = tensors[i * width : (i + 1) * width]
                decay = Decay(*kept[fields:]) if width > fields else None
                outer = [None if x is None else x[rows] for x in (d_out, d_state)]
                into = [None if x is None else x[rows] for x in grads]
                _backward(own, _Saved(*kept[:fields]), decay, outer, into)
        return *grads, None


def _blocks(chunks: Chunks, width: int) -> list[slice]:
    """Cut the batch into runs of sequences that are worked through one after another."""
    size = max(1, _BLOCK_NUMBERS // max(1, chunks.L * chunks.H * width))
    return [slice(i, min(i + size, chunks.B)) for i in range(0, chunks.B, size)] or [slice(0, 0)]


def _forward(
    chunks: Chunks, tensors: Sequence[Tensor], log_decay: Tensor | None, state: Tensor, out: Tensor
) -> tuple[_Saved, Decay | None, Tensor]:
    """Run one block of sequences: fill `out`, return what the backward needs and the last state."""
    wide = working_dtype(out)
    Q, K, V, e, w = (chunks.split(x, wide) for x in tensors)
    decay = None if log_decay is None else decay_factors(chunks.split(log_decay, wide))
    gram, scores, T = _inside_chunks(Q, K, e, decay)
    U, states, S = _scan_states(K, V, e, w, T, state.to(wide).flatten(0, 1), decay)
    read = _scaled(Q, decay and decay.inside).flatten(0, 1).bmm(states.flatten(0, 1))
    read.baddbmm_(scores.flatten(0, 1), U.flatten(0, 1))
    chunks.merge_into(read.view_as(V), out)
    saved = _Saved(Q, K, V, e, w, gram, scores, T, U, states)
    return saved, decay, S.unflatten(0, (chunks.B, chunks.H))


def _backward(
    chunks: Chunks,
    saved: _Saved,
    decay: Decay | None,
    outer: Sequence[Tensor | None],
    into: Sequence[Tensor | None],
) -> None:
    """Run one block of sequences back and fill the gradients that are wanted."""
    K, V = saved.K, saved.V
    d_out, d_state = outer
    dO = torch.zeros_like(V) if d_out is None else chunks.split(d_out, V.dtype)
    dS = V.new_zeros(K.shape[1], K.shape[-1], V.shape[-1])
    if d_state is not None:
        dS = d_state.to(V.dtype).flatten(0, 1)
    dX, d_states, dS = _scan_states_backward(saved, dO, dS, decay)
    *merged, d_initial = into
    for grad, target in zip(_gradients(saved, dO, dX, d_states, decay), merged, strict=True):
        if target is not None and grad is not None:
            chunks.merge_into(grad, target)
    if d_initial is not None:
        d_initial.copy_(dS.unflatten(0, (chunks.B, chunks.H)))


def _scaled(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x * rows[..., None]


def _inside_chunks(
    Q: Tensor, K: Tensor, e: Tensor, decay: Decay | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute StrictTril(K K^T * D), Tril(Q K^T * D) and T = (I + A)^-1, each [n, N, C, C]."""
    C = K.shape[-2]
    keys = K.flatten(0, 1)
    gram, scores = keys.bmm(keys.mT), Q.flatten(0, 1).bmm(keys.mT)
    lower = gram.new_ones(C, C).tril()
    if decay is None:
        scores.mul_(lower)
    else:
        pairs = decay.pairs.flatten(0, 1)
        scores.mul_(pairs)
        gram.mul_(pairs)
    gram.mul_(lower.tril(-1))
    T = unit_lower_inverse(gram * e.flatten(0, 1)[..., None])
    shape = (*K.shape[:2], C, C)
    return gram.view(shape), scores.view(shape), T.view(shape)


def _scan_states(
    K: Tensor, V: Tensor, e: Tensor, w: Tensor, T: Tensor, S: Tensor, decay: Decay | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run over chunks; return U, the states that enter each chunk, and the last state."""
    n, N, _, Dk = K.shape
    U = V * w[..., None]
    erased = K * (e if decay is None else e * decay.inside)[..., None]
    rest = _scaled(K, decay and decay.rest)
    states = V.new_empty(n, N, Dk, V.shape[-1])
    for i in range(n):
        states[i] = S
        residual = U[i].baddbmm_(erased[i], S, alpha=-1)
        U[i] = T[i].bmm(residual)
        kept = S if decay is None else S * decay.whole[i][:, None, None]
        S = kept.baddbmm(rest[i].mT, U[i])
    return U, states, S


def _scan_states_backward(
    saved: _Saved, dO: Tensor, dS: Tensor, decay: Decay | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run over chunks from the last; return dX, the dS that leaves each chunk, and the first dS."""
    K, T, e = saved.K, saved.T, saved.e
    dX = saved.scores.flatten(0, 1).mT.bmm(dO.flatten(0, 1)).view_as(dO)
    erased = K * (e if decay is None else e * decay.inside)[..., None]
    rest = _scaled(K, decay and decay.rest)
    asked = _scaled(saved.Q, decay and decay.inside)
    d_states = torch.empty_like(saved.states)
    for i in reversed(range(K.shape[0])):
        d_states[i] = dS
        dU = dX[i].baddbmm_(rest[i], dS)
        dX[i] = T[i].mT.bmm(dU)
        kept = dS if decay is None else dS * decay.whole[i][:, None, None]
        dS = kept.baddbmm(asked[i].mT, dO[i]).baddbmm_(erased[i].mT, dX[i], alpha=-1)
    return dX, d_states, dS


def _gradients(
    saved: _Saved, dO: Tensor, dX: Tensor, d_states: Tensor, decay: Decay | None
) -> list[Tensor | None]:
    """Collect dQ, dK, dV, d erase, d write and d log_decay from the gradients along the scan."""
    q, k, v, e, w, gram, scores, _, u, s = (x.flatten(0, 1) for x in saved)
    do, dx, ds = (x.flatten(0, 1) for x in (dO, dX, d_states))
    lower = gram.new_ones(gram.shape[-2:]).tril()
    d_scores = do.bmm(u.mT).mul_(lower)
    d_gram = dx.bmm(u.mT).mul_(lower.tril(-1).neg_())  # by A, still without erase
    d_asked, d_rest, d_erased = do.bmm(s.mT), u.bmm(ds.mT), dx.bmm(s.mT).neg_()
    by_gram, by_erased = d_gram * gram, (d_erased * k).sum(-1)
    d_log_decay = None
    if decay is not None:
        inside, rest, pairs = (x.flatten(0, 1) for x in decay)
        by_erased *= inside
        by_rest = (d_rest * k).sum(-1) * rest
        by_inside = (d_asked * q).sum(-1) * inside + by_erased * e
        by_inside[..., -1] += (s * ds).sum((-1, -2)) * inside[..., -1]
        by_pairs = (d_scores * scores).addcmul_(by_gram, e[..., None])
        d_log_decay = log_decay_gradient(by_inside, by_rest, by_pairs).view_as(saved.e)
        factors = (pairs, pairs, inside[..., None], rest[..., None], inside[..., None])
        for x, factor in zip((d_scores, d_gram, d_asked, d_rest, d_erased), factors, strict=True):
            x.mul_(factor)
    d_erase = by_gram.sum(-1).add_(by_erased)
    d_gram.mul_(e[..., None])
    dQ = d_asked.baddbmm_(d_scores, k)
    dK = d_rest.addcmul_(d_erased, e[..., None])
    dK.baddbmm_(d_scores.mT, q).baddbmm_(d_gram + d_gram.mT, k)
    dV, d_write = dx * w[..., None], (dx * v).sum(-1)
    flat = (dQ, dK, dV, d_erase, d_write)
    like = (saved.Q, saved.K, saved.V, saved.e, saved.w)
    return [*(x.view_as(y) for x, y in zip(flat, like, strict=True)), d_log_decay]
