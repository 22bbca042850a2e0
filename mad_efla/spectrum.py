"""What a trained mixer does with its memory: decay, products of transitions, states, reach, gain.

Every function but `diagnose` is pure and reads the `Dynamics` of one layer on one batch,

    S_t = A_t S_{t-1} + k_t v_t^T,  A_t = diag(exp(log_decay_t)) R(angle_t) + a_t b_t^T
    o_t = S_t^T q_t

whatever mixer it comes from. Where a token takes several steps, lags, times and distances count
tokens, decay and keys are those of each step. `diagnose` runs a model, hands each layer to them,
and reduces the lot to named scalars; `glance` takes the few that are cheap enough to log while a
model trains.

Memory, in float64 numbers per layer: a few times B L H N, and B H N (N + P). Transitions are
applied to matrices one token after the other and never stacked along L. Attention takes blocks
of queries, B H L * 64. Nothing overflows: products, states and weights carry the logarithm of
their size beside them. Singular values below 1e-15 of the largest one are rounding.

Legend: N rows of a head's state (key width), P columns (value width), T sampled tokens, s a
token where a product starts.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, Num
from torch import Tensor

from mad_efla.dynamics import AttentionTrace, Dynamics
from mad_efla.mixers import Mixer
from mad_efla.model import Backbone, TokenEmbedding

SATURATED = 4.0
"""x beyond which an exact step forgets all but 2 % of what lies under its key; `wiped` counts the
tokens that do, whatever their step."""
EULER_LIMIT = 2.0
"""x beyond which an Euler step makes the state grow along its key."""

_BLOCK = 64  # tokens converted, or queries of attention, at once
_SAMPLES = 16  # tokens whose state, or whose reach, is looked at
_STARTS = 4  # tokens from which products of transitions are followed
_LAGS = 24
_HUGE = 1e100  # sizes beyond it go into the logarithm


# ------------------------------------------------------------------ single tokens


class PerToken(NamedTuple):
    """Decay of each token; see `per_token`."""

    eigenvalue: Float[Tensor, "B L H"]
    erase: Float[Tensor, "B L H"]
    x: Float[Tensor, "B L H *N"] | None
    key_square: Float[Tensor, "B L H"] | None
    beta: Float[Tensor, "B L H"] | None
    angle: Float[Tensor, "B L H half"] | None


def per_token(dynamics: Dynamics) -> PerToken:
    """Compute how much of the old state each token leaves, in float64.

    With u the direction of `b`, or of `k` where there is no `b`, and d = exp(log_decay):

        eigenvalue = u^T A u = d_u (1 - erase),    d_u = sum_i d_i u_i^2
        x          = beta lambda in the delta family, -log_decay per channel where A is diagonal

    Where d is one number per head, as in the delta family and Mamba-2, this is the eigenvalue
    along k: d exp(-x) for the exact step, d (1 - x) for Euler's, `step_eigenvalue` for all, and
    exp(dt a) for Mamba-2. Where A turns pairs of rows, eigenvalues are d exp(+- i angle): then
    `eigenvalue` is their modulus and `angle` beside it, in radians. Where d differs between
    channels it is the mean share kept along u, and the eigenvalues of a diagonal A are exp(-x).
    RWKV-7's transition is no step of a flow: no x. A zero key has no direction; all channels then
    count the same. The eigenvalue is that of the transition the mixer computed with: in float32,
    what an erase of nearly 1 leaves is rounding under 1e-7.

    Source: Lei et al., arXiv 2512.12602, Eq. 15.
    """
    along = dynamics.k if dynamics.b is None else dynamics.b
    weight = along.double().square()
    length = weight.sum(-1, keepdim=True)
    weight = torch.where(length > 0, weight / length, 1 / weight.shape[-1])
    kept = (weight * dynamics.log_decay.double().exp()).sum(-1)
    erase = torch.zeros_like(kept)
    if dynamics.a is not None and dynamics.b is not None:
        erased = -(dynamics.a.double() * dynamics.b.double()).sum(-1)
        erase = torch.where(kept > 0, erased / kept, 0)
    lambda_, beta, x = dynamics.key_square, dynamics.beta, None
    if lambda_ is not None and beta is not None:
        lambda_, beta = lambda_.double(), beta.double()
        x = beta * lambda_
    elif dynamics.a is None:
        x = -dynamics.log_decay.double()
    angle = None if dynamics.angle is None else dynamics.angle.double()
    return PerToken(kept * (1 - erase), erase, x, lambda_, beta, angle)


def step_eigenvalue(x: Float[Tensor, "*axes"], step: str) -> Float[Tensor, "*axes"]:
    """Return the factor along k that a step of the flow dS/ds = -k k^T S leaves, x = beta |k|^2.

        exact  exp(-x)     euler  1 - x    implicit  1 / (1 + x)
        rk2    1 - x + x^2/2               rk4       1 - x + x^2/2 - x^3/6 + x^4/24

    In size it is at most 1 up to x = 2 (Euler, RK-2) and 2.785 (RK-4), without limit otherwise.

    Raises:
        ValueError: If `step` is none of these. Kaczmarz's 1 - beta is no function of x.

    Source: Hairer and Wanner, Solving Ordinary Differential Equations II, section IV.2.
    """
    match step:
        case "exact":
            return torch.exp(-x)
        case "euler":
            return 1 - x
        case "rk2":
            return 1 - x * (1 - x / 2)
        case "rk4":
            return 1 - x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4)))
        case "implicit":
            return 1 / (1 + x)
    raise ValueError(f"step={step!r} has no factor in x; take exact, euler, rk2, rk4 or implicit")


def step_error(x: Float[Tensor, "*axes"], step: str) -> Float[Tensor, "*axes"]:
    """Return what a step gets wrong: the distance of its factor along k from exp(-x).

    It is also the error of S^T k / |k|^2, what the state answers to k after the token, per unit of
    the distance between v / |k|^2 and that answer before it.
    """
    return (step_eigenvalue(x, step) - torch.exp(-x)).abs()


# ------------------------------------------------------------------ products of transitions


class Products(NamedTuple):
    """Singular values of A_{s+lag-1} ... A_s, largest first; see `products`."""

    lags: Int[Tensor, "lags"]
    log_singular_values: Float[Tensor, "starts lags B H N"]


class Horizon(NamedTuple):
    """Lags, in tokens, at which memory falls under 1/e; inf where it does not."""

    mean: Float[Tensor, "starts B H"]
    median: Float[Tensor, "starts B H"]
    slowest: Float[Tensor, "starts B H"]


def products(
    dynamics: Dynamics, lags: Sequence[int] | None = None, *, starts: int = _STARTS
) -> Products:
    """Compute what is left of a state after some lags: singular values of products of transitions.

    Args:
        dynamics: Of one layer.
        lags: Tokens multiplied together, rising; None takes 24 up to half the sequence, evenly
            spaced in their logarithm.
        starts: Tokens from which the lags are followed, at most, spread evenly.

    Raises:
        ValueError: If the lags do not rise from 1 or more to L at most.
    """
    L = dynamics.tokens
    if lags is None:
        lags = _whole(np.geomspace(1, max(1, L // 2), _LAGS))
    if not lags or lags[0] < 1 or lags[-1] > L or list(lags) != sorted(set(lags)):
        raise ValueError(f"lags={list(lags)} must rise within [1, {L}], the sequence's length")
    diagonal = dynamics.a is None and dynamics.angle is None
    follow = _diagonal_product if diagonal else _product
    first = _whole(np.linspace(0, L - lags[-1], starts))
    found = [torch.stack(list(follow(dynamics, s, lags))) for s in first]
    return Products(torch.tensor(lags), torch.stack(found))


def _diagonal_product(dynamics: Dynamics, start: int, lags: Sequence[int]) -> Iterator[Tensor]:
    before, total = 0, torch.zeros_like(dynamics.log_decay[:, 0], dtype=torch.float64)
    n = dynamics.substeps
    for lag in lags:
        window = dynamics.log_decay[:, (start + before) * n : (start + lag) * n]
        total, before = total + window.sum(1, dtype=torch.float64), lag
        yield total.sort(-1, descending=True).values


def _product(dynamics: Dynamics, start: int, lags: Sequence[int]) -> Iterator[Tensor]:
    product = _identity(dynamics)
    log_size = product.new_zeros(product.shape[:-2])
    n = dynamics.substeps
    transitions = _transitions(dynamics, range(start * n, (start + lags[-1]) * n))
    for i, A in enumerate(transitions, 1):
        product, log_size = _rescaled(_apply(A, product), log_size, tiny=1 / _HUGE)
        if i % n == 0 and i // n in lags:
            yield torch.linalg.svdvals(product).log() + log_size[..., None]


def horizon(products: Products) -> Horizon:
    """Return the lag at which mean, median and largest singular value fall under 1/e.

    Between two lags the logarithm is taken to be linear, which is exact for a constant decay g:
    1 / -log(g). The median of an even number is the lower of the two in the middle.
    """
    logs = products.log_singular_values
    mean = logs.logsumexp(-1) - math.log(logs.shape[-1])
    lags = products.lags.to(logs.device)
    return Horizon(*(_crossing(lags, y) for y in (mean, logs.median(-1).values, logs[..., 0])))


def _crossing(lags: Tensor, log_size: Float[Tensor, "starts lags B H"]) -> Tensor:
    """Find where a curve that starts at log 1 first falls under -1."""
    size = torch.nn.functional.pad(log_size.movedim(1, -1), (1, 0))  # lag 0 keeps all
    at = torch.nn.functional.pad(lags.to(size.dtype), (1, 0)).expand(size.shape)
    under = size < -1
    i = under.int().argmax(-1, keepdim=True).clamp_min(1)  # the first one under
    (x0, y0), (x1, y1) = ((at.gather(-1, j), size.gather(-1, j)) for j in (i - 1, i))
    crossing = x0 + (x1 - x0) * (y0 + 1) / (y0 - y1)
    return torch.where(under.any(-1), crossing[..., 0], math.inf)


def lyapunov(dynamics: Dynamics) -> Float[Tensor, "B H N"]:
    """Compute the Lyapunov spectrum, in nats per token, largest first.

    Q_0 = I,  Q_t R_t = A_t Q_{t-1},  exponent_i = mean_t log |R_t,ii|. Exponent 0 is a direction
    that keeps its size, log(g) one that decays by g a token, -inf one that a token wipes out. What
    the exponents owe to the start, Q_0, falls like 1/L; their sum owes it nothing.

    Source: Benettin et al. 1980, Meccanica 15, 9-20; Eckmann and Ruelle 1985, Rev. Mod. Phys. 57,
    617-656.
    """
    L = dynamics.k.shape[1]
    if dynamics.a is None and dynamics.angle is None:
        logs = dynamics.log_decay.sum(1, dtype=torch.float64)
    else:
        Q = _identity(dynamics)
        logs = torch.zeros(Q.shape[:-1], dtype=Q.dtype, device=Q.device)
        for A in _transitions(dynamics, range(L)):
            Q, R = torch.linalg.qr(_apply(A, Q))
            logs += R.diagonal(dim1=-2, dim2=-1).abs().log()
    return (logs / dynamics.tokens).sort(-1, descending=True).values


# ------------------------------------------------------------------ states and keys


class StateSpectrum(NamedTuple):
    """Singular values of the state after some tokens; see `state_spectrum`."""

    times: Int[Tensor, "T"]
    log_singular_values: Float[Tensor, "T B H R"]
    effective_rank: Float[Tensor, "T B H"]
    stable_rank: Float[Tensor, "T B H"]
    capacity_used: Float[Tensor, "T B H"]


def states(dynamics: Dynamics) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the recurrence in float64; after each token yield S [B H N P] and log c [B H].

    c S is the state.
    """
    B, L, H, N = dynamics.k.shape
    tokens = range(L)
    S = dynamics.v.new_zeros(B, H, N, dynamics.v.shape[-1], dtype=torch.float64)
    log_size = S.new_zeros(B, H)
    keys, values = _each(dynamics.k, tokens), _each(dynamics.v, tokens)
    steps = zip(_transitions(dynamics, tokens), keys, values, strict=True)
    for i, (A, k, v) in enumerate(steps, 1):
        k = k * (-log_size).exp()[..., None]
        S = torch.addcmul(_apply(A, S), k[..., None], v[..., None, :])
        S, log_size = _rescaled(S, log_size)
        if i % dynamics.substeps == 0:
            yield S, log_size


def state_spectrum(dynamics: Dynamics, times: Sequence[int] | None = None) -> StateSpectrum:
    """Compute singular values sigma of the state, and how many of its directions are in use.

        effective rank  exp(-sum_i p_i log p_i),  p = sigma / sum(sigma)
        stable rank     sum(sigma^2) / max(sigma)^2
        capacity used   effective rank / R

    R = min(N, P). A zero state has rank 0. Where P = 1 (Mamba), the states of all heads are the
    columns of one matrix, and H is 1 in the result.

    Args:
        dynamics: Of one layer.
        times: Tokens after which the state is looked at; None takes 16, spread evenly to the last.

    Source: Roy and Vetterli 2007, The effective rank, EUSIPCO; Rudelson and Vershynin 2007,
    arXiv math/0503442, section 1.
    """
    times = _sampled(dynamics.tokens, times)
    looked = []
    for t, (S, log_size) in enumerate(states(dynamics)):
        if t in times:
            if S.shape[-1] == 1:
                largest = log_size.amax(1, keepdim=True)
                S = S * (log_size - largest).exp()[..., None, None]
                S, log_size = rearrange(S, "B H N 1 -> B 1 N H"), largest
            looked.append(torch.linalg.svdvals(S).log() + log_size[..., None])
    logs = torch.stack(looked)
    relative = (logs - logs[..., :1]).exp().nan_to_num(0)  # NaN for a zero state
    effective, stable = _effective_rank(relative), relative.square().sum(-1)
    return StateSpectrum(torch.tensor(times), logs, effective, stable, effective / logs.shape[-1])


class KeyOverlap(NamedTuple):
    """How much the keys of a sequence stand in each other's way; see `key_overlap`."""

    spectrum: Float[Tensor, "B H N"]
    condition: Float[Tensor, "B H"]
    square_cosine: Float[Tensor, "B H"]
    effective_rank: Float[Tensor, "B H"]


def key_overlap(dynamics: Dynamics) -> KeyOverlap:
    """Compute the spectrum of the Gram matrix of a sequence's unit keys, and what follows from it.

    The matrix is K K^T / L, its rows k_t / |k_t|; its eigenvalues other than zero are those of the
    small K^T K / L, and their sum is 1. Orthogonal keys have N equal ones, a key repeated a
    single one.

        condition      largest over least of the min(L, N) that can differ from zero, at most 1e15
        square cosine  mean over pairs s != t of (k_s . k_t)^2, 1/N for keys of random direction
        effective rank as in `state_spectrum`: how many directions the keys spread over

    Zero keys have no direction and are left out of all but L. A single key has square cosine 0.

    Source: Benedetto and Fickus 2003, Adv. Comput. Math. 18, 357-385 (frame potential: the sum of
    square cosines).
    """
    k = dynamics.k.double()
    L, N = k.shape[1], k.shape[-1]
    k = torch.nn.functional.normalize(k, dim=-1, eps=1e-300)
    gram = torch.einsum("blhn,blhm->bhnm", k, k)
    present = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    pairs = gram.square().sum((-2, -1)) - present
    values = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0) / L
    least = values[..., min(L, N) - 1].clamp_min(values[..., 0] * 1e-15)
    return KeyOverlap(
        spectrum=values,
        condition=torch.where(least > 0, values[..., 0] / least, 1),
        square_cosine=pairs.clamp_min(0) / (present * (present - 1)).clamp_min(1),
        effective_rank=_effective_rank(values),
    )


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
        times = list(range(L)) if times is None else _sampled(L, times)
        blocks = (times[i : i + _BLOCK] for i in range(0, len(times), _BLOCK))
        parts = [_spread_of(block, _attention_logs(memory, block)) for block in blocks]
    else:
        times = _sampled(memory.tokens, times)
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
    queries, keys = _each(dynamics.q, back), _each(dynamics.k, back)
    for s, A, q, k in zip(back, _transitions(dynamics, back), queries, keys, strict=True):
        if s in ends:
            U[..., ends.index(s)] = q
        logs[..., s] = (k[..., None, :] @ U)[..., 0, :].abs().log() + log_size
        columns, log_size = _rescaled(_apply(A.transposed(), U).mT[..., None], log_size)
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

    Source: Trefethen and Bau, Numerical Linear Algebra, lecture 12.
    """
    whole = (
        torch.linalg.vector_norm(z, dim=(1, 2), dtype=torch.float64)[:, None]
        for z in (x, changed_x - x, y)
    )
    size, change, out = whole
    moved = torch.linalg.vector_norm(changed_y - y, dim=-1, dtype=torch.float64)
    return torch.where(moved == 0, 0, moved / out * size / change)


class Gain(NamedTuple):
    """Gain of one token replaced by another, and of noise on all embeddings."""

    token: Float[Tensor, "B L"]
    noise: Float[Tensor, "B L"]


# ------------------------------------------------------------------ a whole model


@dataclass(frozen=True, kw_only=True)
class LayerDiagnosis:
    """All of the above for one mixer; None where a quantity does not exist for its kind.

    Attributes:
        mixer: Its name.
        kind: Whether its memory is a state, attention, or neither.
        step: How a state's flow is integrated.
        finite: Whether what it computes from its input is finite; otherwise there is only `gain`.
        gain: From the mixer's input to its output, for the changes that arrive there.
    """

    mixer: str
    kind: Literal["state", "attention", "none"]
    gain: Gain
    finite: bool = True
    step: str | None = None
    tokens: PerToken | None = None
    products: Products | None = None
    lyapunov: Float[Tensor, "B H N"] | None = None
    state: StateSpectrum | None = None
    keys: KeyOverlap | None = None
    reach: Reach | None = None

    def scalars(self) -> dict[str, float]:
        """Reduce to numbers: means over batch, tokens and heads unless the name says otherwise.

        Those of the state are of the last token. `horizon` is that of the median singular value,
        `horizon_mean` and `horizon_slowest` of the others; `_p50` is the median over heads and
        starts, cut to the longest lag followed, and `_beyond` the share that lies beyond it.
        """
        found = {
            "finite": torch.tensor(float(self.finite)),
            "gain_token": _norm(self.gain.token),
            "gain_noise": _norm(self.gain.noise),
        }
        if self.tokens is not None:
            found |= _token_scalars(self.tokens)
        if self.products is not None:
            found |= _horizon_scalars(self.products)
        if self.lyapunov is not None:
            found["lyapunov_max"] = self.lyapunov.max()
            found["lyapunov_p50"] = self.lyapunov.median()
        if self.state is not None:
            found |= _rank_scalars(self.state)
            found["state_stable_rank"] = self.state.stable_rank[-1]
            found["state_log_norm_max"] = self.state.log_singular_values[-1].max()
        if self.keys is not None:
            found["keys_condition_p50"] = self.keys.condition.median()
            found["keys_square_cosine"] = self.keys.square_cosine
            found["keys_effective_rank"] = self.keys.effective_rank
        if self.reach is not None:
            found |= _reach_scalars(self.reach)
        return {name: value.mean().item() for name, value in found.items()}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A model's layers, first one first, and the gain from its embeddings to its logits."""

    layers: list[LayerDiagnosis]
    gain: Gain

    def scalars(self) -> dict[str, float]:
        """Return `spectrum/layer0/...` for each layer and `spectrum/...` for the model.

        The latter are means over the layers that have the quantity; the gains are the model's own.
        """
        layers = [layer.scalars() for layer in self.layers]
        names = {name: None for layer in layers for name in layer}
        found = {n: _mean([layer[n] for layer in layers if n in layer]) for n in names}
        found |= {"gain_token": _norm(self.gain.token).mean().item()}
        found |= {"gain_noise": _norm(self.gain.noise).mean().item()}
        for i, layer in enumerate(layers):
            found |= {f"layer{i}/{name}": value for name, value in layer.items()}
        return {f"spectrum/{name}": value for name, value in found.items()}


def finite(scalars: dict[str, float]) -> dict[str, float]:
    """Leave out what is infinite or no number, as an exponent of a memory that is wiped out."""
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


@torch.no_grad()
def diagnose(
    model: Backbone,
    tokens: Num[Tensor, "B L"],
    *,
    position: int | None = None,
    noise: float = 0.01,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    """Diagnose a model on a batch; neither its weights nor its mode are changed.

    Layers are taken one after the other; beside the dynamics of one, all mixers' inputs and
    outputs are kept, thrice.

    Args:
        model: In evaluation mode.
        tokens: Input; a few sequences are enough.
        position: The token replaced by another of the vocabulary; None takes the middle one. A
            real number is moved by the standard deviation of all inputs instead.
        noise: Size of the noise on the embeddings, as a share of theirs.
        generator: Draws noise and replacement, on the CPU; None takes a fixed seed.

    Raises:
        ValueError: If `position` is outside the sequence or the vocabulary has one token.
    """
    L = tokens.shape[1]
    position = L // 2 if position is None else position
    if not 0 <= position < L:
        raise ValueError(f"position={position} must lie in [0, {L}), the sequence's length")
    generator = generator or torch.Generator().manual_seed(0)
    other = tokens.clone()
    if tokens.is_floating_point():
        other[:, position] += tokens.std()
    else:
        other[:, position] = _others(model, tokens[:, position], generator)
    clean = _record(model, tokens)
    change = torch.randn(clean[0].x.shape, generator=generator).to(clean[0].x)
    change = change * (noise * clean[0].x.norm() / change.norm())
    replaced, noisy = _record(model, other), _record(model, tokens, change)
    gains = [Gain(_gain(c, r), _gain(c, n)) for c, r, n in zip(clean, replaced, noisy, strict=True)]
    inputs = [passed.x for passed in clean]
    layers = map(_diagnose_layer, model.mixers, inputs[1:], gains[1:])
    return Diagnosis(layers=list(layers), gain=gains[0])


def _others(model: Backbone, tokens: Int[Tensor, "B"], generator: torch.Generator) -> Tensor:
    """Draw another token of the vocabulary for each."""
    embed = model.stack.embed
    assert isinstance(embed, TokenEmbedding)
    V = embed.num_embeddings
    if V < 2:
        raise ValueError("a vocabulary of one token has no other to put in its place")
    shift = torch.randint(1, V, tokens.shape, generator=generator).to(tokens.device)
    return (tokens.long() + shift) % V


class _Passed(NamedTuple):
    """What went into a module, and what came out."""

    x: Tensor
    y: Tensor


def _record(model: Backbone, tokens: Tensor, change: Tensor | None = None) -> list[_Passed]:
    """Run a model on changed embeddings; return embeddings and logits, then each mixer's part."""
    embedded: list[Tensor] = []
    passed: list[_Passed] = []

    def embed(module, arguments, y):
        embedded.append(y if change is None else y + change)
        return embedded[0]

    def mix(module, arguments, y):
        passed.append(_Passed(arguments[0], y))

    hooks = [model.stack.embed.register_forward_hook(embed)]
    hooks += [mixer.register_forward_hook(mix) for mixer in model.mixers]
    try:
        logits = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return [_Passed(embedded[0], logits), *passed]


def _gain(clean: _Passed, changed: _Passed) -> Tensor:
    return perturbation_gain(clean.x, changed.x, clean.y, changed.y)


def _diagnose_layer(mixer: Mixer, x: Float[Tensor, "B L D"], gain: Gain) -> LayerDiagnosis:
    memory, name = mixer.dynamics(x), mixer.config.name
    if memory is None:
        return LayerDiagnosis(mixer=name, kind="none", gain=gain)
    kind = "attention" if isinstance(memory, AttentionTrace) else "state"
    if not _finite(memory):
        return LayerDiagnosis(mixer=name, kind=kind, gain=gain, finite=False)
    looked = reach(memory, _sampled(x.shape[1]))
    if isinstance(memory, AttentionTrace):
        return LayerDiagnosis(mixer=name, kind=kind, gain=gain, reach=looked)
    return LayerDiagnosis(
        mixer=name,
        kind=kind,
        gain=gain,
        step=memory.step,
        tokens=per_token(memory),
        products=products(memory),
        lyapunov=lyapunov(memory),
        state=state_spectrum(memory),
        keys=key_overlap(memory),
        reach=looked,
    )


def _finite(memory: Dynamics | AttentionTrace) -> bool:
    tensors = {n: x for n, x in vars(memory).items() if isinstance(x, Tensor)}
    decay = tensors.pop("log_decay", None)
    return all(bool(x.isfinite().all()) for x in tensors.values()) and (
        decay is None or bool((decay < math.inf).all())
    )


def _token_scalars(tokens: PerToken) -> dict[str, Tensor]:
    found = _eigenvalue_scalars(tokens) | {
        "erase_mean": tokens.erase,
        "wiped": (tokens.erase > 1 - math.exp(-SATURATED)).double(),
    }
    if tokens.key_square is not None and tokens.beta is not None:
        found |= {"lambda_mean": tokens.key_square, "beta_mean": tokens.beta}
    if (x := tokens.x) is not None:
        found |= {"x_mean": x, "x_p50": x.median(), "x_max": x.max()}
        found |= {f"error_{step}": step_error(x, step) for step in ("euler", "rk2", "rk4")}
    return found


def _eigenvalue_scalars(tokens: PerToken) -> dict[str, Tensor]:
    found = {
        "eigenvalue_mean": tokens.eigenvalue,
        "eigenvalue_min": tokens.eigenvalue.min(),
        "eigenvalue_max": tokens.eigenvalue.max(),
    }
    if tokens.angle is not None:
        found["angle_mean"], found["angle_max"] = tokens.angle.abs(), tokens.angle.abs().max()
    if tokens.x is not None:
        found["saturated"] = (tokens.x > SATURATED).double()
        found["beyond_euler"] = (tokens.x > EULER_LIMIT).double()
    return found


def _horizon_scalars(products: Products) -> dict[str, Tensor]:
    found, longest = {}, float(products.lags[-1])
    for name, lags in horizon(products)._asdict().items():
        name = "horizon" if name == "median" else f"horizon_{name}"
        found[f"{name}_p50"] = lags.clamp_max(longest).median()
        found[f"{name}_beyond"] = lags.isinf().double()
    return found


def _rank_scalars(state: StateSpectrum) -> dict[str, Tensor]:
    return {
        "state_effective_rank": state.effective_rank[-1],
        "state_capacity_used": state.capacity_used[-1],
    }


def _reach_scalars(looked: Reach) -> dict[str, Tensor]:
    return {"reach_entropy": looked.entropy, "reach_distance": looked.distance}


# ------------------------------------------------------------------ while training


@torch.no_grad()
def glance(model: Backbone, inputs: Tensor) -> dict[str, float]:
    """Take the scalars of `diagnose` that cost little: decay, horizon, rank, attention's reach.

    Names and definitions are those of `Diagnosis.scalars`, means over layers; horizons are followed
    over powers of two from two starts only, and interpolated between them. What is not finite is
    left out, and so is a layer that hands out no dynamics. Nothing of the model is changed, no
    random number is drawn, and on a GPU only the forward pass runs there.

    Args:
        model: A language model or an autoencoder.
        inputs: What it takes; two sequences are enough. Autocast holds for the forward pass alone.
    """
    device = inputs.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        layers = [
            _glance_layer(mixer, x.float())
            for mixer, x in zip(model.mixers, _mixer_inputs(model, inputs), strict=True)
        ]
    means = [{name: value.mean().item() for name, value in layer.items()} for layer in layers]
    names = {name: None for layer in means for name in layer}
    found = {n: _mean([layer[n] for layer in means if n in layer]) for n in names}
    return finite({f"spectrum/{name}": value for name, value in found.items()})


def _mixer_inputs(model: Backbone, inputs: Tensor) -> list[Tensor]:
    """Run a model; return what went into each mixer."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for m in model.mixers]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _glance_layer(mixer: Mixer, x: Float[Tensor, "B L D"]) -> dict[str, Tensor]:
    if x.device.type != "cpu":  # token loops are quicker there, and no kernel is compiled for them
        mixer, x = copy.deepcopy(mixer).cpu(), x.cpu()
    with torch.autocast(x.device.type, enabled=False):
        memory = mixer.dynamics(x)
    if memory is None or not _finite(memory):
        return {}
    L = x.shape[1]
    if isinstance(memory, AttentionTrace):
        return _reach_scalars(reach(memory, _sampled(L)))
    longest = max(1, L // 2)
    lags = sorted({longest, *(2**i for i in range(longest.bit_length()))})
    horizons = _horizon_scalars(products(memory, lags, starts=2))
    return {
        **_eigenvalue_scalars(per_token(memory)),
        **{name: horizons[name] for name in ("horizon_p50", "horizon_beyond")},
        **_rank_scalars(state_spectrum(memory, [L - 1])),
    }


# ------------------------------------------------------------------ helpers


class _Transition(NamedTuple):
    """A = diag(decay) R + a b^T of one step, in float64, shaped to be applied to matrices.

    R turns pairs of rows; on the left of its decay where `turned_last`, as in a transpose.
    """

    decay: Float[Tensor, "B H N 1"]
    a: Float[Tensor, "B H N 1"] | None = None
    b: Float[Tensor, "B H 1 N"] | None = None
    angle: Float[Tensor, "B H half 1"] | None = None
    turned_last: bool = False

    def transposed(self) -> "_Transition":
        a = None if self.b is None else self.b.mT
        b = None if self.a is None else self.a.mT
        angle = None if self.angle is None else -self.angle
        return _Transition(self.decay, a, b, angle, not self.turned_last)


def _transitions(dynamics: Dynamics, tokens: range) -> Iterator[_Transition]:
    def columns(x: Tensor | None) -> Iterator[Tensor | None]:
        return repeat(None) if x is None else (y[..., None] for y in _each(x, tokens))

    given = (columns(x) for x in (dynamics.log_decay, dynamics.a, dynamics.b, dynamics.angle))
    for log_decay, a, b, angle in zip(*given, strict=False):
        assert log_decay is not None
        yield _Transition(log_decay.exp(), a, None if b is None else b.mT, angle)


def _each(x: Float[Tensor, "B L H D"], tokens: range) -> Iterator[Float[Tensor, "B H D"]]:
    """Yield tokens in float64, converted some at a time."""
    for i in range(0, len(tokens), _BLOCK):
        yield from x[:, list(tokens[i : i + _BLOCK])].double().unbind(1)


def _apply(A: _Transition, M: Float[Tensor, "B H N m"]) -> Float[Tensor, "B H N m"]:
    if A.angle is None:
        out = A.decay * M
    elif A.turned_last:
        out = _turned(A.decay * M, A.angle)
    else:
        out = A.decay * _turned(M, A.angle)
    return out if A.a is None or A.b is None else torch.addcmul(out, A.a, A.b @ M)


def _turned(M: Float[Tensor, "B H N m"], angle: Float[Tensor, "B H half 1"]) -> Tensor:
    """Turn rows 2i and 2i + 1 by angle_i."""
    first, second = M.unflatten(-2, (-1, 2)).unbind(-2)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-2)
    return turned.flatten(-3, -2)


def _identity(dynamics: Dynamics) -> Float[Tensor, "B H N N"]:
    B, _, H, N = dynamics.k.shape
    return torch.eye(N, dtype=torch.float64, device=dynamics.k.device).repeat(B, H, 1, 1)


def _rescaled(
    M: Float[Tensor, "*axes N m"], log_size: Float[Tensor, "*axes"], *, tiny: float = 0.0
) -> tuple[Float[Tensor, "*axes N m"], Float[Tensor, "*axes"]]:
    """Move the size of matrices that are huge, or under `tiny`, into the logarithm beside them."""
    size = torch.linalg.vector_norm(M, math.inf, dim=(-2, -1))
    off = (size > _HUGE) | ((size < tiny) & (size > 0))
    if not off.any():
        return M, log_size
    size = torch.where(off, size, 1)
    return M / size[..., None, None], log_size + size.log()


def _effective_rank(sizes: Float[Tensor, "*axes n"]) -> Float[Tensor, "*axes"]:
    """Return exp(entropy) of sizes as shares; 0 where all are 0."""
    total = sizes.sum(-1)
    entropy = torch.special.entr(sizes / total[..., None]).sum(-1)
    return torch.where(total > 0, entropy.exp(), 0)


def _norm(gain: Float[Tensor, "B L"]) -> Float[Tensor, "B"]:
    return gain.square().sum(-1).sqrt()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _whole(values: np.ndarray) -> list[int]:
    return sorted({round(value) for value in values.tolist()})


def _sampled(L: int, times: Sequence[int] | None = None) -> list[int]:
    """Return tokens to look at, rising; by default 16, spread evenly to the last one.

    Raises:
        ValueError: If one is outside the sequence, or one is given twice or out of order.
    """
    if times is None:
        return _whole(np.linspace(0, L - 1, min(L, _SAMPLES) + 1)[1:])
    if not times or list(times) != sorted(set(times)) or times[0] < 0 or times[-1] >= L:
        raise ValueError(f"times={list(times)} must rise within [0, {L}), the sequence's length")
    return list(times)
