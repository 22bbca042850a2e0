"""Torch's multi-head attention, weights written out, on ours."""

import pytest
import torch
from torch import nn

from tests.mixer import D
from tests.peer.beside import assert_same_layer, in_float64, mixer, rows

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("window", [None, 9])
def test_attention(window):
    ours = mixer("attention", heads=4, window=window, rotary=False)
    with in_float64():
        layer = nn.MultiheadAttention(D, 4, bias=False, batch_first=True)
    x = rows()
    L = x.shape[1]
    hidden = ~torch.ones(L, L, dtype=torch.bool).tril().triu(1 - (window or L))

    def translate(w):
        return {"in_proj_weight": w["qkv.weight"], "out_proj.weight": w["out.weight"]}

    def run(layer, x):
        return layer(x, x, x, attn_mask=hidden, need_weights=True)[0]

    assert_same_layer(ours, layer, translate, x, run=run)
