"""How far back outputs look, how much a change of the input grows, how much of the far past still matters.

Attention takes blocks of queries, B H L * 64 numbers at a time.

Legend: N rows of a head's state (key width), T sampled tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mad_efla.mixers._dynamics import AttentionTrace, Dynamics
from mad_efla.spectrum.states import sampled
from mad_efla.spectrum.transitions import BLOCK, apply, each, rescaled, transitions

# ------------------------------------------------------------------ reach


class Reach(NamedTuple):
    """How far back the tokens at `times` look; see `reach`."""

    times: Int[Tensor, "T"]
    entropy: Float[Tensor, "T B H"]
    distance: Float[Tensor, "T B H"]


def reach(memory: Dynamics | AttentionTrace, times: Sequence[int] | None = None) -> Reach:
    """Compute how far back an output looks, by one definition for attention and for states.

    An output is a sum over the past, o_t = sum_s w_ts v_s. With p_ts = |w_ts| |v_s| over its sum,

        entropy   -sum_s p_ts log p_ts, in nats
        distance  sum_s p_ts (t - s), in tokens

    w are attention's weights, and q_t^T A_t ... A_{s+1} k_s for a state. These are all that the
    two kinds of memory have in common: attention has no transitions and no state of fixed size.

    Args:
        memory: Of one layer.
        times: The tokens t; None takes all for attention, else 16 spread evenly to the last.

    Source: Kobayashi et al. 2020, arXiv 2004.10102 (weights times norms of values); Ali et
    al. 2024, arXiv 2403.01590 (a state's implied weights).
    """
    if isinstance(memory, AttentionTrace):
        L = memory.k.shape[1]
        times = list(range(L)) if times is None else sampled(L, times)
        blocks = (times[i : i + BLOCK] for i in range(0, len(times), BLOCK))
        parts = [_spread_of(block, _attention_logs(memory, block)) for block in blocks]
    else:
        times = sampled(memory.tokens, times)
        parts = [_spread_of(times, _implied_logs(memory, times))]
    entropy, distance = (torch.cat(p) for p in zip(*parts, strict=True))
    return Reach(torch.tensor(times), entropy, distance)


def _attention_logs(trace: AttentionTrace, times: Sequence[int]) -> Float[Tensor, "T B H L"]:
    """Return log(w_ts |v_s|), up to a summand per t; -inf where s is not attended to."""
    L, Dh = trace.k.shape[1:4:2]
    at = torch.tensor(times, device=trace.k.device)
    scores = torch.einsum("bthd,bshd->tbhs", trace.q[:, at].double(), trace.k.double())
    back = at[:, None] - torch.arange(L, device=at.device)
    hidden = (back < 0) | (back >= (trace.window or L))
    logs = scores / math.sqrt(Dh) + _log_norms(trace.v)
    return logs.masked_fill(hidden[:, None, None], -math.inf)


def _implied_logs(dynamics: Dynamics, times: Sequence[int]) -> Float[Tensor, "T B H L"]:
    """Return log(|w_ts| |v_s|), walking back from all queries at once.

    A token that takes several steps counts as the sum of what each of them wrote.
    """
    B, L, H, N = dynamics.k.shape
    n = dynamics.substeps
    ends = [(t + 1) * n - 1 for t in times]
    U = dynamics.q.new_zeros(B, H, N, len(times), dtype=torch.float64)  # A_{s+1}^T ... A_t^T q_t
    log_size, logs = U.new_zeros(B, H, len(times)), U.new_empty(B, H, len(times), L)
    back = range(L - 1, -1, -1)
    queries, keys = each(dynamics.q, back), each(dynamics.k, back)
    for s, A, q, k in zip(back, transitions(dynamics, back), queries, keys, strict=True):
        if s in ends:
            U[..., ends.index(s)] = q
        logs[..., s] = (k[..., None, :] @ U)[..., 0, :].abs().log() + log_size
        columns, log_size = rescaled(apply(A.transposed(), U).mT[..., None], log_size)
        U = columns[..., 0].mT
    logs = logs + _log_norms(dynamics.v)[:, :, None]
    return logs.unflatten(-1, (-1, n)).logsumexp(-1).movedim(2, 0)


def _log_norms(v: Tensor) -> Float[Tensor, "B H L"]:
    return torch.linalg.vector_norm(v, dim=-1, dtype=torch.float64).log().movedim(1, -1)


def _spread_of(times: Sequence[int], logs: Float[Tensor, "T B H L"]) -> tuple[Tensor, Tensor]:
    p = logs.softmax(-1).nan_to_num(0)  # NaN where a query sees nothing
    at = torch.tensor(times, device=p.device)
    back = (at[:, None] - torch.arange(p.shape[-1], device=p.device)).to(p.dtype)
    return torch.special.entr(p).sum(-1), (p * back[:, None, None]).sum(-1)


# ------------------------------------------------------------------ gain


def perturbation_gain(
    x: Float[Tensor, "B L D"],
    changed_x: Float[Tensor, "B L D"],
    y: Float[Tensor, "B L E"],
    changed_y: Float[Tensor, "B L E"],
) -> Float[Tensor, "B L"]:
    """Measure how a change of an input travels to each token's output, in shares of their sizes.

        gain_t = |y'_t - y_t| / |y|  :  |x' - x| / |x|

    Norms without an index run over all tokens of a sequence. The root of sum_t gain_t^2 is the
    relative condition number in the direction of the change: 1 where a map neither damps nor
    amplifies. An output that does not change has gain 0.

    Args:
        x: An input.
        changed_x: The same with a small change; it must differ from x somewhere in every sequence.
        y: The output for x.
        changed_y: The output for changed_x.

    Returns:
        A gain for each token, without unit; inf where y is all zero and changes.

    Source: Trefethen and Bau, Numerical Linear Algebra, lecture 12.
    """
    whole = (torch.linalg.vector_norm(z, dim=(1, 2), dtype=torch.float64)[:, None] for z in (x, changed_x - x, y))
    size, change, out = whole
    moved = torch.linalg.vector_norm(changed_y - y, dim=-1, dtype=torch.float64)
    return torch.where(moved == 0, 0, moved / out * size / change)


def gain_distance(gain: Float[Tensor, "B L"], position: int) -> Float[Tensor, "B"]:
    """Average the distance at which a change of the token at `position` is felt, in tokens.

        sum_d d gain_{position + d}^2 / sum_d gain_{position + d}^2

    Args:
        gain: By `perturbation_gain`, of a change at one token.
        position: That token's; what stands before it does not change.
    """
    power = gain[:, position:].double().square()
    distance = torch.arange(power.shape[1], device=gain.device, dtype=power.dtype)
    return ((power * distance).sum(-1) / power.sum(-1)).nan_to_num(0)  # NaN where nothing changes


# ------------------------------------------------------------------ the far past


def effective_remembrance(
    model: Callable[[Tensor], Tensor], tokens: Int[Tensor, "B L"], starts: Sequence[int]
) -> Float[Tensor, "T B"]:
    """Measure how much an answer depends on what stood before a token.

        EffRem_T(t) = TV(q(. | x_0:T), q(. | x_t:T)),  TV(p, q) = 1/2 sum |p - q|

    q is the distribution after the last token. 0 where the model answers the same without the first
    t tokens, 1 where it answers something else for sure. Nothing of a model's inside is needed.

    Args:
        model: Gives logits at every position, the same wherever a sequence starts.
        tokens: Sequences.
        starts: The tokens t, each at least 1 and below L.

    Source: Buitrago and Gu 2025, arXiv 2507.02782.
    """
    whole = model(tokens)[:, -1].double().softmax(-1)
    cut = [model(tokens[:, t:])[:, -1].double().softmax(-1) for t in starts]
    return torch.stack([(whole - q).abs().sum(-1) / 2 for q in cut])
