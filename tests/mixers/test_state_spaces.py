"""Mamba and Mamba-2: against their equations, and where they start."""

import torch
from torch.nn.functional import silu, softplus

from tests.mixer import L, example, make


def test_mamba_is_its_equation():
    mixer, x = make("mamba", {"expand": 2, "state_dim": 3, "dt_rank": 5, "conv": 0}), example()
    u, z = mixer.inp(x).chunk(2, dim=-1)
    u = silu(u)
    selected = mixer.select(u)
    dt, b, c = selected[..., :5], selected[..., 5:8], selected[..., 8:]
    dt = softplus(dt @ mixer.dt.weight.T + mixer.dt.bias)
    a = -mixer.a_log.exp().view(-1, 3)
    S = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for t in range(L):
        drive = (dt * u)[:, t, :, None] * b[:, t, None, :]
        S = (dt[:, t, :, None] * a).exp() * S + drive
        outputs.append((S * c[:, t, None, :]).sum(-1))
    y = (torch.stack(outputs, 1) + mixer.skip * u) * silu(z)
    torch.testing.assert_close(mixer(x), mixer.out(y), rtol=1e-9, atol=1e-12)


def test_mamba_starts_as_published():
    mixer = make("mamba", {}, d_model=128)
    rates = mixer.a_log.exp().view(128, 16)
    expected = torch.arange(1.0, 17, dtype=rates.dtype).expand_as(rates)
    torch.testing.assert_close(rates, expected, rtol=1e-6, atol=0)
    assert mixer.widths == (8, 16, 16)
    steps = softplus(mixer.dt.bias)
    assert 1e-3 * 0.999 < steps.min() < 2e-3
    assert 0.05 < steps.max() < 0.1 * 1.001
    assert mixer.dt.weight.abs().max() <= 8**-0.5


def test_rates_are_no_matrices_so_weight_decay_leaves_them_alone():
    for name in ("mamba", "mamba2", "gated_deltanet"):
        assert make(name, {}).a_log.ndim == 1
