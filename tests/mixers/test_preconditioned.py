"""Preconditioned delta rules: against their equations, token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.mixers.loops import assert_is_the_loop, example, heads, make, mixer, outer, rms, run, silu_heads

H = 4


def unit(z):
    return z / z.norm(dim=-1, keepdim=True)


def loop(channels, squash):
    def run_loop(x, w):
        q, k, v = silu_heads(x, w["qkv.weight"], H)
        k, v = unit(k[:, :, 0]), v[:, :, 0]
        beta = torch.sigmoid(x @ w["beta.weight"].T + w["beta.bias"])[..., None, None]
        if channels:
            rate = F.softplus(x @ w["decay.0.weight"].T @ w["decay.1.weight"].T + w["dt_bias"])
            a = torch.exp(-w["a_log"].exp()[:, None] * heads(rate, H))[..., None]
        else:
            rate = F.softplus(x @ w["decay.weight"].T + w["dt_bias"])
            a = torch.exp(-w["a_log"].exp() * rate)[..., None, None]
        beta_c = torch.sigmoid(x @ w["moment_beta.weight"].T)[..., None]
        rate = F.softplus(x @ w["moment_decay.weight"].T + w["moment_dt_bias"])
        a_c = torch.exp(-w["moment_a_log"].exp() * rate)[..., None]
        c = [torch.zeros_like(k[:, 0])]

        def token(S, t):
            c.append(a_c[:, t] * c[-1] + beta_c[:, t] * k[:, t] ** 2)
            r = (c[-1] + 1e-6).log() - w["center"][:, None]
            m = squash ** (-r / (1 + r.abs()))
            S = a[:, t] * S
            error = v[:, t] - (k[:, t, ..., None] * S).sum(-2)
            return S + beta[:, t] * outer(m * k[:, t], error)

        o = run(unit(q), x.new_zeros(len(x), H, k.shape[-1], v.shape[-1]), token)
        return rms(o, w["norm.weight"]).flatten(2) @ w["out.weight"].T

    return run_loop


@pytest.mark.parametrize("squash", [1.5, 2.0])
@pytest.mark.parametrize("name", ["pgdn", "pkda"])
def test_it_is_its_equation(name, squash):
    built = mixer(name, heads=H, conv=0, squash=squash)
    assert_is_the_loop(built, loop(name == "pkda", squash))


@pytest.mark.parametrize(("name", "plain"), [("pgdn", "gated_deltanet"), ("pkda", "kda")])
def test_where_no_channel_is_scaled_it_is_the_plain_rule(name, plain):
    ours, plain = make(name, {"squash": 1 + 1e-13}), make(plain, {})
    with torch.no_grad():
        for label, p in plain.named_parameters():
            p.copy_(ours.get_parameter(label))
    torch.testing.assert_close(ours(example()), plain(example()), rtol=1e-10, atol=1e-12)


def test_a_channel_that_came_often_is_written_less():
    built = make("pgdn", {"conv": 0})
    with torch.no_grad():
        built.moment_a_log.fill_(-1e3)  # nothing is forgotten
    x = example()[:1, :1].expand(1, 400, -1)
    parts = built.parts(x)
    factor = (parts.written / parts.key)[0, :, 0]
    assert (factor[0] > 1).all()
    assert (factor[1:] <= factor[:-1]).all()
    loud = parts.key[0, 0, 0].abs().argmax()
    assert factor[-1, loud] < 1
    assert (factor > 1 / 1.5).all()
    assert (factor < 1.5).all()


def test_no_state_grows_at_the_largest_squash():
    """m k k^T has the eigenvalue k^T m k < 2 along m k; with beta < 1 none leaves (-1, 1]."""
    parts = make("pgdn", {"squash": 2.0}).parts(10 * example())
    eigenvalue = 1 - parts.erase * (parts.written * parts.key).sum(-1)
    assert (eigenvalue > -1).all()
    assert (eigenvalue < 1).all()


def test_the_moment_is_carried_between_tokens():
    built = make("pkda", {})
    sizes = [s.shape for s in built.initial_state(3, torch.device("meta"))]
    assert sizes[:2] == [(3, 8, 4, 4), (3, 8, 1, 4)]
    assert math.prod(sizes[1][1:]) == 32
