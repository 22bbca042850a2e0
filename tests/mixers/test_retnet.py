"""Retention: against its equation, token by token, and what its state does."""

import math

import pytest
import torch
import torch.nn.functional as F

from mad_efla import spectrum
from tests.mixers.loops import assert_is_the_loop, example, heads, make, mixer, outer, rms, run

H = 4


def loop(x, w):
    q, k, v = (heads(z, H) for z in (x @ w["qkv.weight"].T).chunk(3, dim=-1))
    Dk = k.shape[-1]
    R = torch.zeros(Dk, Dk)
    for i in range(Dk // 2):
        angle = 10_000.0 ** (-2 * i / Dk)
        cos, sin = math.cos(angle), math.sin(angle)
        R[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[cos, -sin], [sin, cos]])
    gamma = torch.tensor([1 - 2.0 ** -(5 + h) for h in range(H)])[:, None, None]

    def token(S, t):
        return gamma * (R @ S) + outer(k[:, t], v[:, t])

    o = run(q, x.new_zeros(len(x), H, Dk, Dk), token)
    y = rms(o, w["norm.weight"]).flatten(2) * F.silu(x @ w["gate.weight"].T)
    return y @ w["out.weight"].T


def test_it_is_its_equation():
    assert_is_the_loop(mixer("retnet", heads=H, conv=0), loop)


def test_eigenvalues_are_the_published_decays_and_angles():
    built = make("retnet", {"heads": 4})
    found = spectrum.per_token(built.dynamics(example()))
    gammas = torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256]).double()
    torch.testing.assert_close(found.eigenvalue, gammas.expand_as(found.eigenvalue))
    angles = torch.tensor([1.0, 0.1, 0.01, 0.001]).double()
    torch.testing.assert_close(found.angle, angles.expand_as(found.angle))


def test_the_spectrum_s_state_is_the_stepped_one():
    built, x = make("retnet", {"conv": 0}), example()
    *_, (S, log_size) = spectrum.states(built.dynamics(x))
    state = tuple(s.double() for s in built.initial_state(len(x), x.device))
    for t in range(x.shape[1]):
        _, state = built.step(x[:, t], state)
    torch.testing.assert_close(S * log_size.exp()[..., None, None], state[0])


def test_an_odd_key_width_is_refused():
    with pytest.raises(ValueError, match="key width 5 must be even"):
        make("retnet", {"key_dim": 5, "value_dim": 4})
