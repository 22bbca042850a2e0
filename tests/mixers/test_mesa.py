"""The Mesa layer: against its equation, token by token, and as the minimum that it is."""

import pytest
import torch
import torch.nn.functional as F

from tests.mixers.loops import assert_is_the_loop, example, make, mixer, outer, rms, silu_heads

H = 4


def unit(z):
    return z / z.norm(dim=-1, keepdim=True)


def loop(decays):
    def run_loop(x, w):
        q, k, v = silu_heads(x, w["qkv.weight"], H)
        q, k, v = unit(q), unit(k[:, :, 0]), v[:, :, 0]
        beta = torch.sigmoid(x @ w["beta.weight"].T + w["beta.bias"])[..., None, None]
        a = torch.ones_like(beta)
        if decays:
            rate = F.softplus(x @ w["decay.weight"].T + w["dt_bias"])
            a = torch.exp(-w["a_log"].exp() * rate)[..., None, None]
        ridge = torch.diag_embed((F.softplus(w["ridge"]) + 0.25).view(H, -1))
        moments, G, outputs = 0, 0, []
        for t in range(x.shape[1]):
            moments = a[:, t] * moments + beta[:, t] * outer(k[:, t], k[:, t])
            G = a[:, t] * G + beta[:, t] * outer(k[:, t], v[:, t])
            outputs.append((torch.linalg.inv(moments + ridge) @ q[:, t, ..., None]).mT @ G)
        o = torch.stack(outputs, 1).squeeze(-2)
        return rms(o, w["norm.weight"]).flatten(2) @ w["out.weight"].T

    return run_loop


@pytest.mark.parametrize("decay", ["none", "separate"])
def test_it_is_its_equation(decay):
    built = mixer("mesa", heads=H, conv=0, decay=decay)
    assert_is_the_loop(built, loop(decay == "separate"))


def test_what_it_reads_is_the_least_squares_map_of_all_pairs_so_far():
    built, x = make("mesa", {"heads": 2, "decay": "none"}), example()
    with torch.no_grad():
        parts, d = built.parts(x), built.dynamics(x)
        ridge = (F.softplus(built.ridge) + 0.25).view(2, -1)
    read = torch.einsum("bthn,bthp,bhn->bhp", d.k, d.v, d.q[:, -1])
    # As one regression: the rows of keys by the root of their weight, and a row per channel.
    root = parts.write.sqrt()[..., None]
    rows, right = ((root * z).transpose(1, 2) for z in (parts.key, parts.v))
    ridge = torch.diag_embed(ridge.sqrt()).expand(len(x), -1, -1, -1)
    rows = torch.cat([rows, ridge], dim=-2)
    right = F.pad(right, (0, 0, 0, built.Dk))
    best = torch.linalg.lstsq(rows, right).solution
    torch.testing.assert_close(read, torch.einsum("bhnp,bhn->bhp", best, parts.q[:, -1]))


def test_two_moments_are_carried_and_make_up_the_state():
    built = make("mesa", {"conv": 0}, d_model=128)
    G, moments = built.initial_state(1, torch.device("meta"))
    assert (G.numel(), moments.numel()) == (1024, 1024)
