"""Gated linear attention: against its equation, token by token, and what its parts do."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.mixer import B, D, L, example, make


@pytest.mark.parametrize("fields", [{}, {"key_dim": 6, "value_dim": 10, "heads": 3}])
def test_it_is_the_equation(fields):
    mixer, x = make("gla", {"conv": 0, **fields}), example()
    Dk, Dv = mixer.Dk, mixer.Dv
    H = mixer.config.heads
    W_q, W_k, W_v = mixer.qkv.weight.split((H * Dk, H * Dk, H * Dv))
    inner, outer = mixer.decay
    S, y = torch.zeros(H, Dk, Dv, dtype=x.dtype), []
    for token in x[1]:
        q, k, v = (W @ token for W in (W_q, W_k, W_v))
        alpha = torch.sigmoid(outer.weight @ (inner.weight @ token) + outer.bias) ** (1 / 16)
        S = alpha.view(H, Dk, 1) * S + torch.einsum("hk,hv->hkv", k.view(H, Dk), v.view(H, Dv))
        o = torch.einsum("hkv,hk->hv", S, q.view(H, Dk))
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
        y.append(mixer.out.weight @ (o.flatten() * F.silu(mixer.gate.weight @ token)))
    torch.testing.assert_close(mixer(x)[1], torch.stack(y), rtol=1e-11, atol=1e-13)


def test_a_higher_temperature_forgets_less():
    x = example()
    decays = [make("gla", {"temperature": temperature})._log_decay(x).exp() for temperature in (1.0, 16.0)]
    torch.testing.assert_close(decays[0], decays[1] ** 16)
    assert (decays[1] > 0.9).all()


def test_every_key_channel_has_a_decay_of_its_own():
    decay = make("gla", {})._log_decay(example())
    assert decay.shape == (B, L, 8, D // 8)
    assert (decay.std(-1) > 1e-4).all()


def test_the_decay_stays_in_float32_under_autocast():
    mixer, x = make("gla", {}, dtype=torch.float32), example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decay = mixer._log_decay(x)
    assert torch.equal(decay, mixer._log_decay(x))
    assert decay.dtype == torch.float32


def test_weights_start_as_the_authors_start_them():
    mixer = make("gla", {"heads": 4, "key_dim": 8, "value_dim": 16}, d_model=128)
    q, k, v = mixer.qkv.weight.split((32, 32, 64))
    maps = [q, k, v, mixer.gate.weight, mixer.out.weight, *(m.weight for m in mixer.decay)]
    for weight in maps:
        bound = 2**-2.5 * math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("fields", [{"conv": 4}, {"conv": 0}, {"output_norm": False}, {"output_gate": False}])
def test_options_run_and_step_alike(fields):
    mixer, x = make("gla", fields), example()
    state, outputs = tuple(s.double() for s in mixer.initial_state(B, x.device)), []
    for t in range(L):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), mixer(x), rtol=1e-10, atol=1e-12)
    assert mixer.state_size(L) == sum(s.numel() for s in state) // B


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"heads=5 must divide model.width=32, or give key_dim"):
        make("gla", {"heads": 5})
