"""Hyena's long convolution and its filter."""

import math

import torch

from tests.mixer import D, L, example, make


def test_it_is_a_gated_sum_over_the_past():
    mixer, x = make("hyena", {"conv": 0}), example()
    p, g, v = mixer.inp(x).chunk(3, dim=-1)
    u, h = g * v, mixer._taps(L)
    y = torch.stack([sum(h[t - s] * u[:, s] for s in range(t + 1)) for t in range(L)], 1)
    expected = mixer.out(p * (y + mixer.skip * u))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-11)


def test_the_filter_is_a_function_of_the_distance_alone():
    mixer, x = make("hyena", {}), example()
    torch.testing.assert_close(mixer._taps(7), mixer._taps(40)[:7], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mixer(x)[:, :9], mixer(x[:, :9]), rtol=1e-10, atol=1e-12)


def test_channels_forget_at_different_rates_and_never_wholly():
    mixer = make("hyena", {"scale": 100})
    mixer.filter = torch.nn.Linear(1 + 2 * mixer.config.bands, D, dtype=torch.float64)
    torch.nn.init.zeros_(mixer.filter.weight)
    torch.nn.init.ones_(mixer.filter.bias)
    taps = mixer._taps(2000)
    assert torch.allclose(taps[0], torch.tensor(1.05, dtype=torch.float64))
    assert math.isclose(taps[150, 0].item(), 0.01 + 0.05, rel_tol=1e-6)
    assert math.isclose(taps[30, -1].item(), 0.01 + 0.05, rel_tol=1e-6)
    assert torch.allclose(taps[-1], torch.tensor(0.05, dtype=torch.float64), atol=1e-6)


def test_the_state_is_every_input_so_far():
    mixer = make("hyena", {})
    window = 2 * 3 * D
    assert [mixer.state_size(n) for n in (0, 1, 50)] == [window, D + window, 50 * D + window]
