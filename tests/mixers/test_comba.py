"""Comba: against its equation, token by token, and where it meets DeltaNet."""

import torch
import torch.nn.functional as F

from mad_efla import spectrum
from tests.mixers.loops import assert_is_the_loop, example, make, mixer, outer, rms, run, silu_heads

H = 4


def unit(z):
    return z / z.norm(dim=-1, keepdim=True)


def loop(x, w):
    q, k, v = silu_heads(x, w["qkv.weight"], H)
    k, v = unit(k[:, :, 0]), v[:, :, 0]
    beta = torch.sigmoid(x @ w["beta.weight"].T + w["beta.bias"])[..., None, None]
    a = -w["a_log"].exp() * F.softplus(x @ w["decay.weight"].T + w["dt_bias"])
    a, b = a.exp()[..., None, None], torch.sigmoid(w["feedback"])[:, None]
    one = torch.eye(k.shape[-1])

    def token(S, t):
        transition = a[:, t] * one - b[..., None] * beta[:, t] * outer(k[:, t], k[:, t])
        return transition @ S + beta[:, t] * outer(k[:, t], v[:, t])

    S = x.new_zeros(len(x), H, k.shape[-1], v.shape[-1])
    o = run(unit(q) - w["correction"][:, None] * b * k, S, token)
    return rms(o, w["norm.weight"]).flatten(2) @ w["out.weight"].T


def test_it_is_its_equation():
    assert_is_the_loop(mixer("comba", heads=H, conv=0), loop)


def test_without_feedback_s_weight_correction_and_decay_it_is_deltanet():
    comba, deltanet = make("comba", {"correction": 0.0}), make("deltanet", {})
    with torch.no_grad():
        comba.feedback.fill_(1e3)  # b = 1
        comba.a_log.fill_(-1e3)  # a = 1
        for name, p in deltanet.named_parameters():
            p.copy_(comba.get_parameter(name))
    torch.testing.assert_close(comba(example()), deltanet(example()), rtol=1e-11, atol=1e-13)


def test_along_the_key_it_leaves_the_decay_less_what_it_erases():
    comba, x = mixer("comba", heads=H), example()
    found = spectrum.per_token(comba.dynamics(x)).eigenvalue
    a, beta = comba._log_decay(x).exp(), comba._beta(x)
    torch.testing.assert_close(found, a - torch.sigmoid(comba.feedback) * beta)
    assert (found < 0).any()
