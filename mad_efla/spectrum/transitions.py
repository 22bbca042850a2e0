"""What single tokens and runs of tokens leave of a state: eigenvalues, products of transitions.

    S_t = A_t S_{t-1} + k_t v_t^T,    A_t = diag(exp(log_decay_t)) R(angle_t) + a_t b_t^T

Transitions are applied to matrices one token after the other and never stacked along L. Nothing
overflows: products and states carry the logarithm of their size beside them. Singular values below
1e-15 of the largest one are rounding.

Legend: N rows of a head's state (key width), P columns (value width), s a token where a product
starts.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mad_efla.mixers._dynamics import Dynamics

SATURATED = 4.0
"""x beyond which an exact step forgets all but 2 % of what lies under its key; `wiped` counts the
tokens that do, whatever their step."""
EULER_LIMIT = 2.0
"""x beyond which an Euler step makes the state grow along its key."""

BLOCK = 64  # tokens converted, or queries of attention, at once
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


def products(dynamics: Dynamics, lags: Sequence[int] | None = None, *, starts: int = _STARTS) -> Products:
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
        lags = whole(np.geomspace(1, max(1, L // 2), _LAGS))
    if not lags or lags[0] < 1 or lags[-1] > L or list(lags) != sorted(set(lags)):
        raise ValueError(f"lags={list(lags)} must rise within [1, {L}], the sequence's length")
    diagonal = dynamics.a is None and dynamics.angle is None
    follow = _diagonal_product if diagonal else _product
    first = whole(np.linspace(0, L - lags[-1], starts))
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
    product = identity(dynamics)
    log_size = product.new_zeros(product.shape[:-2])
    n = dynamics.substeps
    found = transitions(dynamics, range(start * n, (start + lags[-1]) * n))
    for i, A in enumerate(found, 1):
        product, log_size = rescaled(apply(A, product), log_size, tiny=1 / _HUGE)
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
        Q = identity(dynamics)
        logs = torch.zeros(Q.shape[:-1], dtype=Q.dtype, device=Q.device)
        for A in transitions(dynamics, range(L)):
            Q, R = torch.linalg.qr(apply(A, Q))
            logs += R.diagonal(dim1=-2, dim2=-1).abs().log()
    return (logs / dynamics.tokens).sort(-1, descending=True).values


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


def transitions(dynamics: Dynamics, tokens: range) -> Iterator[_Transition]:
    """Yield A_t of some tokens, in float64."""

    def columns(x: Tensor | None) -> Iterator[Tensor | None]:
        return repeat(None) if x is None else (y[..., None] for y in each(x, tokens))

    given = (columns(x) for x in (dynamics.log_decay, dynamics.a, dynamics.b, dynamics.angle))
    for log_decay, a, b, angle in zip(*given, strict=False):
        assert log_decay is not None
        yield _Transition(log_decay.exp(), a, None if b is None else b.mT, angle)


def each(x: Float[Tensor, "B L H D"], tokens: range) -> Iterator[Float[Tensor, "B H D"]]:
    """Yield tokens in float64, converted some at a time."""
    for i in range(0, len(tokens), BLOCK):
        yield from x[:, list(tokens[i : i + BLOCK])].double().unbind(1)


def apply(A: _Transition, M: Float[Tensor, "B H N m"]) -> Float[Tensor, "B H N m"]:
    """Return A M."""
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


def identity(dynamics: Dynamics) -> Float[Tensor, "B H N N"]:
    """Return an identity for the state of each head."""
    B, _, H, N = dynamics.k.shape
    return torch.eye(N, dtype=torch.float64, device=dynamics.k.device).repeat(B, H, 1, 1)


def rescaled(
    M: Float[Tensor, "*axes N m"], log_size: Float[Tensor, "*axes"], *, tiny: float = 0.0
) -> tuple[Float[Tensor, "*axes N m"], Float[Tensor, "*axes"]]:
    """Move the size of matrices that are huge, or under `tiny`, into the logarithm beside them.

    Args:
        M: The matrices, over exp(log_size).
        log_size: Logarithm of the factor that stands beside each.
        tiny: Largest absolute entry under which a matrix is small; 0 for never.
    """
    size = torch.linalg.vector_norm(M, math.inf, dim=(-2, -1))
    off = (size > _HUGE) | ((size < tiny) & (size > 0))
    if not off.any():
        return M, log_size
    size = torch.where(off, size, 1)
    return M / size[..., None, None], log_size + size.log()


def whole(values: np.ndarray) -> list[int]:
    """Round to whole numbers, each once, rising."""
    return sorted({round(value) for value in values.tolist()})
