"""Diagonal plus low rank through the compiled loops of `loops`: tensors in, tensors out.

One CPU thread. The backward keeps the inputs, what b has read, and the state before every chunk of
C tokens: per head L (5 Dk + 2 Dv) + (L/C) Dk Dv numbers, without a and b L (3 Dk + Dv) and states.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mad_kernels.checks import working_dtype

# Tokens between two kept states. Longer costs cache, shorter costs memory.
_CHUNK = 64


def dplr_compiled(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    log_decay: Float[Tensor, "B L H Dk"],
    a: Float[Tensor, "B L H Dk"] | None,
    b: Float[Tensor, "B L H Dk"] | None,
    state: Float[Tensor, "B H Dk Dv"],
    chunk: int | None = None,
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Run the recurrence token by token; arguments as in `dplr`, already checked."""
    inputs = (q, k, v, log_decay, a, b, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _CompiledDPLR.apply(*inputs, chunk or _CHUNK, keep)


class _CompiledDPLR(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, a, b, state, chunk, keep):
        from mad_kernels.dplr import loops  # brings numba, which takes its time

        (B, L, H, Dk), Dv = k.shape, v.shape[-1]
        wide = working_dtype(v)
        inputs = (q, k, v, log_decay, a, b, state)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.set_materialize_grads(False)
        ctx.chunk = max(1, min(chunk, L))
        decay = log_decay.detach().to(wide).exp()
        given = (q, k, v, decay, a, b)
        tensors = [None if x is None else x.detach().to(wide).contiguous() for x in given]
        S = state.detach().to(wide).contiguous()
        o = decay.new_empty(v.shape)
        final = torch.empty_like(S)
        recalled = o.new_empty(o.shape if keep and a is not None else (0, 0, 0, 0))
        n = -(-L // ctx.chunk)
        states = o.new_empty((B, H, n, Dk, Dv) if keep else (0, 0, 0, 0, 0))
        loops.forward(*_arrays(*tensors, S), ctx.chunk, *_arrays(o, final, recalled, states))
        ctx.save_for_backward(*tensors, recalled, states)
        return o.to(v.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_state):
        from mad_kernels.dplr import loops

        *tensors, recalled, states = ctx.saved_tensors
        _, k, v, *_ = tensors
        B, _, H, Dk = k.shape
        d_out = torch.zeros_like(v) if d_out is None else d_out.to(v.dtype).contiguous()
        if d_state is None:
            d_state = v.new_zeros(B, H, Dk, v.shape[-1])
        d_state = d_state.to(v.dtype).contiguous()
        grads = [None if x is None else torch.empty_like(x) for x in (*tensors, d_state)]
        inputs = _arrays(*tensors, recalled, states, d_out, d_state)
        loops.backward(*inputs, ctx.chunk, *_arrays(*grads))
        cast = [x if x is None else x.to(d) for x, d in zip(grads, ctx.dtypes, strict=True)]
        return *cast, None, None


def _arrays(*tensors: Tensor | None) -> list:
    return [None if x is None else x.numpy() for x in tensors]
