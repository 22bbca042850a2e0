"""Recurrences of flash-linear-attention (fla-core) in the place of ours, inside our layers.

The peer's rule gets what our layer computes from its input, and the rest of the layer is ours; so
output and all gradients are compared. They multiply q by Dk^-1/2, which is divided out.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tests.peer.beside import TOLERANCE, assert_same, mixer, peer, rows

pytestmark = pytest.mark.peer

H = 4
SIZES = {"heads": H, "key_dim": 6, "value_dim": 10}


class Beside(nn.Module):
    """A layer of the delta family whose recurrence is another's."""

    def __init__(self, ours, rule):
        super().__init__()
        self.ours, self.rule = ours, rule

    def forward(self, x):
        parts = self.ours.parts(x)
        scale = parts.q.shape[-1] ** 0.5
        return self.ours._output(x, self.rule(self.ours, x, parts._replace(q=parts.q * scale)))


def assert_same_rule(ours, rule, length=64, tolerance=TOLERANCE):
    theirs, weights = Beside(ours, rule), dict(ours.named_parameters())

    def call_ours(x, **w):
        return functional_call(ours, w, (x,))

    def call_theirs(x, **w):
        return functional_call(theirs, {f"ours.{n}": p for n, p in w.items()}, (x,))

    assert_same(call_ours, call_theirs, {"x": rows(length), **weights}, tolerance)


@pytest.mark.parametrize("form", ["naive_recurrent_kda", "naive_chunk_kda"])
@pytest.mark.parametrize("fields", [{}, {"beta": "2sigmoid"}, {"beta": "softplus", "step": "exact"}])
def test_kda(form, fields):
    rule = getattr(peer("fla.ops.kda.naive"), form)

    def theirs(ours, x, p):
        return rule(p.q, p.key, p.v, p.log_decay, p.erase)[0]

    assert_same_rule(mixer("kda", **SIZES, **fields), theirs)


@pytest.mark.parametrize("form", ["naive_recurrent_gdn2", "naive_chunk_gdn2"])
@pytest.mark.parametrize("beta", ["sigmoid", "2sigmoid"])
def test_gdn2(form, beta):
    rule = getattr(peer("fla.ops.gdn2.naive"), form)

    def theirs(ours, x, p):
        return rule(p.q, p.key, p.v, p.log_decay, p.erase, torch.ones_like(p.v))[0]

    assert_same_rule(mixer("gdn2", **SIZES, beta=beta), theirs)


def test_the_decay_of_kda():
    gate = peer("fla.ops.kda.gate").naive_kda_gate
    ours, x = mixer("kda", **SIZES), rows()

    def theirs(x, a_log, dt_bias):
        return gate(ours.decay(x).unflatten(-1, (H, -1)), a_log, dt_bias, torch.float64)

    def call_ours(x, a_log, dt_bias):
        weights = {"a_log": a_log, "dt_bias": dt_bias}
        return functional_call(_Decay(ours), {f"ours.{n}": w for n, w in weights.items()}, (x,))

    assert_same(call_ours, theirs, {"x": x, "a_log": ours.a_log, "dt_bias": ours.dt_bias})


class _Decay(nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.ours = ours

    def forward(self, x):
        return self.ours._log_decay(x)


@pytest.mark.parametrize("fields", [{}, {"householders": 3, "decay": "separate"}])
def test_deltaproduct(fields):
    module = peer("fla.ops.gated_delta_product.naive")
    rule = module.naive_recurrent_gated_delta_product

    def theirs(ours, x, p):
        n = ours.config.householders
        g = None if p.log_decay is None else p.log_decay[:, ::n]
        q = p.q[:, ::n] / p.q.shape[-1] ** 0.5
        return rule(q, p.key, p.v, g, p.erase, 1.0, None, num_householder=n)[0]

    assert_same_rule(mixer("deltaproduct", **SIZES, **fields), theirs)


def test_comba():
    # Not its naive_recurrent_comba, which decays before it reads, unlike all its other forms.
    rule = peer("fla.ops.comba.naive").naive_chunk_comba

    def theirs(ours, x, p):
        beta = torch.sigmoid(ours.beta(x))
        fed_back = torch.sigmoid(ours.feedback)[:, None] * p.key
        return rule(p.q, p.key, p.v, fed_back, g=p.log_decay, beta=beta)[0]

    assert_same_rule(mixer("comba", **SIZES), theirs)


@pytest.mark.parametrize("name", ["pgdn", "pkda"])
def test_preconditioned_rules(name):
    module, of_keys = {
        "pgdn": ("precond_gated_delta_rule", "naive_recurrent_precond_gated_delta_rule"),
        "pkda": ("precond_kda", "naive_recurrent_precond_kda"),
    }[name]
    rule = getattr(peer(f"fla.ops.{module}.naive"), of_keys)

    def theirs(ours, x, p):
        rate = F.softplus(ours.moment_decay(x) + ours.moment_dt_bias)
        return rule(
            q=p.q / p.q.shape[-1] ** 0.5,
            k=p.key,
            v=p.v,
            g=p.log_decay,
            g_atk=-ours.moment_a_log.exp() * rate,
            beta=p.erase,
            beta_atk=torch.sigmoid(ours.moment_beta(x)),
            scale=1.0,
            log_atk_scale=ours.center,
        )[0]

    assert_same_rule(mixer(name, **SIZES), theirs)


def test_mesa():
    rule = peer("fla.ops.mesa_net.naive").naive_mesa_net_exact

    def theirs(ours, x, p):
        ridge = (F.softplus(ours.ridge) + 0.25).view(H, -1)
        q = p.q / p.q.shape[-1] ** 0.5  # this one does not scale it
        return rule(q, p.key, p.v, p.log_decay, ridge, p.erase)[0]

    # Its two memories are of one shape.
    assert_same_rule(mixer("mesa", heads=H, key_dim=8, value_dim=8), theirs)


def test_retention():
    rule = peer("fla.ops.retention.naive").naive_retention
    ours = mixer("retnet", heads=H, key_dim=6, value_dim=10)

    class Retention(nn.Module):
        def __init__(self):
            super().__init__()
            self.ours = ours

        def forward(self, x):
            q, k, v = ours._heads(ours.conv(ours.qkv(x)))
            q, k = (_turned(z * s) for z, s in ((q, q.shape[-1] ** 0.5), (k, 1)))
            o = rule(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2)
            return ours._output(x, o)

    theirs, weights = Retention(), dict(ours.named_parameters())

    def call_ours(x, **w):
        return functional_call(ours, w, (x,))

    def call_theirs(x, **w):
        return functional_call(theirs, {f"ours.{n}": p for n, p in w.items()}, (x,))

    assert_same(call_ours, call_theirs, {"x": rows(40), **weights})


def _turned(z):
    """Turn by positions, as complex numbers."""
    pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
    Dk, places = z.shape[-1], torch.arange(z.shape[1])
    angles = places[:, None, None] * 10_000.0 ** (-torch.arange(0, Dk, 2) / Dk)
    turned = pairs * torch.polar(torch.ones_like(angles), -angles)
    return torch.view_as_real(turned).flatten(-2)
