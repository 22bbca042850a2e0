"""Diagonal plus low rank in chunks of C tokens: matrix products in place of a token loop.

With l the log decay of a chunk's tokens and G_t = l_1 + ... + l_t, both per key channel, and S the
state that enters; D_ts = exp(l_{s+1} + ... + l_t) is the share that token t has of what s wrote:

    (x, y)_ts = sum_i x_t,i D_ts,i y_s,i for s <= t      (x, y)'_ts the same with D_{t-1,s}, s < t
    (I - (b, a)') R = (b exp(G - l)) S + (b, k)' V       R_t = b_t^T S_{t-1}
    O = (q exp(G)) S + (q, k) V + (q, a) R
    S <- exp(G_C) S + (k exp(G_C - G))^T V + (a exp(G_C - G))^T R

D differs from channel to channel, so (x, y) is no product masked by decays; and as a product of
x exp(G) and y exp(-G) it would overflow. So a chunk is halved: for t in the later half and s in the
earlier, D_ts is the decay from s to the border times that from the border to t, neither above 1,
and (x, y) there is one matrix product. Each half is halved again, down to single tokens. Every
exponent is a sum of log decays as they stand: none is positive, and no digits go in a difference.

Only R and S are serial over chunks; the rest is batched over all of them. R is by substitution.

Legend: n chunks, N = B*H heads; h half of a block; rest exp(G_C - G), entered exp(G - l).

Source: the recurrence of `reference`; arXiv 2312.06635 cuts chunks in the same way, once.
Departure: autograd; the halves are computed again in the backward, where kept factors of every
level would outweigh all else. So gradients of second order exist, unlike in other fast backends.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from mad_kernels.checks import working_dtype
from mad_kernels.layout import Chunks

_CHUNK = 16  # a power of 2; 32 and 64 were slower on a CPU, at widths 16 and 32
# exp(-1e4) is 0 in every dtype: the floor changes no factor, and keeps -inf out of 0 * -inf.
_FLOOR = -1e4


def dplr_chunked(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    log_decay: Float[Tensor, "B L H Dk"],
    a: Float[Tensor, "B L H Dk"] | None,
    b: Float[Tensor, "B L H Dk"] | None,
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Run the recurrence chunk by chunk; arguments as in `dplr`, already checked."""
    B, L, H, _ = q.shape
    if L == 0:
        return v.clone(), state.to(working_dtype(v))
    wide = working_dtype(v)
    chunks = Chunks(B, L, H, min(_CHUNK, 1 << (L - 1).bit_length()))
    S = state.to(wide).flatten(0, 1)
    with torch.autocast(v.device.type, enabled=False):
        Q, K, V = (chunks.split(x, wide) for x in (q, k, v))
        steps = chunks.split(log_decay, wide).clamp_min(_FLOOR)
        if a is None or b is None:
            o, S = _decayed(Q, K, V, steps, S)
        else:
            o, S = _corrected(Q, K, V, steps, chunks.split(a, wide), chunks.split(b, wide), S)
    return chunks.merge(o, v.dtype), S.unflatten(0, (B, H))


def _decayed(
    Q: Float[Tensor, "n N C Dk"],
    K: Float[Tensor, "n N C Dk"],
    V: Float[Tensor, "n N C Dv"],
    steps: Float[Tensor, "n N C Dk"],
    S: Float[Tensor, "N Dk Dv"],
) -> tuple[Float[Tensor, "n N C Dv"], Float[Tensor, "N Dk Dv"]]:
    """Run all chunks without a and b; return outputs and the last state."""
    inside = _upto(steps).exp()
    added = (K * _after(steps).exp()).mT @ V
    states = []
    for i in range(len(Q)):
        states.append(S)
        S = S * inside[i, :, -1, :, None] + added[i]
    return (Q * inside) @ torch.stack(states) + _scores(Q, K, steps) @ V, S


def _corrected(
    Q: Float[Tensor, "n N C Dk"],
    K: Float[Tensor, "n N C Dk"],
    V: Float[Tensor, "n N C Dv"],
    steps: Float[Tensor, "n N C Dk"],
    A: Float[Tensor, "n N C Dk"],
    Bm: Float[Tensor, "n N C Dk"],
    S: Float[Tensor, "N Dk Dv"],
) -> tuple[Float[Tensor, "n N C Dv"], Float[Tensor, "N Dk Dv"]]:
    """Run all chunks; return outputs and the last state."""
    inside, rest = _upto(steps).exp(), _after(steps).exp()
    written = torch.stack([K, A])
    by_key, by_a = _scores(Q, written, steps)
    read_key, read_a = _scores(Bm, written, steps, before=True)
    entered, told = Bm * _upto(steps, before=True).exp(), read_key @ V
    added, corrected = (K * rest).mT @ V, (A * rest).mT
    states, recalled = [], []
    for i in range(len(Q)):
        states.append(S)
        right = told[i].baddbmm(entered[i], S)
        R = torch.linalg.solve_triangular(-read_a[i], right, upper=False, unitriangular=True)
        recalled.append(R)
        S = S * inside[i, :, -1, :, None] + added[i].baddbmm(corrected[i], R)
    o = (Q * inside) @ torch.stack(states) + by_key @ V + by_a @ torch.stack(recalled)
    return o, S


def _scores(x: Tensor, y: Tensor, steps: Tensor, *, before: bool = False) -> Tensor:
    """Compute (x, y)_ts, or (x, y)'_ts for a reading before the token; axes [... C Dk]."""
    scores = checkpoint(_halved, x, y, steps, before, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(scores, Tensor)
    return scores


def _halved(x: Tensor, y: Tensor, steps: Tensor, before: bool) -> Tensor:
    if x.shape[-2] == 1:
        own = (x * y).sum(-1, keepdim=True)
        return torch.zeros_like(own) if before else own
    x, y, steps = (z.unflatten(-2, (2, -1)) for z in (x, y, steps))
    (_, x1), (y0, _), (steps0, steps1) = (z.unbind(-3) for z in (x, y, steps))
    across = (x1 * _upto(steps1, before=before).exp()) @ (y0 * _after(steps0).exp()).mT
    earlier, later = _halved(x, y, steps, before).unbind(-3)
    upper = torch.cat([earlier, torch.zeros_like(across)], -1)
    return torch.cat([upper, torch.cat([across, later], -1)], -2)


def _upto(steps: Tensor, *, before: bool = False) -> Tensor:
    """Sum log decays up to each token, or up to the one before; axes [... C Dk]."""
    return (pad(steps[..., :-1, :], (0, 0, 1, 0)) if before else steps).cumsum(-2)


def _after(steps: Tensor) -> Tensor:
    """Sum the log decays of all later tokens; axes [... C Dk]."""
    return pad(steps[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
