"""The two passes of the delta rule as operators of torch, for any backend that has them.

    forward(q, k, v, erase, write, log_decay, state, C, save) -> o, final, U, states, T
    backward(q, k, v, erase, write, log_decay, U, states, T, d_o, d_final, C) -> seven gradients

Tensors are contiguous and of one dtype, the working one; `erase` None erases nothing, `log_decay`
None keeps the state whole, and their gradients are empty then. Kept for the backward, beside the
inputs, are the pseudo values U [B L H Dv], the states [n B H Dk Dv] that enter the n chunks of C
tokens and, by a backend that inverts, T [n B H C C]; without `save` all three are empty. What else
a backward needs, it computes again.

Legend: U the rows u of S <- g S + k u^T, T = (I + A)^-1; see `loops` and `chunked`.
"""

from collections.abc import Callable
from functools import partial
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype
from mad_kernels.custom_ops import first_order_only, fold, unfold

_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor? erase, Tensor write, Tensor? log_decay, Tensor state,"
    " SymInt C, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor? erase, Tensor write, Tensor? log_decay, Tensor U,"
    " Tensor states, Tensor T, Tensor d_o, Tensor d_final, SymInt C)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Where the batch is: states and T have it behind the chunks.
_FORWARD_AXES = ((0,) * 9, (0, 0, 0, 1, 1))
_BACKWARD_AXES = ((0,) * 7 + (1, 1) + (0,) * 3, (0,) * 7)


@no_type_check  # sizes are symbols while torch.compile traces
def room_forward(q, k, v, erase, write, log_decay, state, C, save, *, inverts):
    """Make room for o, final, U, states and T."""
    B, L, H, Dv = v.shape
    n = -(-L // C)
    kept = B if save else 0
    U, states = (kept, L, H, Dv), (n, kept, *state.shape[1:])
    T = (n, kept if inverts and erase is not None else 0, H, C, C)
    return tuple(v.new_empty(shape) for shape in (v.shape, state.shape, U, states, T))


@no_type_check
def room_backward(q, k, v, erase, write, log_decay, U, states, T, d_o, d_final, C):
    """Make room for the gradients of q, k, v, erase, write, log_decay and state."""
    shapes = [(v.shape[0], 0) if x is None else x.shape for x in (q, k, v, erase, write, log_decay)]
    return tuple(v.new_empty(shape) for shape in (*shapes, d_final.shape))


def register_passes(backend: str, forward: Callable, backward: Callable, *, inverts: bool) -> Callable[..., tuple]:
    """Register the passes of a backend, and give the function that has their gradients.

    The function takes tensors as `delta_rule` does, then C, and returns o in the dtype of v, and
    the final state.
    """
    name = f"mad_kernels::delta_rule_{backend}"
    options = {"mutates_args": ()}
    first = torch.library.custom_op(f"{name}_forward", forward, schema=_FORWARD, **options)
    second = torch.library.custom_op(f"{name}_backward", backward, schema=_BACKWARD, **options)
    first.register_fake(partial(room_forward, inverts=inverts))
    second.register_fake(room_backward)
    for operator, (ins, outs) in ((first, _FORWARD_AXES), (second, _BACKWARD_AXES)):
        _register_vmap(operator, ins, outs)
    # torch.compile knows the registered operators, but not the objects that registered them.
    names = (f"delta_rule_{backend}_{part}" for part in ("forward", "backward"))
    first, second = (getattr(torch.ops.mad_kernels, name).default for name in names)
    pull = first_order_only(second, "delta_rule")

    class DeltaRule(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        @no_type_check
        def forward(*arguments):
            with torch.no_grad():
                return first(*arguments)

        @staticmethod
        @no_type_check
        def setup_context(ctx, inputs, output):
            *tensors, ctx.C, ctx.saved = inputs
            ctx.save_for_backward(*tensors, *output[2:])
            ctx.mark_non_differentiable(*output[2:])
            ctx.set_materialize_grads(False)

        @staticmethod
        @no_type_check
        def backward(ctx, d_o, d_final, *_):
            *inputs, state, U, states, T = ctx.saved_tensors
            if not ctx.saved:  # a transform hid from us that gradients were wanted
                with torch.no_grad():
                    _, _, U, states, T = first(*inputs, state, ctx.C, True)
            d_o = torch.zeros_like(inputs[2]) if d_o is None else d_o.contiguous()
            d_final = torch.zeros_like(state) if d_final is None else d_final.contiguous()
            grads = pull(*inputs, U, states, T, d_o, d_final, ctx.C)
            given = zip(grads, (*inputs, state), strict=True)
            return *(None if x is None else grad for grad, x in given), None, None

    def run(
        q: Float[Tensor, "B L H Dk"],
        k: Float[Tensor, "B L H Dk"],
        v: Float[Tensor, "B L H Dv"],
        erase: Float[Tensor, "B L H"] | None,
        write: Float[Tensor, "B L H"],
        log_decay: Float[Tensor, "B L H"] | None,
        state: Float[Tensor, "B H Dk Dv"],
        C: int,
    ) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
        wide = working_dtype(v)
        given = (q, k, v, erase, write, log_decay, state)
        inputs = [x if x is None else x.to(wide).contiguous() for x in given]
        if torch.compiler.is_compiling():  # it takes no tensor twice, as erase and write may be
            inputs = [x if x is None else x.view_as(x) for x in inputs]
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        o, final, *_ = DeltaRule.apply(*inputs, C, save)
        return o.to(v.dtype), final

    return run


def _register_vmap(operator, ins: tuple[int, ...], outs: tuple[int, ...]) -> None:
    @operator.register_vmap
    @no_type_check
    def rule(info, in_dims, *arguments):
        folded = fold(info.batch_size, in_dims, arguments, ins)
        return unfold(info.batch_size, operator(*folded), outs)
