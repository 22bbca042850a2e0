"""What the choices of the delta family mean: which corners are equal, and where they part."""

import itertools
import math

import pytest
import torch

from mad_efla.runs.folder import RunFolder
from mad_efla.training import loop, model
from mad_kernels import gated_efla
from tests.mixer import D, example, make
from tests.tiny import tiny


def outputs_and_gradients(mixer, x):
    x = x.clone().requires_grad_()
    y = mixer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    (y * weights).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in mixer.named_parameters()}


def assert_equal_mixers(first, second, x, tolerance):
    a, b = outputs_and_gradients(first, x), outputs_and_gradients(second, x)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (value - b[name]).norm() <= tolerance * b[name].norm(), name


# ---- equal corners


@pytest.mark.parametrize("fields", [{}, {"conv": 0, "output_gate": True}, {"decay": "separate"}])
def test_exact_unit_keys_with_softplus_are_euler_unit_keys_with_sigmoid(fields):
    exact = make("delta", {"keys": "l2", "step": "exact", "beta": "softplus"} | fields)
    euler = make("delta", {"keys": "l2", "step": "euler", "beta": "sigmoid"} | fields)
    # A key is unit but for the floor under its length, a share of 1e-12 / |k|^2.
    assert_equal_mixers(exact, euler, example(), tolerance=1e-10)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("efla", {"keys": "raw", "step": "exact"}),
        ("deltanet", {"keys": "l2", "step": "euler"}),
        ("longhorn", {"keys": "raw", "step": "implicit"}),
        ("gated_deltanet", {"keys": "l2", "step": "euler", "decay": "separate"}),
        ("gated_efla", {"keys": "raw", "step": "exact", "decay": "joint"}),
    ],
)
def test_a_named_mixer_is_its_corner(name, fields):
    assert_equal_mixers(make(name, {}), make("delta", fields), example(), tolerance=0)


def test_efla_and_deltanet_differ_only_in_keys_and_step():
    efla, deltanet = make("efla", {}), make("deltanet", {})
    for a, b in zip(efla.parameters(), deltanet.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(efla(example()), deltanet(example()))


@pytest.mark.parametrize(("gated", "plain"), [("gated_deltanet", "deltanet"), ("gated_efla", "efla")])
def test_without_decay_a_gated_mixer_is_the_plain_one(gated, plain):
    gated, plain = make(gated, {}), make(plain, {})
    assert not torch.allclose(gated(example()), plain(example()))
    with torch.no_grad():
        gated.a_log.fill_(-100.0)  # a = 1
    torch.testing.assert_close(gated(example()), plain(example()), rtol=1e-12, atol=1e-12)


# ---- against the equations


def recurrence(mixer, x, token):
    """Run a mixer without convolution token by token; `token(S, k, v, beta, a)` gives the state."""
    q, k, v = mixer._heads(torch.nn.functional.silu(mixer.qkv(x)).split(mixer.widths, dim=-1))
    q = q / q.norm(dim=-1, keepdim=True)
    beta = mixer.beta(x).sigmoid()
    a = torch.ones_like(beta)
    if mixer.config.decay != "none":
        rate = torch.nn.functional.softplus(mixer.decay(x) + mixer.dt_bias)
        a = (-mixer.a_log.exp() * rate).exp()
    S = x.new_zeros(x.shape[0], beta.shape[-1], mixer.Dk, mixer.Dv)
    outputs = []
    for t in range(x.shape[1]):
        S = token(S, k[:, t], v[:, t], beta[:, t, :, None, None], a[:, t, :, None, None])
        outputs.append((q[:, t, :, None] @ S).squeeze(-2))
    return mixer._output(x, torch.stack(outputs, 1))


def outer(k, v):
    return k[..., :, None] * v[..., None, :]


def matrices(k):
    return outer(k, k), torch.eye(k.shape[-1], dtype=k.dtype)


def longhorn_token(S, k, v, beta, a):
    """Solve for the minimum of |S' - S|^2 + beta |S'^T k - v|^2."""
    kk, one = matrices(k)
    return torch.linalg.solve(one + beta * kk, S + beta * outer(k, v))


def gated_deltanet_token(S, k, v, beta, a):
    kk, one = matrices(k / k.norm(dim=-1, keepdim=True))
    return a * (one - beta * kk) @ S + beta * outer(k / k.norm(dim=-1, keepdim=True), v)


def gated_efla_token(S, k, v, beta, a):
    """Integrate dS/ds = -(1 - a) S + beta k (v - a S^T k)^T for unit time, by the exponential."""
    kk, one = matrices(k)
    Dk, Dv = S.shape[-2:]
    flow = S.new_zeros(*S.shape[:2], Dk + Dv, Dk + Dv)
    flow[..., :Dk, :Dk] = -(1 - a) * one - a * beta * kk
    flow[..., :Dk, Dk:] = beta * outer(k, v)
    together = torch.cat([S, torch.eye(Dv, dtype=S.dtype).expand(*S.shape[:2], Dv, Dv)], dim=-2)
    return (torch.matrix_exp(flow) @ together)[..., :Dk, :]


@pytest.mark.parametrize(
    ("name", "token"),
    [("longhorn", longhorn_token), ("gated_deltanet", gated_deltanet_token), ("gated_efla", gated_efla_token)],
)
def test_a_mixer_is_its_equation(name, token):
    mixer, x = make(name, {"conv": 0, "heads": 4}), 3 * example()
    torch.testing.assert_close(mixer(x), recurrence(mixer, x, token), rtol=1e-8, atol=1e-9)


def test_gated_efla_takes_the_gate_of_gated_deltanet():
    gated = make("gated_efla", {"conv": 0, "output_norm": False})
    x = example()
    q, k, v = gated._heads(gated.conv.parts(gated.qkv(x), gated.widths))
    q = q / q.norm(dim=-1, keepdim=True)
    o, _ = gated_efla(q, k, v, gated._beta(x), gated._log_decay(x).exp())
    torch.testing.assert_close(gated(x), gated._output(x, o), rtol=1e-9, atol=1e-12)


# ---- orders


def flow(step, substeps):
    """Outputs after five tokens, each split into `substeps` equal ones of as much less beta."""
    mixer = make("delta", {"step": step, "conv": 0, "output_norm": False, "heads": 2})
    with torch.no_grad():
        mixer.beta.weight.zero_()
        mixer.beta.bias.fill_(math.log(1 / substeps) - math.log1p(-1 / substeps))
    tokens = example()[:, :5].repeat_interleave(substeps, dim=1)
    return mixer(tokens)[:, substeps - 1 :: substeps].detach()


@pytest.mark.parametrize(("step", "order"), [("euler", 1), ("implicit", 1), ("rk2", 2), ("rk4", 4), ("kaczmarz", 0)])
def test_steps_converge_to_the_exact_one_at_their_order(step, order):
    counts = (16, 32, 64)
    errors = [(flow(step, n) - flow("exact", n)).norm().item() for n in counts]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    if order:
        assert slopes == pytest.approx([order] * 2, abs=0.15)
    else:  # Kaczmarz' step integrates no flow
        assert min(errors) > 0.01


def test_the_exact_step_does_not_care_how_a_token_is_split():
    torch.testing.assert_close(flow("exact", 2), flow("exact", 64), rtol=1e-10, atol=1e-12)


# ---- stability


def largest(step, times_lambda, length=300):
    """The largest output while one key repeats, at beta lambda as given."""
    mixer = make("delta", {"step": step, "conv": 0, "output_norm": False, "heads": 1})
    x = example()[:1, :1].expand(1, length, D)
    with torch.no_grad():
        _, k, _ = mixer._heads(mixer.conv.parts(mixer.qkv(x), mixer.widths))
        scale = (times_lambda / mixer._beta(x)[0, 0] / k[0, 0].square().sum()).sqrt()
        # The key's rows are behind silu; scale what comes out of it instead.
        heads = mixer._heads
        mixer._heads = lambda qkv: [p * s for p, s in zip(heads(qkv), (1, scale, 1), strict=True)]
        return mixer(x).abs().max().item()


@pytest.mark.parametrize(
    ("step", "limit"), [("euler", 2.0), ("rk2", 2.0), ("rk4", 2.785), ("exact", None), ("implicit", None)]
)
def test_the_state_grows_past_the_limit_of_a_step_and_not_before(step, limit):
    if limit is None:
        assert largest(step, 100.0) < 10
        return
    assert largest(step, 0.95 * limit) < 10
    assert largest(step, 1.1 * limit) > 1e6


def wide(step, key_dim, tmp_path):
    """Train on keys of `key_dim` raw numbers; return the result and the first beta lambda."""
    fields = {"name": "delta", "step": step, "heads": 1, "key_dim": key_dim, "output_norm": False}
    run = tiny(mixers=[fields], task__seq_len=128, train__steps=10, train__eval_every=10)
    built = model.build(run)
    mixer = built.mixers[0]
    with torch.no_grad():
        x = built.stack.norms[0](built.stack.embed(torch.arange(8)[None]))
        _, k, _ = mixer._heads(mixer.conv.parts(mixer.qkv(x), mixer.widths))
        times_lambda = (mixer._beta(x) * k.square().sum(-1)).mean().item()
    folder = RunFolder(tmp_path / step / str(key_dim), run.fingerprint)
    folder.create(run)
    return loop.train(run, folder), folder, times_lambda


def test_raw_keys_under_euler_diverge_past_two_and_the_run_is_recorded_as_diverged(tmp_path):
    result, folder, times_lambda = wide("euler", 1024, tmp_path)
    assert times_lambda > 2
    assert result.status == folder.status() == folder.result().status == "diverged"
    assert result.stopped == "loss not finite at step 1"
    assert result.test is None

    result, _, times_lambda = wide("exact", 1024, tmp_path)
    assert times_lambda > 2
    assert result.status == "finished"

    result, _, times_lambda = wide("euler", 64, tmp_path)
    assert times_lambda < 2
    assert result.status == "finished"
