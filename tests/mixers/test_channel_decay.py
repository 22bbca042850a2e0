"""KDA and what stems from it: against their equations, token by token, and where they meet."""

import pytest
import torch
import torch.nn.functional as F

from tests.mixers.loops import assert_is_the_loop, example, heads, make, mixer, outer, rms, run, silu_heads

H = 4


def unit(z):
    return z / z.norm(dim=-1, keepdim=True)


def decays(x, w):
    rate = F.softplus(x @ w["decay.0.weight"].T @ w["decay.1.weight"].T + w["dt_bias"])
    return torch.exp(-w["a_log"].exp()[:, None] * heads(rate, H))


def gdn2(doubled):
    def loop(x, w):
        q, k, v = silu_heads(x, w["qkv.weight"], H)
        k, v = unit(k[:, :, 0]), v[:, :, 0]
        b = heads(torch.sigmoid(x @ w["beta.weight"].T), H) * (2 if doubled else 1)
        wv = heads(torch.sigmoid(x @ w["write.weight"].T), H) * v
        a, one = decays(x, w), torch.eye(k.shape[-1])

        def token(S, t):
            erased = one - outer(k[:, t], b[:, t] * k[:, t])
            return erased @ torch.diag_embed(a[:, t]) @ S + outer(k[:, t], wv[:, t])

        o = run(unit(q), x.new_zeros(len(x), H, k.shape[-1], v.shape[-1]), token)
        return rms(o, w["norm.weight"]).flatten(2) @ w["out.weight"].T

    return loop


@pytest.mark.parametrize("beta", ["sigmoid", "2sigmoid"])
def test_gdn2_is_its_equation(beta):
    assert_is_the_loop(mixer("gdn2", heads=H, conv=0, beta=beta), gdn2(beta == "2sigmoid"))


def test_gdn2_with_one_gate_for_all_channels_is_kda():
    kda, other = make("kda", {}), make("gdn2", {})
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name not in ("beta.weight", "write.weight"):
                p.copy_(kda.get_parameter(name))
        kda.beta.bias.zero_()
        other.beta.weight.copy_(kda.beta.weight.repeat_interleave(kda.Dk, 0))
        other.write.weight.copy_(kda.beta.weight.repeat_interleave(kda.Dv, 0))
    torch.testing.assert_close(other(example()), kda(example()), rtol=1e-11, atol=1e-13)


def test_gdn2_with_one_gate_and_one_decay_is_gated_deltanet():
    gated, other = make("gated_deltanet", {}), make("gdn2", {})
    Dk = gated.Dk
    with torch.no_grad():
        for name, p in gated.named_parameters():
            if not name.startswith(("beta", "decay", "dt_bias")):
                other.get_parameter(name).copy_(p)
        gated.beta.bias.zero_()
        other.beta.weight.copy_(gated.beta.weight.repeat_interleave(Dk, 0))
        other.write.weight.copy_(gated.beta.weight.repeat_interleave(gated.Dv, 0))
        other.dt_bias.copy_(gated.dt_bias.repeat_interleave(Dk))
        other.decay[1].weight.copy_(other.decay[1].weight[::Dk].repeat_interleave(Dk, 0))
        gated.decay.weight.copy_((other.decay[1].weight @ other.decay[0].weight)[::Dk])
    torch.testing.assert_close(other(example()), gated(example()), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["kda", "gdn2"])
def test_decays_and_gates_stay_in_float32_under_autocast(name):
    built, x = make(name, {"conv": 0}, dtype=torch.float32), example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = built.parts(x)
    plain = built.parts(x)
    assert torch.equal(inside.log_decay, plain.log_decay)
    assert torch.equal(inside.erase, plain.erase)
    assert inside.erase.dtype == torch.float32


@pytest.mark.parametrize("name", ["kda", "gdn2"])
def test_decays_start_as_published(name):
    built = make(name, {}, d_model=128)
    assert built.dt_bias.shape == (128,)
    rates = F.softplus(built.dt_bias)
    assert rates.min() > 0.999e-3
    assert rates.max() < 1.001e-1
    assert 1 <= built.a_log.exp().min() <= built.a_log.exp().max() <= 16
    assert built.decay[0].out_features == built.Dv
