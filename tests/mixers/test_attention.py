"""Softmax attention: against torch's, and what its options let it see."""

import pytest
import torch
from torch import nn

from tests.mixer import D, L, example, make


def test_it_matches_torch_multihead_attention():
    ours = make("attention", {"rotary": False, "heads": 4})
    theirs = nn.MultiheadAttention(D, 4, bias=False, batch_first=True).double()
    theirs.in_proj_weight.data.copy_(ours.qkv.weight)
    theirs.out_proj.weight.data.copy_(ours.out.weight)
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    x = example()
    expected, _ = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-12)


def test_rotary_attention_depends_on_distance_only():
    mixer, x = make("attention", {}), example()[:, :6]
    angles = mixer._angles(torch.tensor([2, 9, 7]))
    assert torch.allclose(angles[1] - angles[0], angles[2])
    # The second half of a repeated sequence, seeing itself alone, is the first half.
    mixer = make("attention", {"window": 6})
    again = mixer(torch.cat([x, x], dim=1))[:, 11]
    torch.testing.assert_close(again, mixer(x)[:, 5], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(mixer(x)[:, 5], mixer(x.flip(1).roll(-1, 1))[:, 5])


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_window_is_so_many_tokens_wide(window):
    mixer, x = make("attention", {"window": window}), example().requires_grad_()
    for t in (0, window - 1, 10, L - 1):
        (gradient,) = torch.autograd.grad(mixer(x)[:, t].square().sum(), x)
        seen = gradient.abs().amax(dim=(0, 2)) > 0
        expected = [t - window < s <= t for s in range(L)]
        assert seen.tolist() == expected


def test_a_window_bounds_the_state():
    mixer = make("attention", {"window": 5})
    assert [mixer.state_size(n) for n in (0, 3, 4, 5, 1000)] == [0, 6 * D, 8 * D, 8 * D, 8 * D]
    wide, whole = make("attention", {"window": L}), make("attention", {})
    torch.testing.assert_close(wide(example()), whole(example()), rtol=1e-12, atol=1e-12)
