"""Chunk-major order, `[n, B*H, C, D]`: the chunks of all heads side by side, in order of time.

A step over chunks then reads one contiguous slab, and work that does not depend on the state is a
single batched product over `n*B*H` chunks. The last chunk is filled up with zeros: a token with a
zero key, zero write and zero log decay changes nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Chunks(NamedTuple):
    """How L tokens of B sequences and H heads fall into n chunks of C tokens."""

    B: int
    L: int
    H: int
    C: int

    @property
    def n(self) -> int:
        """Number of chunks, the last one filled up."""
        return -(-self.L // self.C)

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn [B L H ...] into a contiguous [n, B*H, C, ...] of `dtype`."""
        x = x.to(dtype)
        if self.n * self.C != self.L:
            x = pad(x, (0, 0) * (x.dim() - 2) + (0, self.n * self.C - self.L))
        x = x.unflatten(1, (self.n, self.C)) if self.n else x.reshape(self.B, 0, self.C, *x.shape[2:])
        x = x.transpose(0, 1).transpose(2, 3).contiguous()
        return x.flatten(1, 2)

    def merge(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn [n, B*H, C, ...] back into a contiguous [B L H ...] of `dtype`, fill dropped."""
        out = x.new_empty((self.B, self.L, self.H, *x.shape[3:]), dtype=dtype)
        return self.merge_into(x, out)

    def merge_into(self, x: Tensor, out: Tensor) -> Tensor:
        """Write [n, B*H, C, ...] into `out`, a contiguous [B L H ...], fill dropped."""
        x = x.unflatten(1, (self.B, self.H)).transpose(2, 3).transpose(0, 1)  # [B n C H ...]
        full = self.L // self.C
        last = self.L - full * self.C
        if full:
            out[:, : full * self.C].unflatten(1, (full, self.C)).copy_(x[:, :full])
        if last:
            out[:, full * self.C :].copy_(x[:, full, :last])
        return out
