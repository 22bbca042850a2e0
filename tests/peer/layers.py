"""Layers of other projects in plain torch, written from their papers with their constructors' names.

    BaseConv   y = (x W + b) * (h conv x + c)                      as zoology's is called
    Attention  softmax(q k^T / sqrt(Dh)) v over the past           as mad-lab's is called

Source: Arora et al. 2023, arXiv 2312.04927; Vaswani et al. 2017, arXiv 1706.03762, Eq. 1.
"""

import torch
import torch.nn.functional as F
from torch import nn


class BaseConv(nn.Module):
    """A gate, and a convolution as long as the longest sequence, by Fourier transforms."""

    def __init__(self, d_model: int, l_max: int, layer_idx: int | None = None, **kwargs):
        super().__init__()
        self.l_max, self.layer_idx = l_max, layer_idx
        self.projection = nn.Linear(d_model, d_model)
        self.filter = nn.Parameter(torch.randn(l_max, d_model) / l_max)
        self.bias = nn.Parameter(torch.randn(d_model))

    def forward(self, u, **kwargs):
        L = u.shape[1]
        transformed = torch.fft.rfft(u.float(), n=2 * L, dim=1) * torch.fft.rfft(self.filter[:L], n=2 * L, dim=0)
        mixed = torch.fft.irfft(transformed, n=2 * L, dim=1)[:, :L]
        return self.projection(u) * (mixed + self.bias)


class Attention(nn.Module):
    """Causal softmax attention that takes further arguments and ignores them."""

    def __init__(self, dim: int, num_heads: int = 16, max_length: int = 1_280, dropout: float = 0.0, **kwargs):
        super().__init__()
        self.heads, self.max_length, self.dropout = num_heads, max_length, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x, *args, **kwargs):
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))
