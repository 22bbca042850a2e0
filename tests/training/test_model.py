"""The backbones around the mixers."""

import pytest
import torch
from torch import nn

from mad_efla import config
from mad_efla.plan import expand
from mad_efla.plan.run import ModelConfig
from mad_efla.training import model
from tests.mixer import make
from tests.tiny import tiny

CONFIG = ModelConfig(width=32, depth=1)


def autoencoder(vocabulary=11, seed=0):
    torch.manual_seed(seed)
    return model.AutoEncoder(vocabulary, [make("efla", {}, dtype=torch.float32)], CONFIG)


def test_an_autoencoder_answers_from_the_last_vector_alone():
    built, tokens = autoencoder(), torch.randint(0, 11, (2, 9))
    seen = {}
    built.stack.register_forward_hook(lambda m, a, y: seen.update(x=y.retain_grad() or y))
    logits = built(tokens)
    assert logits.shape == (2, 9, 11)
    logits.square().sum().backward()
    assert seen["x"].grad[:, :-1].abs().max() == 0
    assert seen["x"].grad[:, -1].abs().min() > 0


def test_an_autoencoder_tells_positions_apart():
    logits = autoencoder()(torch.randint(0, 11, (1, 9)))[0]
    assert all(not torch.allclose(logits[0], row) for row in logits[1:])


def test_position_sines_are_distinct_and_bounded():
    sines = model._sines(300, 32, torch.device("cpu"))
    assert sines.shape == (300, 32)
    assert sines.abs().max() <= 1
    assert torch.pdist(sines).min() > 0.1
    assert torch.allclose(sines[:, 0], torch.arange(300.0).sin(), atol=1e-4)


def test_an_autoencoder_starts_as_published_and_leaves_its_mixers_alone():
    torch.manual_seed(0)
    mixer = make("efla", {}, dtype=torch.float32)
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    built = model.AutoEncoder(500, [mixer], CONFIG)
    assert all(torch.equal(v, built.mixers[0].state_dict()[k]) for k, v in before.items())
    for linear in (built.head, *built.decoder):
        if isinstance(linear, nn.Linear):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert linear.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["language_model", "autoencoder"])
def test_scored_positions_give_the_logits_of_the_whole(name):
    torch.manual_seed(0)
    mixer = make("attention", {}, dtype=torch.float32)
    built = model.BACKBONES[name](11, [mixer], CONFIG)
    tokens, scored = torch.randint(0, 11, (4, 7)), torch.rand(4, 7) > 0.5
    torch.testing.assert_close(built(tokens, scored), built(tokens)[scored])


def test_published_initialisation_and_the_mixers_own():
    run = tiny(mixers=["mamba2"], model__width=128, task__vocab_size=64)
    built = model.build(run)
    assert built.stack.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert built.head.bias.abs().max() == 0
    mixer = built.mixers[0]
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert (steps > 0.9e-3).all()
    assert (steps < 0.11).all()


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model.build(tiny())
    assert torch.equal(torch.rand(3), expected)


def test_channels_can_be_chosen():
    sizes = {c: model.parameter_count(model.check(tiny(model__channel=c))) for c in ("none", "mlp", "swiglu")}
    assert sizes["none"] < sizes["mlp"]
    assert sizes["swiglu"] - sizes["none"] == 3 * 16 * 48 + 16


def test_channel_mixers_are_their_equations_and_see_one_token():
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    swiglu, mlp = model.SwiGLU(24), model.MLP(24)
    gate, value = (x @ w.T for w in swiglu.inner.weight.chunk(2))
    assert gate.shape[-1] == 64  # 8/3 of 24
    expected = (gate * torch.sigmoid(gate) * value) @ swiglu.out.weight.T
    torch.testing.assert_close(swiglu(x), expected)
    inner = mlp.inner(x)
    assert inner.shape[-1] == 4 * 24
    expected = mlp.out(inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("channel", ["none", "mlp", "swiglu"])
def test_a_plan_chooses_the_channel_mixer(channel):
    found = expand.expand("recall", "quick", [f"model.channel={channel}", "protocol=custom"], "float32")
    assert {r.model.channel for r in found.runs} == {channel}
    built = model.build(tiny(model__channel=channel, model__depth=2))
    kinds = [type(layer).__name__ for layer in built.stack.layers]
    between = {"none": [], "mlp": ["MLP"], "swiglu": ["SwiGLU"]}[channel]
    assert kinds == ["EFLA", *between] * 2
    built(torch.randint(0, 8, (2, 12))).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in built.parameters())


def test_under_identity_a_model_maps_each_token_alone():
    built = model.build(tiny(mixers=["identity"], model__depth=2))
    tokens = torch.randint(0, 8, (1, 12))
    alone = torch.cat([built(tokens[:, t : t + 1]) for t in range(12)], 1)
    torch.testing.assert_close(built(tokens), alone)


def test_heads_that_do_not_fit_are_a_config_error():
    with pytest.raises(config.ConfigError, match="heads=3 must divide"):
        model.check(tiny(mixers=[{"name": "efla", "heads": 3}]))
