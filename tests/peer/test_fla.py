"""The plain recurrences of flash-linear-attention (fla-core) on our tensors.

They multiply q by Dk^-1/2, and some keep heads before length.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import mad_kernels as mk
from tests.peer.beside import TOLERANCE, assert_same, mixer, normal, peer, rows

pytestmark = pytest.mark.peer

B, L, H, DK, DV = 2, 37, 3, 6, 5
SCALE = DK**-0.5


def tensors(*names):
    every = {
        "q": normal(B, L, H, DK, seed=1),
        "k": F.normalize(normal(B, L, H, DK, seed=2), dim=-1),
        "v": normal(B, L, H, DV, seed=3),
        "beta": normal(B, L, H, seed=4).sigmoid() * 2,
        "log_decay": -normal(B, L, H, seed=5).exp(),
        "log_decays": -normal(B, L, H, DK, seed=6).exp(),
        "a": 0.3 * normal(B, L, H, DK, seed=7),
        "b": 0.3 * normal(B, L, H, DK, seed=8),
        "state": normal(B, H, DK, DV, seed=9),
    }
    return {name: every[name] for name in ("q", "k", "v", *names, "state")}


def whole(state):
    return {"initial_state": state, "output_final_state": True}


def heads_first(function, *arguments, **options):
    o, final = function(*(x.transpose(1, 2) for x in arguments), **options)
    return o.transpose(1, 2), final


def test_delta_rule():
    rule = peer("fla.ops.delta_rule.naive").delta_rule_recurrence

    def ours(q, k, v, beta, state):
        return mk.deltanet(q * SCALE, k, v, beta, **whole(state))

    def theirs(q, k, v, beta, state):
        return heads_first(rule, q, k, v, beta, **whole(state))

    assert_same(ours, theirs, tensors("beta"))


STEPS = {
    "efla": lambda beta, square: -torch.expm1(-beta * square) / square,
    "implicit": lambda beta, square: beta / (1 + beta * square),
    "kaczmarz": lambda beta, square: beta / (square + 1e-6),
    "rk2": lambda beta, square: beta * (1 - beta * square / 2),
}


@pytest.mark.parametrize("step", STEPS)
def test_steps_on_raw_keys(step):
    rule = peer("fla.ops.delta_rule.naive").delta_rule_recurrence
    given = tensors("beta")
    given["k"] = 1.5 * normal(B, L, H, DK, seed=10) * DK**-0.5
    if step == "rk2":
        given["beta"] = given["beta"] / 4  # where it does not grow

    def ours(q, k, v, beta, state):
        return getattr(mk, step)(q * SCALE, k, v, beta, **whole(state))

    def theirs(q, k, v, beta, state):
        alpha = STEPS[step](beta, k.square().sum(-1))
        return heads_first(rule, q, k, v, alpha, **whole(state))

    assert_same(ours, theirs, given)


@pytest.mark.parametrize("form", ["naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"])
def test_gated_delta_rule(form):
    rule = getattr(peer("fla.ops.gated_delta_rule.naive"), form)

    def ours(q, k, v, beta, log_decay, state):
        return mk.gated_delta_rule(q * SCALE, k, v, beta, log_decay, **whole(state))

    def theirs(q, k, v, beta, log_decay, state):
        return rule(q, k, v, beta=beta, g=log_decay, **whole(state))

    assert_same(ours, theirs, tensors("beta", "log_decay"))


def test_decay_without_erasure():
    rule = peer("fla.ops.simple_gla.naive").naive_recurrent_simple_gla

    def ours(q, k, v, log_decay, state):
        nothing, all_ = log_decay.new_zeros(B, L, H), log_decay.new_ones(B, L, H)
        return mk.delta_rule(q * SCALE, k, v, nothing, all_, log_decay, **whole(state))

    def theirs(q, k, v, log_decay, state):
        return rule(q, k, v, log_decay, **whole(state))

    assert_same(ours, theirs, tensors("log_decay"))


def test_gated_linear_attention():
    rule = peer("fla.ops.gla.naive").naive_recurrent_gla

    def ours(q, k, v, log_decays, state):
        return mk.dplr(q * SCALE, k, v, log_decays, **whole(state))

    def theirs(q, k, v, log_decays, state):
        return rule(q, k, v, log_decays, **whole(state))

    assert_same(ours, theirs, tensors("log_decays"))


def test_diagonal_plus_low_rank():
    rule = peer("fla.ops.generalized_delta_rule.dplr.naive").dplr_recurrence

    def ours(q, k, v, log_decays, a, b, state):
        return mk.dplr(q * SCALE, k, v, log_decays, a, b, **whole(state))

    def theirs(q, k, v, log_decays, a, b, state):  # its alpha is what reads, its beta what writes
        return heads_first(rule, q, k, v, b, a, log_decays, **whole(state))

    assert_same(ours, theirs, tensors("log_decays", "a", "b"))


@pytest.mark.parametrize("normalizer", [False, True])
def test_linear_attention(normalizer):
    rule = peer("fla.ops.linear_attn.naive").naive_recurrent_linear_attn
    fields = {"normalizer": normalizer, "output_norm": False, "conv": 0, "heads": 4}
    built = mixer("linear_attention", **fields)

    def ours(x, qkv, out):
        return functional_call(built, {"qkv.weight": qkv, "out.weight": out}, (x,))

    def theirs(x, qkv, out):
        q, k, v = (z.unflatten(-1, (4, -1)) for z in F.linear(x, qkv).chunk(3, dim=-1))
        o, _ = rule(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=normalizer)
        return F.linear(o.flatten(2), out)

    weights = {"x": rows(), "qkv": built.qkv.weight, "out": built.out.weight}
    # The peer adds 1e-10 to the sum of weights, which at the first token is near 1.
    assert_same(ours, theirs, weights, tolerance=1e-10 if normalizer else TOLERANCE)
