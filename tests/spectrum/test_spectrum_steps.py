"""The spectrum of states whose rows turn, and of tokens that take several steps: dense matrices."""

import math
from dataclasses import replace

import pytest
import torch

from mad_efla import spectrum
from mad_efla.mixers._dynamics import Dynamics

B, L, H, N, P = 2, 12, 3, 6, 4


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory(L=L, *, low_rank=False, turned=False, substeps=1):
    angle = randn(B, L, H, N // 2, seed=5) if turned else None
    a = 0.3 * randn(B, L, H, N, seed=6) if low_rank else None
    b = 0.3 * randn(B, L, H, N, seed=7) if low_rank else None
    return Dynamics(
        log_decay=-randn(B, L, H, N, seed=1).abs(),
        **{name: randn(B, L, H, N, seed=i) for i, name in enumerate("kq", start=2)},
        v=randn(B, L, H, P, seed=4),
        **{"angle": angle, "a": a, "b": b, "substeps": substeps},
    )


def dense(dynamics):
    """Every token's transition as a matrix, [B tokens H N N], its steps multiplied."""
    A = torch.diag_embed(dynamics.log_decay.exp())
    if dynamics.angle is not None:
        turn = torch.zeros_like(A)
        for i in range(N // 2):
            cos, sin = dynamics.angle[..., i].cos(), dynamics.angle[..., i].sin()
            turn[..., 2 * i, 2 * i], turn[..., 2 * i, 2 * i + 1] = cos, -sin
            turn[..., 2 * i + 1, 2 * i], turn[..., 2 * i + 1, 2 * i + 1] = sin, cos
        A = A @ turn
    if dynamics.a is not None:
        A = A + dynamics.a[..., :, None] * dynamics.b[..., None, :]
    return A


def whole(dynamics):
    tokens = dense(dynamics).unflatten(1, (-1, dynamics.substeps)).unbind(2)
    product = tokens[0]
    for A in tokens[1:]:
        product = A @ product
    return product


def dense_states(dynamics):
    A, S, out = dense(dynamics), torch.zeros(B, H, N, P, dtype=torch.float64), []
    for t in range(dynamics.k.shape[1]):
        S = A[:, t] @ S + dynamics.k[:, t, :, :, None] * dynamics.v[:, t, :, None, :]
        out.append(S)
    return torch.stack(out)[dynamics.substeps - 1 :: dynamics.substeps]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


KINDS = {
    "turned": {"turned": True},
    "turned and corrected": {"turned": True, "low_rank": True},
    "two steps": {"low_rank": True, "substeps": 2},
    "three diagonal steps": {"substeps": 3},
    "two turned steps": {"turned": True, "substeps": 2},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@kinds
def test_products_are_the_dense_ones(kind):
    dynamics, A = memory(**kind), whole(memory(**kind))
    found = spectrum.products(dynamics, lags=[1, 2, 4], starts=2)
    starts = sorted({0, dynamics.tokens - 4})
    assert len(found.log_singular_values) == len(starts)
    for logs, start in zip(found.log_singular_values, starts, strict=True):
        for i, lag in enumerate((1, 2, 4)):
            product = torch.eye(N, dtype=torch.float64)
            for t in range(start, start + lag):
                product = A[:, t] @ product
            close(logs[i], torch.linalg.svdvals(product).log(), 1e-7)


@kinds
def test_exponents_add_up_to_the_determinants(kind):
    dynamics = memory(**kind)
    logs = torch.linalg.slogdet(whole(dynamics)).logabsdet.mean(1)
    close(spectrum.lyapunov(dynamics).sum(-1), logs)


@kinds
def test_states_are_the_dense_ones_after_each_token(kind):
    dynamics = memory(**kind)
    expected = dense_states(dynamics)
    found = [S * size.exp()[..., None, None] for S, size in spectrum.states(dynamics)]
    close(torch.stack(found), expected)
    sizes = spectrum.state_spectrum(dynamics, [dynamics.tokens - 1]).log_singular_values[0]
    close(sizes.exp(), torch.linalg.svdvals(expected[-1]))


@kinds
def test_reach_counts_tokens(kind):
    dynamics = memory(**kind)
    A, n, tokens = dense(dynamics), dynamics.substeps, dynamics.tokens
    t = tokens - 2
    weights, row = torch.zeros(B, H, tokens).double(), dynamics.q[:, (t + 1) * n - 1]
    for s in reversed(range((t + 1) * n)):
        size = (row * dynamics.k[:, s]).sum(-1).abs() * dynamics.v[:, s].norm(dim=-1)
        weights[..., s // n] += size
        row = torch.einsum("bhnm,bhn->bhm", A[:, s], row)
    p = weights / weights.sum(-1, keepdim=True)
    close(spectrum.reach(dynamics, [t]).distance[0], (p * (t - torch.arange(tokens))).sum(-1))


def test_a_turn_and_one_decay_are_the_modulus_and_angle_of_the_eigenvalues():
    dynamics = memory(turned=True)
    log_decay = dynamics.log_decay[..., :1].expand(dynamics.k.shape)
    dynamics = replace(dynamics, log_decay=log_decay)
    found = spectrum.per_token(dynamics)
    values = torch.linalg.eigvals(dense(dynamics))
    close(values.abs(), found.eigenvalue[..., None].expand(values.shape))
    angles = torch.remainder(found.angle + math.pi, 2 * math.pi) - math.pi
    both = torch.cat([angles, -angles], dim=-1).sort(-1).values
    close(values.angle().sort(-1).values, both)


def test_a_token_is_a_whole_number_of_steps():
    with pytest.raises(ValueError, match="L=12 must be a multiple of substeps=5"):
        memory(substeps=5)
