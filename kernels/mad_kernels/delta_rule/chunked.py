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

Without erase there is nothing to invert: T = I and U = diag(write) V.

Legend: gram K K^T, scores Q K^T * D, strength erase, update U, residual X; n chunks, N = B*H heads.

Source: arXiv 2406.06484, the chunkwise parallel form; arXiv 2412.06464, the same with decay.
Departures: no W and U matrices, one product by T instead; the backward of the inverse is dA above.
The inverse is by masked doubling: Neumann's product (I - A)(I + A^2)... is off by 3e6 at C = 64
when keys repeat. The backward keeps, beside the inputs, L (Dv + C) + (L/C) Dk Dv numbers per head.
"""

from typing import NamedTuple, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from mad_kernels.custom_ops import allocate_gradients, filled
from mad_kernels.decay import Decay, decay_factors, log_decay_gradient
from mad_kernels.delta_rule.passes import allocate_forward, register_passes
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
    erase: Float[Tensor, "B L H"] | None,
    write: Float[Tensor, "B L H"],
    log_decay: Float[Tensor, "B L H"] | None,
    state: Float[Tensor, "B H Dk Dv"],
    chunk: int | None = None,
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Apply the delta rule chunk by chunk; arguments as in `delta_rule`, already checked.

    An erase that is None erases nothing.
    """
    C = max(1, min(chunk or default_chunk(k.shape[-1], v.shape[-1]), v.shape[1]))
    return _run(q, k, v, erase, write, log_decay, state, C)


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


class _Erasure(NamedTuple):
    """What erasing needs inside of chunks."""

    e: Tensor
    gram: Tensor
    T: Tensor


class _Chunked(NamedTuple):
    """A block of sequences in chunks: inputs, and what inside of chunks depends on no state."""

    Q: Tensor
    K: Tensor
    V: Tensor
    w: Tensor
    scores: Tensor
    erasure: _Erasure | None
    decay: Decay | None

    @property
    def asked(self) -> Tensor:
        """diag(exp(G)) Q."""
        return _scaled(self.Q, self.decay and self.decay.inside)

    def erased(self, e: Tensor) -> Tensor:
        """diag(erase exp(G)) K."""
        return _scaled(self.K, e if self.decay is None else e * self.decay.inside)

    @property
    def rest(self) -> Tensor:
        """diag(exp(G_C - G)) K."""
        return _scaled(self.K, self.decay and self.decay.rest)

    def kept(self, S: Tensor, i: int) -> Tensor:
        """exp(G_C) S of chunk i."""
        return S if self.decay is None else S * self.decay.whole[i][:, None, None]


def _forward(q, k, v, erase, write, log_decay, state, C, save):
    results = allocate_forward(q, k, v, erase, write, log_decay, state, C, save, inverts=True)
    o, final, *kept = results
    with torch.autocast(v.device.type, enabled=False):
        for rows, chunks in _blocks(k, v, C):
            x = _chunked(chunks, rows, q, k, v, erase, write, log_decay)
            U, states, S = _scan_states(x, state[rows].flatten(0, 1))
            read = x.asked.flatten(0, 1).bmm(states.flatten(0, 1))
            read.baddbmm_(x.scores.flatten(0, 1), U.flatten(0, 1))
            chunks.merge_into(read.view_as(U), o[rows])
            final[rows] = S.unflatten(0, (chunks.B, chunks.H))
            if save:
                chunks.merge_into(U, kept[0][rows])
                kept[1][:, rows] = states.unflatten(1, (chunks.B, chunks.H))
                if x.erasure is not None:
                    kept[2][:, rows] = x.erasure.T.unflatten(1, (chunks.B, chunks.H))
    return results


def _backward(q, k, v, erase, write, log_decay, state, U, states, T, d_o, d_final, C):
    grads = allocate_gradients(q, k, v, erase, write, log_decay, state)
    d_o, d_final = filled(d_o, v), filled(d_final, state)
    with torch.autocast(v.device.type, enabled=False):
        for rows, chunks in _blocks(k, v, C):
            x = _chunked(chunks, rows, q, k, v, erase, write, log_decay, T)
            u, dO = (chunks.split(z[rows], z.dtype) for z in (U, d_o))
            s = states[:, rows].flatten(1, 2)
            dX, d_states, dS = _scan_states_backward(x, dO, d_final[rows].flatten(0, 1))
            *merged, d_initial = grads
            for target, grad in zip(merged, _gradients(x, u, s, dO, dX, d_states), strict=True):
                if grad is not None:
                    chunks.merge_into(grad, target[rows])
            d_initial[rows] = dS.unflatten(0, (chunks.B, chunks.H))
    return grads


def _blocks(k: Tensor, v: Tensor, C: int) -> list[tuple[slice, Chunks]]:
    """Cut the batch into runs of sequences that are worked through one after another."""
    (B, L, H, Dk), Dv = k.shape, v.shape[-1]
    size = max(1, _BLOCK_NUMBERS // max(1, L * H * max(Dk, Dv)))
    ends = [(i, min(i + size, B)) for i in range(0, B, size)]
    return [(slice(i, j), Chunks(j - i, L, H, C)) for i, j in ends]


def _scaled(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x * rows[..., None]


def _chunked(
    chunks: Chunks,
    rows: slice,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    write: Tensor,
    log_decay: Tensor | None,
    T: Tensor | None = None,
) -> _Chunked:
    """Split a block, and compute Tril(Q K^T * D), StrictTril(K K^T * D) and T, [n, N, C, C].

    A T of all sequences, if given, is not computed again.
    """
    Q, K, V, w = (chunks.split(x[rows], x.dtype) for x in (q, k, v, write))
    decay = None if log_decay is None else decay_factors(chunks.split(log_decay[rows], v.dtype))
    keys = K.flatten(0, 1)
    lower = keys.new_ones(chunks.C, chunks.C).tril()
    pairs = lower if decay is None else decay.pairs.flatten(0, 1)
    shape = (*K.shape[:2], chunks.C, chunks.C)
    scores = Q.flatten(0, 1).bmm(keys.mT).mul_(pairs).view(shape)
    if erase is None:
        return _Chunked(Q, K, V, w, scores, None, decay)
    e = chunks.split(erase[rows], erase.dtype)
    gram = keys.bmm(keys.mT).mul_(pairs).mul_(lower.tril(-1))
    if T is None:
        inverse = unit_lower_inverse(gram * e.flatten(0, 1)[..., None]).view(shape)
    else:
        inverse = T[:, rows].flatten(1, 2)
    return _Chunked(Q, K, V, w, scores, _Erasure(e, gram.view(shape), inverse), decay)


def _scan_states(x: _Chunked, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run over chunks; return U, the states that enter each chunk, and the last state."""
    U, rest, erasure = _scaled(x.V, x.w), x.rest, x.erasure
    erased = None if erasure is None else x.erased(erasure.e)
    states = U.new_empty(*U.shape[:2], *S.shape[1:])
    for i in range(U.shape[0]):
        states[i] = S
        if erasure is not None and erased is not None:
            U[i] = erasure.T[i].bmm(U[i].baddbmm_(erased[i], S, alpha=-1))
        S = x.kept(S, i).baddbmm(rest[i].mT, U[i])
    return U, states, S


def _scan_states_backward(x: _Chunked, dO: Tensor, dS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run over chunks from the last; return dX, the dS that leaves each chunk, and the first dS."""
    dX = x.scores.flatten(0, 1).mT.bmm(dO.flatten(0, 1)).view_as(dO)
    asked, rest, erasure = x.asked, x.rest, x.erasure
    erased = None if erasure is None else x.erased(erasure.e)
    d_states = dX.new_empty(*dX.shape[:2], *dS.shape[1:])
    for i in reversed(range(dX.shape[0])):
        d_states[i] = dS
        dX[i].baddbmm_(rest[i], dS)  # dU
        dS = x.kept(dS, i).baddbmm(asked[i].mT, dO[i])
        if erasure is not None and erased is not None:
            dX[i] = erasure.T[i].mT.bmm(dX[i])
            dS.baddbmm_(erased[i].mT, dX[i], alpha=-1)
    return dX, d_states, dS


@no_type_check  # decay is there or not with log_decay
def _gradients(x, U, states, dO, dX, d_states):
    """Collect dQ, dK, dV, d erase, d write and d log_decay from the gradients along the scan."""
    given = (x.Q, x.K, x.V, x.w, U, states, dO, dX, d_states, x.scores)
    q, k, v, w, u, s, do, dx, ds, scores = (z.flatten(0, 1) for z in given)
    inside, rest, pairs = (None,) * 3 if x.decay is None else (z.flatten(0, 1) for z in x.decay)
    lower = scores.new_ones(scores.shape[-2:]).tril()
    d_scores = do.bmm(u.mT).mul_(lower)
    d_asked, d_rest = do.bmm(s.mT), u.bmm(ds.mT)
    d_erase = d_log_decay = None
    if pairs is not None:
        by_pairs = d_scores * scores
        by_inside = (d_asked * q).sum(-1) * inside
        by_inside[..., -1] += (s * ds).sum((-1, -2)) * inside[..., -1]
        by_rest = (d_rest * k).sum(-1) * rest
        d_scores.mul_(pairs)
        d_asked.mul_(inside[..., None])
        d_rest.mul_(rest[..., None])
    dQ = d_asked.baddbmm_(d_scores, k)
    dK = d_rest.baddbmm_(d_scores.mT, q)
    if x.erasure is not None:
        e, gram, _ = (z.flatten(0, 1) for z in x.erasure)
        d_gram = dx.bmm(u.mT).mul_(lower.tril(-1).neg_())  # by A, still without erase
        d_erased = dx.bmm(s.mT).neg_()
        by_gram, by_erased = d_gram * gram, (d_erased * k).sum(-1)
        if pairs is not None:
            by_erased *= inside
            by_inside += by_erased * e
            by_pairs.addcmul_(by_gram, e[..., None])
            d_gram.mul_(pairs)
            d_erased.mul_(inside[..., None])
        d_erase = by_gram.sum(-1).add_(by_erased)
        d_gram.mul_(e[..., None])
        dK.addcmul_(d_erased, e[..., None]).baddbmm_(d_gram + d_gram.mT, k)
    if pairs is not None:
        d_log_decay = log_decay_gradient(by_inside, by_rest, by_pairs)
    dV, d_write = dx * w[..., None], (dx * v).sum(-1)
    flat = (dQ, dK, dV, d_erase, d_write, d_log_decay)
    return [z if z is None else z.unflatten(0, x.w.shape[:2]) for z in flat]


_run = register_passes("chunked", _forward, _backward, inverts=True)
