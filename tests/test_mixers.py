"""One battery that every mixer passes, found by discovery."""

import pytest
import torch
from torch import nn

import mad_efla.mixers
from mad_efla import plugins

NAMES = plugins.names(mad_efla.mixers)
D, L, B = 32, 21, 3

# Options worth the whole battery beside the defaults.
VARIANTS = [(name, {}) for name in NAMES] + [
    ("efla", {"conv": 0, "output_norm": False}),
    ("efla", {"output_gate": True, "key_dim": 6, "value_dim": 10, "heads": 3}),
    ("deltanet", {"beta": "2sigmoid"}),
    ("delta", {"keys": "l2", "step": "exact", "beta": "softplus"}),
    ("delta", {"keys": "raw", "step": "implicit"}),
    ("mamba2", {"conv": 0, "output_norm": False}),
    ("mamba2", {"expand": 2, "state_dim": 4}),
    ("attention", {"conv": 4, "output_norm": True}),
    ("attention", {"rotary": False}),
]


def make(name, fields, d_model=D, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    found = plugins.mixer(name)
    return found(d_model, found.Config(**{"name": name, **fields})).to(dtype)


def example(seed=1, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, D, generator=rng, dtype=torch.float64).to(dtype)


variants = pytest.mark.parametrize(("name", "fields"), VARIANTS)


@variants
def test_shape_and_dtype_are_kept(name, fields):
    for dtype in (torch.float32, torch.float64):
        x = example(dtype=dtype)
        y = make(name, fields, dtype=dtype)(x)
        assert y.shape == x.shape
        assert y.dtype == dtype


@variants
def test_no_output_depends_on_a_later_token(name, fields):
    mixer, x = make(name, fields), example().requires_grad_()
    for t in (0, 3, 15, L - 2):
        (gradient,) = torch.autograd.grad(mixer(x)[:, t].pow(2).sum(), x)
        assert gradient[:, t + 1 :].abs().max() == 0
        assert gradient[:, t].abs().max() > 0


@variants
def test_rows_of_the_batch_are_independent(name, fields):
    mixer, x = make(name, fields), example()
    alone = torch.cat([mixer(row[None]) for row in x])
    torch.testing.assert_close(mixer(x), alone, rtol=1e-12, atol=1e-12)


@variants
def test_every_parameter_gets_a_finite_gradient(name, fields):
    mixer = make(name, fields)
    (mixer(example()) * example(seed=2)).sum().backward()
    for label, parameter in mixer.named_parameters():
        assert parameter.grad is not None, label
        assert torch.isfinite(parameter.grad).all(), label
        assert parameter.grad.abs().max() > 0, label


@variants
def test_stepping_gives_the_parallel_output(name, fields):
    mixer, x = make(name, fields), example()
    state = tuple(s.double() for s in mixer.initial_state(B, x.device))
    outputs = []
    for t in range(L):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), mixer(x), rtol=1e-9, atol=1e-10)


@variants
def test_state_size_is_what_stepping_carries(name, fields):
    mixer, x = make(name, fields), example()
    state = tuple(s.double() for s in mixer.initial_state(B, x.device))
    for t in range(L):
        _, state = mixer.step(x[:, t], state)
    assert mixer.state_size(L) == sum(s.numel() for s in state) // B


@variants
def test_equal_seeds_build_equal_weights(name, fields):
    first, second = make(name, fields, seed=3), make(name, fields, seed=3)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@variants
def test_runs_under_bfloat16_autocast_with_finite_gradients(name, fields):
    mixer, x = make(name, fields, dtype=torch.float32), example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    exact = make(name, fields, dtype=torch.float32).double()(example())
    assert (y.double() - exact).norm() < 0.05 * exact.norm()
    y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


def test_default_states_of_fixed_state_mixers_are_equal():
    for name in ("efla", "deltanet", "delta", "mamba2"):
        mixer = make(name, {"conv": 0}, d_model=128)
        assert mixer.state_size(128) == 2048, name


def test_efla_and_deltanet_differ_only_in_keys_and_step():
    efla, deltanet = make("efla", {}), make("deltanet", {})
    for a, b in zip(efla.parameters(), deltanet.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(efla(example()), deltanet(example()))


def test_exact_unit_keys_with_softplus_is_deltanet_with_sigmoid():
    exact = make("delta", {"keys": "l2", "step": "exact", "beta": "softplus"})
    sigmoid = make("deltanet", {})
    torch.testing.assert_close(exact(example()), sigmoid(example()), rtol=1e-9, atol=1e-9)


def test_attention_matches_torch_multihead_attention():
    ours = make("attention", {"rotary": False, "heads": 4})
    theirs = nn.MultiheadAttention(D, 4, bias=False, batch_first=True).double()
    theirs.in_proj_weight.data.copy_(ours.qkv.weight)
    theirs.out_proj.weight.data.copy_(ours.out.weight)
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    x = example()
    expected, _ = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-12)


def test_rotary_attention_depends_on_distance_only():
    mixer = make("attention", {"conv": 0})
    x = torch.cat([example()[:, :6], example()[:, :6]], dim=1)
    q = mixer._angles(torch.tensor([2, 9]))
    assert torch.allclose(q[1] - q[0], mixer._angles(torch.tensor([7]))[0])
    assert not torch.allclose(mixer(x)[:, 5], mixer(x.flip(1))[:, 5])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("efla", {"heads": 5}, "heads=5 must divide"),
        ("mamba2", {"heads": 5}, "heads=5 must divide"),
        ("attention", {"heads": 5}, "heads=5 must divide"),
        ("attention", {"heads": 32}, "even head width"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        make(name, fields)
