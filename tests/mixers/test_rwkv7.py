"""RWKV-7: against its equations, token by token, and what its parts do."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.mixer import B, D, L, example, make

H, DK = 8, D // 8


def shaken(fields):
    """A mixer whose every weight is far from where it starts: no term is small or constant."""
    mixer, g = make("rwkv7", fields), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=0.3)
    return mixer


@pytest.mark.parametrize("conv", [2, 0])
def test_it_is_the_equation(conv):
    mixer, x = shaken({"conv": conv}), example()[1]
    maps = {n: p.detach() for n, p in mixer.named_parameters()}
    S, before, y = torch.zeros(H, DK, DK, dtype=x.dtype), torch.zeros_like(x[0]), []

    def low_rank(name, u, activation):
        inner = activation(maps[f"{name}.inner.weight"] @ u)
        return maps[f"{name}.outer.weight"] @ inner + maps.get(f"{name}.outer.bias", 0)

    for token in x:
        mu = {c: maps[f"mix.{c}"] if conv else 0 for c in "rwkvag"}
        xr, xw, xk, xv, xa, xg = ((1 - mu[c]) * token + mu[c] * before for c in "rwkvag")
        r, k, v = maps["r.weight"] @ xr, maps["k.weight"] @ xk, maps["v.weight"] @ xv
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(low_rank("decay", xw, torch.tanh)))
        a = torch.sigmoid(low_rank("rate", xa, lambda u: u))
        g = low_rank("gate", xg, torch.sigmoid)
        kappa = F.normalize((k * maps["removal"]).view(H, DK), dim=-1)
        written = k * (1 - maps["replacement"] + a * maps["replacement"])
        r, written, v, w, a = (z.view(H, DK) for z in (r, written, v, w, a))
        for h in range(H):
            transition = torch.diag(w[h]) - torch.outer(a[h] * kappa[h], kappa[h])
            S[h] = transition @ S[h] + torch.outer(written[h], v[h])
        o = torch.einsum("hkv,hk->hv", S, r)
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, correction=0, keepdim=True) + 4e-5).sqrt()
        o = o.flatten() * maps["norm.weight"] + maps["norm.bias"]
        bonus = (r * written * maps["bonus"].view(H, DK)).sum(-1, keepdim=True) * v
        y.append(maps["out.weight"] @ ((o + bonus.flatten()) * g))
        before = token
    torch.testing.assert_close(mixer(x[None])[0], torch.stack(y), rtol=1e-10, atol=1e-11)


def test_decay_rate_and_key_stay_in_their_ranges():
    mixer, x = shaken({}), example()
    _, _, _, log_decay, erased, key, _ = mixer._parts(mixer._shifted(x))
    assert (log_decay < 0).all()
    assert (log_decay > -math.exp(-0.5)).all()
    torch.testing.assert_close(key.norm(dim=-1), torch.ones(B, L, H, dtype=x.dtype))
    rates = -erased / key
    assert (rates > 0).all()
    assert (rates < 1).all()


def test_the_token_shift_reaches_one_token_back():
    mixer = shaken({})
    x = example().requires_grad_()
    # Without a past in the state, two tokens are all that the first two outputs can see.
    parts = mixer._parts(mixer._shifted(x))
    (gradient,) = torch.autograd.grad(sum(p[:, 7].square().sum() for p in parts), x)
    assert (gradient.abs().amax(dim=(0, 2)) > 0).nonzero().flatten().tolist() == [6, 7]


def test_without_token_shift_the_state_is_the_heads_alone():
    assert make("rwkv7", {"conv": 0}).state_size(L) == H * DK * DK
    assert make("rwkv7", {}).state_size(L) == H * DK * DK + D
    assert not list(make("rwkv7", {"conv": 0}).mix)


def test_decay_and_gate_stay_in_float32_under_autocast():
    mixer, x = make("rwkv7", {"conv": 0}, dtype=torch.float32), example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mixer._parts(mixer._shifted(x))
    plain = mixer._parts(mixer._shifted(x))
    inside, plain = ((parts[3], parts[-1]) for parts in (inside, plain))
    assert all(torch.equal(p, q) for p, q in zip(inside, plain, strict=True))


def test_weights_start_as_the_authors_start_their_first_layer():
    width, heads = 128, 8
    mixer, Dk = make("rwkv7", {"heads": heads}, d_model=width), width // heads
    for n in range(width):
        zigzag = ((n % Dk) - (Dk - 1) / 2) / ((Dk - 1) / 2)
        zigzag *= abs(zigzag)
        line = n / (width - 1) - 0.5
        want = {
            "decay.outer.bias": -6 + 6 * n / (width - 1) + 0.5 + 2.5 * zigzag,
            "rate.outer.bias": -0.19 + 0.3 * zigzag + 0.4 * line,
            "removal": 0.71 - 0.1 * line,
            "replacement": 1.02,
            "bonus": -0.04,
            "mix.r": 1 - (n / width) ** 0.2,
            "mix.w": 1 - (n / width) ** 0.9,
            "mix.k": 1 - (n / width) ** 0.7,
            "mix.v": 1 - (n / width) ** 0.7,
            "mix.a": 1 - (n / width) ** 0.9,
            "mix.g": 1 - (n / width) ** 0.2,
        }
        for name, value in want.items():
            got = mixer.get_parameter(name)[n].item()
            assert got == pytest.approx(value, abs=1e-5), name
    ranks = {n: m.inner.out_features for n, m in mixer.named_children() if hasattr(m, "inner")}
    assert ranks == {"decay": 32, "rate": 32, "gate": 64}
    for name, scale in {"r": 0.5, "k": 0.05, "v": 0.5, "out": 0.5}.items():
        bound = scale * width**-0.5
        assert 0.98 * bound < mixer.get_parameter(f"{name}.weight").abs().max() <= bound
    outer = mixer.gate.outer.weight
    torch.testing.assert_close(outer.T @ outer, 0.01 * torch.eye(64, dtype=outer.dtype))


def test_only_matrices_have_two_axes():
    # Weight decay goes by the number of axes, and belongs to the maps alone.
    for name, p in make("rwkv7", {}).named_parameters():
        assert (p.dim() == 2) == (name.endswith("weight") and not name.startswith("norm")), name


@pytest.mark.parametrize("heads", [5, D])
def test_heads_that_do_not_fit_are_refused(heads):
    with pytest.raises(ValueError, match=rf"heads={heads} must divide model.width=32 into heads"):
        make("rwkv7", {"heads": heads})
