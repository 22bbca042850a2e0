"""The delta rule through the compiled loops of `loops`: tensors in, tensors out, on one CPU thread.

The backward keeps the inputs, the pseudo values u and the state before every chunk of C tokens:
per head L (2 Dk + 2 Dv) + (L/C) Dk Dv numbers. Two calls on equal inputs give equal bits, whether
the loops were compiled now or long ago; another kind of processor may round differently.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mad_kernels.checks import working_dtype

# Tokens between two kept states. Longer costs cache under decay, shorter costs memory.
_CHUNK = 64


def delta_rule_compiled(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    erase: Float[Tensor, "B L H"],
    write: Float[Tensor, "B L H"],
    log_decay: Float[Tensor, "B L H"] | None,
    state: Float[Tensor, "B H Dk Dv"],
    chunk: int | None,
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Apply the delta rule token by token; arguments as in `delta_rule`, already checked."""
    inputs = (q, k, v, erase, write, log_decay, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _CompiledDeltaRule.apply(*inputs, chunk or _CHUNK, keep)


class _CompiledDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, erase, write, log_decay, state, chunk, keep):
        from mad_kernels.delta_rule import loops  # brings numba, which takes its time

        (B, L, H, Dk), Dv = k.shape, v.shape[-1]
        wide = working_dtype(v)
        inputs = (q, k, v, erase, write, log_decay, state)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.set_materialize_grads(False)
        ctx.chunk = max(1, min(chunk, L))
        n = -(-L // ctx.chunk)
        tensors = [x.detach().to(wide).contiguous() for x in (q, k, v, erase, write)]
        decay = None if log_decay is None else log_decay.detach().to(wide).exp().contiguous()
        S = state.detach().to(wide).contiguous()
        o, final = torch.empty_like(tensors[2]), torch.empty_like(S)
        updates = o.new_empty(o.shape if keep else (0, 0, 0, 0))
        states = o.new_empty((B, H, n, Dk, Dv) if keep else (0, 0, 0, 0, 0))
        loops.forward(*_arrays(*tensors, decay, S), ctx.chunk, *_arrays(o, final, updates, states))
        ctx.save_for_backward(*tensors, decay, states, updates)
        return o.to(v.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_state):
        from mad_kernels.delta_rule import loops

        *tensors, decay, states, updates = ctx.saved_tensors
        _, k, v, *_ = tensors
        B, _, H, Dk = k.shape
        d_out = torch.zeros_like(v) if d_out is None else d_out.to(v.dtype).contiguous()
        if d_state is None:
            d_state = v.new_zeros(B, H, Dk, v.shape[-1])
        d_state = d_state.to(v.dtype).contiguous()
        grads = [torch.empty_like(x) for x in tensors]
        d_log_decay = None if decay is None else torch.zeros_like(decay)
        grads += [d_log_decay, torch.empty_like(d_state)]
        inputs = _arrays(*tensors, decay, states, updates, d_out, d_state)
        loops.backward(*inputs, ctx.chunk, *_arrays(*grads))
        cast = [x if x is None else x.to(d) for x, d in zip(grads, ctx.dtypes, strict=True)]
        return *cast, None, None


def _arrays(*tensors: Tensor | None) -> list:
    return [None if x is None else x.numpy() for x in tensors]
