"""Mamba-2's state space in chunks of C tokens: matrix products in place of a token loop.

With G the running sum of dt a inside a chunk, D_ij = exp(G_i - G_j) for j <= i, and S the state
that enters the chunk:

    M = (C B^T) * D * dt_j                        one [C C] matrix per head, C B^T shared in a group
    Y = M X + diag(exp(G)) C S                    S <- exp(G_C) S + B^T diag(exp(G_C - G) dt) X

Only S is serial over chunks, and that is one multiply and add. The heads of a group lie side by
side in the columns of X and S, so products with b and c run once per group.

Legend: n chunks, M = B*G sequences and groups, R = H/G heads of a group; gram C B^T.

Source: arXiv 2405.21060, the block decomposition and its listing.
Departures: own backward; the mask comes before exp, so no dt is too large.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mad_kernels.checks import working_dtype
from mad_kernels.decay import Decay, decay_factors, log_decay_gradient
from mad_kernels.layout import Chunks

_CHUNK = 32


def ssd_chunked(
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "B L G N"],
    c: Float[Tensor, "B L G N"],
    state: Float[Tensor, "B H N P"],
    chunk: int | None,
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H N P"]]:
    """Run the state space chunk by chunk; arguments as in `ssd`, already checked."""
    log_decay = dt.to(working_dtype(x)) * a.to(working_dtype(x))
    return _ChunkedSSD.apply(x, dt, log_decay, b, c, state, chunk or _CHUNK)


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, log_decay, b, c, state, chunk):
        (B, L, _), groups = dt.shape, b.shape[2]
        wide = working_dtype(x)
        chunks = Chunks(B, L, groups, max(1, min(chunk, L)))
        X = chunks.split(x.unflatten(2, (groups, -1)), wide).transpose(2, 3)  # [n M R C P], a view
        dt_, G = (
            chunks.split(z.unflatten(2, (groups, -1)), wide).transpose(2, 3)
            for z in (dt, log_decay)
        )
        Bm, Cm = chunks.split(b, wide), chunks.split(c, wide)
        with torch.autocast(x.device.type, enabled=False):
            decay = decay_factors(G)
            S = state.to(wide).unflatten(1, (groups, -1)).flatten(0, 1)  # [M R N P]
            poured = X * (decay.rest * dt_)[..., None]
            states, S = _scan(_by_group(Bm.mT, poured), decay.whole, S)
            gram = Cm @ Bm.mT
            scores = gram[:, :, None] * decay.pairs * dt_[..., None, :]
            Y = scores @ X + _by_group(Cm, states) * decay.inside[..., None]
        ctx.chunks, ctx.dtypes, ctx.state_dtype = (
            chunks,
            [z.dtype for z in (x, dt, b, c)],
            state.dtype,
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(X, dt_, Bm, Cm, gram, scores, states, *decay)
        y = chunks.merge(Y.transpose(2, 3), x.dtype).flatten(2, 3)
        return y, S.unflatten(0, (B, groups)).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_state):
        X, dt, Bm, Cm, gram, scores, states, *factors = ctx.saved_tensors
        decay, chunks = Decay(*factors), ctx.chunks
        groups, wide = chunks.H, X.dtype
        dY = torch.zeros_like(X)
        if d_y is not None:
            dY = chunks.split(d_y.unflatten(2, (groups, -1)), wide).transpose(2, 3)
        dS = X.new_zeros(states.shape[1:])
        if d_state is not None:
            dS = d_state.to(wide).unflatten(1, (groups, -1)).flatten(0, 1)
        with torch.autocast(X.device.type, enabled=False):
            asked = dY * decay.inside[..., None]
            pulled = _by_group(Cm.mT, asked)
            d_states, dS = _scan_backward(pulled, decay.whole, dS)
            saved = (X, dt, Bm, Cm, gram, scores, states)
            dX, d_dt, d_log_decay, dB, dC = _gradients(*saved, dY, asked, d_states, decay)
        x_dtype, dt_dtype, b_dtype, c_dtype = ctx.dtypes
        by_head = ((dX, x_dtype), (d_dt, dt_dtype), (d_log_decay, wide))
        d_x, d_dt, d_log_decay = (
            chunks.merge(z.transpose(2, 3), dtype).flatten(2, 3) for z, dtype in by_head
        )
        d_state = dS.unflatten(0, (chunks.B, groups)).flatten(1, 2).to(ctx.state_dtype)
        d_b, d_c = chunks.merge(dB, b_dtype), chunks.merge(dC, c_dtype)
        return d_x, d_dt, d_log_decay, d_b, d_c, d_state, None


def _by_group(matrix: Tensor, heads: Tensor) -> Tensor:
    """Multiply a group's [n M I J] with its heads' [n M R J P], side by side: [n M R I P]."""
    R, P = heads.shape[2], heads.shape[-1]
    side_by_side = heads.transpose(2, 3).flatten(-2)
    return (matrix @ side_by_side).unflatten(-1, (R, P)).transpose(2, 3)


def _scan(added: Tensor, whole: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Run over chunks; return the states that enter each chunk, and the last state."""
    states = torch.empty_like(added)
    for i in range(added.shape[0]):
        states[i] = S
        S = S * whole[i][..., None, None] + added[i]
    return states, S


def _scan_backward(pulled: Tensor, whole: Tensor, dS: Tensor) -> tuple[Tensor, Tensor]:
    """Run over chunks from the last; return the dS that leaves each chunk, and the first dS."""
    d_states = torch.empty_like(pulled)
    for i in reversed(range(pulled.shape[0])):
        d_states[i] = dS
        dS = dS * whole[i][..., None, None] + pulled[i]
    return d_states, dS


def _gradients(
    X: Tensor,
    dt: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    gram: Tensor,
    scores: Tensor,
    states: Tensor,
    dY: Tensor,
    asked: Tensor,
    d_states: Tensor,
    decay: Decay,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Collect dX, d dt, d log_decay, dB and dC from the gradients along the scan."""
    _, rest, pairs = decay
    d_scores = (dY @ X.mT).mul_(pairs)
    pull = d_scores * gram[:, :, None]
    from_states = _by_group(Bm, d_states)
    dX = (scores.mT @ dY) + from_states * (rest * dt)[..., None]
    from_rest = (from_states * X).sum(-1) * rest
    d_dt = pull.sum(-2) + from_rest
    from_inside = (asked * _by_group(Cm, states)).sum(-1)
    from_inside[..., -1] += (states * d_states).sum((-1, -2)) * decay.whole
    d_log_decay = log_decay_gradient(from_inside, from_rest * dt, pull.mul_(dt[..., None, :]))
    d_gram = d_scores.mul_(dt[..., None, :]).sum(2)
    poured = X * (rest * dt)[..., None]
    dB = d_gram.mT @ Cm + (_side_by_side(poured) @ _side_by_side(d_states).mT)
    dC = d_gram @ Bm + (_side_by_side(asked) @ _side_by_side(states).mT)
    return dX, d_dt, d_log_decay, dB, dC


def _side_by_side(heads: Tensor) -> Tensor:
    return heads.transpose(2, 3).flatten(-2)
