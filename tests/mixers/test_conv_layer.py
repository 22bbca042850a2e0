"""The convolution in front of a mixer, and its window."""

import pytest
import torch

from mad_efla.mixers import ShortConv
from tests.mixer import B, D, L, example


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("taps", "bias"), [(0, True), (1, False), (4, True)])
def test_it_is_a_causal_convolution_and_steps_alike(taps, bias, activation):
    torch.manual_seed(0)
    conv, x = ShortConv(D, taps, bias=bias, activation=activation).double(), example()
    expected = x
    if taps:
        whole = torch.nn.Conv1d(D, D, taps, groups=D, bias=bias, padding=taps - 1).double()
        whole.weight.data.copy_(conv.weight[:, None])
        if bias:
            whole.bias.data.copy_(conv.bias)
        expected = whole(x.mT)[..., :L].mT
    if activation:
        expected = torch.nn.functional.silu(expected)
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)

    state = tuple(s.double() for s in conv.initial_state(B, x.device))
    assert [tuple(s.shape) for s in state] == ([(B, D, taps - 1)] if taps else [])
    for t in range(L):
        y, state = conv.step(x[:, t], state)
        torch.testing.assert_close(y, expected[:, t], rtol=1e-12, atol=1e-12)
    assert len(list(conv.parameters())) == (0 if taps == 0 else 1 + bias)
