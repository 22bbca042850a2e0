"""Mamba's selective scan through the compiled loops of `loops`: tensors in, tensors out.

The backward keeps the inputs and the state before every chunk of C tokens: L (2 D + 2 N) +
(L/C) D N numbers per sequence, where autograd through the token loop keeps several L D N.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from mad_kernels.checks import working_dtype

_CHUNK = 32
_LANES = 32


def selective_scan_compiled(
    x: Float[Tensor, "B L D"],
    dt: Float[Tensor, "B L D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "B L N"],
    c: Float[Tensor, "B L N"],
    state: Float[Tensor, "B D N"],
    chunk: int | None = None,
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B D N"]]:
    """Scan all tokens; arguments as in `selective_scan`, already checked."""
    keep = torch.is_grad_enabled() and any(z.requires_grad for z in (x, dt, a, b, c, state))
    return _CompiledScan.apply(x, dt, a, b, c, state, chunk or _CHUNK, keep)


class _CompiledScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, a, b, c, state, chunk, keep):
        from mad_kernels.selective_scan import loops

        B, L, D = x.shape
        wide = working_dtype(x)
        ctx.dtypes = [z.dtype for z in (x, dt, a, b, c, state)]
        ctx.chunk = max(1, min(chunk, L))
        ctx.set_materialize_grads(False)
        X, dT, Bm, Cm = (z.detach().to(wide).contiguous() for z in (x, dt, b, c))
        A = _to_slabs(a.detach().to(wide))
        S = _to_slabs(state.detach().to(wide)).clone()
        y = torch.empty_like(X)
        kept = (B, -(-L // ctx.chunk) if keep else 0, S.shape[1])
        states = X.new_empty(kept)
        arrays = [z.numpy() for z in (X, dT, A, Bm, Cm, S)]
        loops.forward(*arrays, ctx.chunk, y.numpy(), states.numpy())
        ctx.save_for_backward(X, dT, A, Bm, Cm, states)
        return y.to(x.dtype), _from_slabs(S, D, Bm.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_state):
        from mad_kernels.selective_scan import loops

        X, dT, A, Bm, Cm, states = ctx.saved_tensors
        B, _, D = X.shape
        N = Bm.shape[-1]
        d_y = torch.zeros_like(X) if d_y is None else d_y.to(X.dtype).contiguous()
        dS = X.new_zeros(B, D, N) if d_state is None else d_state.to(X.dtype)
        dS = _to_slabs(dS).clone()
        grads = [torch.empty_like(z) for z in (X, dT, A, Bm, Cm)]
        arrays = [z.numpy() for z in (X, dT, A, Bm, Cm, states, d_y)]
        loops.backward(*arrays, ctx.chunk, dS.numpy(), *(z.numpy() for z in grads))
        grads[2] = _from_slabs(grads[2], D, N)
        grads.append(_from_slabs(dS, D, N))
        return *(z.to(dtype) for z, dtype in zip(grads, ctx.dtypes, strict=True)), None, None


def _to_slabs(x: Tensor) -> Tensor:
    """Turn [... D N] into flat slabs of 32 channels, [... W/32 * N * 32], filled up with zeros."""
    x = pad(x, (0, 0, 0, -x.shape[-2] % _LANES))
    return x.unflatten(-2, (x.shape[-2] // _LANES, _LANES)).mT.contiguous().flatten(-3)


def _from_slabs(x: Tensor, channels: int, width: int) -> Tensor:
    """Turn flat slabs back into [... D N]."""
    slabs = -(-channels // _LANES)
    return x.unflatten(-1, (slabs, width, _LANES)).mT.flatten(-3, -2)[..., :channels, :].contiguous()
