"""The delta family's steps: several a token, decay per channel, reflection; token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from mad_efla import spectrum
from mad_kernels import delta_rule
from tests.mixers.loops import assert_is_the_loop, example, heads, make, mixer, outer, rms, run, silu_heads
from tests.mixers.test_delta_family import assert_equal_mixers

H = 4


def unit(z):
    return z / z.norm(dim=-1, keepdim=True)


def kept(x, step):
    """What a step leaves of the state along k, where x = beta |k|^2."""
    return spectrum.step_eigenvalue(x, step)


def family(config):
    """The family's recurrence on dense transitions, from its weights."""
    n = config.householders

    def loop(x, w):
        q, k, v = silu_heads(x, w["qkv.weight"], H, n)
        k, square = unit(k), k.square().sum(-1)
        if config.keys == "l2":
            square = torch.ones_like(square)
        beta = torch.sigmoid(x @ w["beta.weight"].T + w["beta.bias"]).unflatten(-1, (n, H))
        beta = 2 * beta if config.beta == "2sigmoid" else beta
        erased = (1 - kept(beta * square, config.step)) * (2 if config.reflect else 1)
        written = torch.ones_like(k[:, :, 0])
        if config.decay == "separate":
            rate = F.softplus(x @ w["decay.weight"].T + w["dt_bias"])
            written = written * (-w["a_log"].exp() * rate).exp()[..., None]
        elif config.decay == "channel":
            rate = F.softplus(x @ w["decay.0.weight"].T @ w["decay.1.weight"].T + w["dt_bias"])
            written = (-w["a_log"].exp()[:, None] * heads(rate, H)).exp()
        one = torch.eye(k.shape[-1])

        def token(S, t):
            S = torch.diag_embed(written[:, t]) @ S
            for j in range(n):
                key, e = k[:, t, j], erased[:, t, j, :, None, None]
                value = v[:, t, j] / square[:, t, j, :, None].sqrt()
                S = (one - e * outer(key, key)) @ S + e * outer(key, value)
            return S

        S = x.new_zeros(x.shape[0], H, k.shape[-1], v.shape[-1])
        o = run(unit(q), S, token)
        return rms(o, w["norm.weight"]).flatten(2) @ w["out.weight"].T

    return loop


STEPS = [
    {"keys": "l2", "step": "euler", "householders": 2},
    {"keys": "l2", "step": "euler", "householders": 3, "beta": "2sigmoid", "decay": "separate"},
    {"keys": "raw", "step": "exact", "householders": 2, "decay": "separate"},
    {"keys": "raw", "step": "exact", "householders": 2, "decay": "channel", "reflect": True},
    {"keys": "raw", "step": "exact", "reflect": True},
    {"keys": "raw", "step": "implicit", "reflect": True},
    {"keys": "l2", "step": "rk4", "reflect": True, "decay": "channel"},
    {"keys": "l2", "step": "euler", "decay": "channel"},
    {"keys": "raw", "step": "exact", "decay": "channel"},
]


@pytest.mark.parametrize("fields", STEPS, ids=lambda f: " ".join(map(str, f.values())))
def test_it_is_the_family_s_equation(fields):
    built = mixer("delta", heads=H, conv=0, **fields)
    assert_is_the_loop(built, family(built.config), tolerance=1e-11)


@pytest.mark.parametrize("name", ["kda", "deltaproduct"])
def test_a_corner_is_the_family_s_equation(name):
    built = mixer(name, heads=H, conv=0)
    assert_is_the_loop(built, family(built.config))


@pytest.mark.parametrize(
    ("name", "fields", "corner"),
    [
        ("kda", {}, {"keys": "l2", "step": "euler", "decay": "channel"}),
        ("kda", {"keys": "raw", "step": "exact"}, {"decay": "channel"}),
        ("deltaproduct", {}, {"keys": "l2", "step": "euler", "beta": "2sigmoid", "householders": 2}),
        ("deltaproduct", {"householders": 1, "beta": "sigmoid"}, {"keys": "l2", "step": "euler"}),
    ],
)
def test_a_named_mixer_is_its_corner(name, fields, corner):
    assert_equal_mixers(make(name, fields), make("delta", corner), example(), tolerance=0)


def test_one_householder_is_deltanet():
    one = make("deltaproduct", {"householders": 1, "beta": "sigmoid"})
    assert_equal_mixers(one, make("deltanet", {}), example(), tolerance=0)


def test_a_second_step_that_does_nothing_leaves_one():
    two, one = (make("deltaproduct", {"decay": "separate"}), make("gated_deltanet", {"beta": "2sigmoid"}))
    D = one.Dk * one.config.heads
    first = [slice(0, 2 * D), slice(3 * D, 4 * D)]  # q and the first step's k; its v
    with torch.no_grad():
        two.beta.weight[8:], two.beta.bias[8:] = 0, -1e3
        one.qkv.weight.copy_(torch.cat([two.qkv.weight[rows] for rows in first]))
        one.conv.weight.copy_(torch.cat([two.conv.weight[rows] for rows in first]))
        one.beta.weight.copy_(two.beta.weight[:8])
        one.beta.bias.copy_(two.beta.bias[:8])
        for name in ("out.weight", "decay.weight", "a_log", "dt_bias"):
            one.get_parameter(name).copy_(two.get_parameter(name))
    torch.testing.assert_close(two(example()), one(example()), rtol=1e-11, atol=1e-13)


def test_one_decay_in_all_channels_is_gated_deltanet():
    kda, gated = make("kda", {}), make("gated_deltanet", {})
    H, Dk = kda.config.heads, kda.Dk
    with torch.no_grad():
        for name, p in gated.named_parameters():
            if not name.startswith(("decay", "dt_bias")):
                p.copy_(kda.get_parameter(name))
        kda.dt_bias.copy_(gated.dt_bias.repeat_interleave(Dk))
        kda.decay[1].weight.copy_(kda.decay[1].weight[::Dk].repeat_interleave(Dk, 0))
        gated.decay.weight.copy_((kda.decay[1].weight @ kda.decay[0].weight)[::Dk])
    assert gated.decay.weight.shape[0] == H
    torch.testing.assert_close(kda(example()), gated(example()), rtol=1e-11, atol=1e-13)


# ---- reflection


@pytest.mark.parametrize("step", ["rk2", "rk4", "exact", "implicit", "kaczmarz"])
@pytest.mark.parametrize("decay", ["none", "separate"])
def test_a_reflected_eigenvalue_is_twice_the_step_s_less_one(step, decay):
    fields = {"step": step, "decay": decay}
    plain, reflected = (
        spectrum.per_token(make("delta", {**fields, "reflect": reflect}).dynamics(3 * example()))
        for reflect in (False, True)
    )
    d = make("delta", fields).dynamics(3 * example()).log_decay[..., 0].exp()
    r = plain.eigenvalue / d
    torch.testing.assert_close(reflected.eigenvalue / d, 2 * r - 1, rtol=1e-9, atol=1e-12)
    stable = (r > 0) & (r <= 1)  # all but what a Runge-Kutta step makes of long keys
    assert (reflected.eigenvalue[stable].abs() <= 1).all()
    assert (reflected.eigenvalue[stable] < 0).any() == (step != "rk2")  # whose r is 1/2 at least


def test_reflected_euler_on_unit_keys_doubles_beta():
    for more in ({}, {"decay": "separate"}, {"decay": "channel"}, {"householders": 2}):
        fields = {"keys": "l2", "step": "euler", **more}
        reflected = make("delta", {**fields, "reflect": True})
        doubled = make("delta", {**fields, "beta": "2sigmoid"})
        assert_equal_mixers(reflected, doubled, example(), tolerance=1e-12)


def parity(built, bits):
    """Read a sign that every 1 turns, from a layer whose weights are set by hand.

    One head, Dk = 2, Dv = 1. Channel 0 is 1 at a one, channel 1 at the first token, which writes.
    A one's key is long, so its step erases all that it can.
    """
    with torch.no_grad():
        for p in built.parameters():
            p.zero_()
        built.qkv.weight[:, :] = 0
        built.qkv.weight[0, 2] = 1.0  # q: the first direction, always
        built.qkv.weight[2, 0] = built.qkv.weight[2, 1] = 8.0  # k, of ones and of the first token
        built.qkv.weight[4, 1] = 8.0  # v, of the first token
        built.beta.bias.fill_(30.0)
        built.out.weight.fill_(1.0)
    x = torch.zeros(1, len(bits), built.d_model, dtype=torch.float64)
    x[0, :, 0] = torch.tensor(bits, dtype=torch.float64)
    x[0, 0, :2] = torch.tensor([0.0, 1.0])
    x[0, :, 2] = 8.0
    return built(x)[0, :, 0]


def test_a_reflecting_state_holds_a_parity_and_one_that_does_not_forgets_it():
    rng = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (400,), generator=rng).tolist()
    bits[0] = 0
    odd = torch.tensor(bits).cumsum(0) % 2 == 1
    fields = {"heads": 1, "key_dim": 2, "value_dim": 1, "conv": 0, "output_norm": False}
    for step in ("exact", "implicit"):
        read = parity(make("delta", {"step": step, "reflect": True, **fields}), bits)
        size = 0.05 if step == "exact" else 1e-9  # 1 / (1 + x) is never 0, so some is lost
        assert ((read < 0) == odd).all()
        assert (read.abs() > size).all()
    plain = parity(make("delta", {"step": "exact", **fields}), bits)
    assert (plain[odd.nonzero()[0] :].abs() < 1e-9).all()


# ---- rotation: what two reflections are for


def test_two_reflections_in_one_token_turn_a_plane_by_a_third():
    """A cycle of three, which no symmetric contraction with positive eigenvalues makes."""
    turn = math.pi / 3
    keys = torch.tensor([[1.0, 0.0], [math.cos(turn), math.sin(turn)]], dtype=torch.float64)
    k = keys.repeat(6, 1)[None, :, None]
    k = torch.cat([torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64), k], dim=1)
    erase = torch.full(k.shape[:3], 2.0, dtype=torch.float64)
    write = torch.zeros_like(erase)
    erase[:, 0], write[:, 0] = 0.0, 1.0
    v = torch.ones(*k.shape[:3], 1, dtype=torch.float64)
    q = torch.eye(2, dtype=torch.float64)
    read = [delta_rule(q[i].expand_as(k).contiguous(), k, v, erase, write)[0] for i in (0, 1)]
    states = torch.cat(read, -1)[0, 2::2, 0]
    for t, state in enumerate(states, 1):
        at = 2 * turn * t
        want = torch.tensor([math.cos(at), math.sin(at)], dtype=torch.float64)
        torch.testing.assert_close(state, want, rtol=1e-12, atol=1e-12)


# ---- the spectrum


def test_a_token_of_several_steps_has_one_state():
    built = make("deltaproduct", {"householders": 3, "conv": 0})
    x = example()
    dynamics = built.dynamics(x)
    assert dynamics.tokens == x.shape[1]
    *_, (S, log_size) = spectrum.states(dynamics)
    state = tuple(s.double() for s in built.initial_state(len(x), x.device))
    for t in range(x.shape[1]):
        _, state = built.step(x[:, t], state)
    torch.testing.assert_close(S * log_size.exp()[..., None, None], state[0])
