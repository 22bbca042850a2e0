"""Linear attention against its quadratic form."""

import pytest
import torch

from tests.mixer import L, example, make


@pytest.mark.parametrize("normalizer", [False, True])
def test_it_is_attention_with_positive_features_for_weights(normalizer):
    fields = {"normalizer": normalizer, "output_norm": False, "conv": 0, "heads": 4}
    mixer, x = make("linear_attention", fields), example()
    q, k, v = (t.unflatten(-1, (4, -1)) for t in mixer.qkv(x).chunk(3, dim=-1))
    q, k = torch.where(q > 0, q + 1, q.exp()), torch.where(k > 0, k + 1, k.exp())
    weights = torch.einsum("bthd,bshd->bhts", q, k) * torch.ones(L, L, dtype=x.dtype).tril()
    if normalizer:
        weights = weights / weights.sum(-1, keepdim=True)
    o = torch.einsum("bhts,bshd->bthd", weights, v)
    torch.testing.assert_close(mixer(x), mixer.out(o.flatten(-2)), rtol=1e-10, atol=1e-12)


def test_the_output_norm_undoes_the_normaliser():
    plain, divided = make("linear_attention", {}), make("linear_attention", {"normalizer": True})
    for mixer in (plain, divided):
        mixer.norm.eps = 0.0
    torch.testing.assert_close(plain(example()), divided(example()), rtol=1e-9, atol=1e-10)
