"""RWKV-7's time mixing as its authors ship it, token by token, on our weights."""

from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call

from mad_efla.mixers import rwkv7
from tests.mixer import D
from tests.peer.beside import assert_same, mixer, peer, rows

pytestmark = pytest.mark.peer

H = 4


def test_time_mixing(monkeypatch):
    monkeypatch.setenv("RWKV_V7_ON", "1")
    # As Python: a script's casts to float32 are out of reach.
    monkeypatch.setattr(torch.jit, "script", lambda function: function)
    time_mixing = peer("rwkv.model").RWKV_x070_TMix_one
    # Its constants: e^(-1/2) in six digits, and for every Dk the eps of 64 channels.
    monkeypatch.setattr(rwkv7, "math", SimpleNamespace(exp=lambda _: 0.606531))
    built = mixer("rwkv7", heads=H)
    built.norm.eps = 64e-5

    def ours(x, **w):
        return functional_call(built, w, (x[None],))[0]

    def theirs(x, **w):
        def matrix(name):
            return w[f"{name}.weight"].mT

        weights = {f"x_{c}": w[f"mix.{c}"] for c in "rwkvag"}
        weights |= {"w0": w["decay.outer.bias"], "a0": w["rate.outer.bias"]}
        weights |= dict.fromkeys(("v0", "v1", "v2"))  # layer 0 has no value residual
        for letter, name in {"w": "decay", "a": "rate", "g": "gate"}.items():
            weights |= {f"{letter}1": matrix(f"{name}.inner"), f"{letter}2": matrix(f"{name}.outer")}
        weights |= {"k_k": w["removal"], "k_a": w["replacement"], "r_k": w["bonus"]}
        weights |= {"R_": matrix("r"), "K_": matrix("k"), "V_": matrix("v"), "O_": matrix("out")}
        weights |= {"ln_w": w["norm.weight"], "ln_b": w["norm.bias"]}
        N = D // H
        before, state, outputs = torch.zeros(D), torch.zeros(H, N, N), []
        for token in x:
            y, before, state, _ = time_mixing(0, H, N, token, before, None, state, **weights)
            outputs.append(y)
        return torch.stack(outputs)

    assert_same(ours, theirs, {"x": rows()[0], **dict(built.named_parameters())})
