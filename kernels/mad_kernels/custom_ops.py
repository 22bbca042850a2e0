"""What makes an operator of ours hold under torch.compile and torch.func.

A pass that torch cannot look into (compiled loops, a Python loop over chunks) is registered as a
`torch.library.custom_op`: a compiler calls it as a whole, with sizes from its fake. `fold` and
`unfold` write its vmap rule, by moving the mapped axis into the batch. Gradients are a Function
around such passes and not `register_autograd`: torch.func's transforms refuse an operator that
brings gradients of its own. A backward runs through `first_order_only`.
"""

from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor


def stack(size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> list[Any]:
    """Move an axis that is mapped over to the front of every tensor.

    Args:
        size: Length of the mapped axis.
        in_dims: Where it is in each argument; None where it is not.
        arguments: Arguments of the operator; what is no tensor stays as it is.
    """
    stacked = []
    for x, axis in zip(arguments, in_dims, strict=True):
        if isinstance(x, Tensor):
            x = x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
        stacked.append(x)
    return stacked


def fold(size: int, in_dims: Sequence[int | None], arguments: Sequence[Any], batch_axes: Sequence[int]) -> list[Any]:
    """Move an axis that is mapped over into the batch axis of every tensor, see `stack`."""
    stacked = zip(stack(size, in_dims, arguments), batch_axes, strict=True)
    return [x.movedim(0, axis).flatten(axis, axis + 1) if isinstance(x, Tensor) else x for x, axis in stacked]


def unfold(
    size: int, results: Sequence[Tensor], batch_axes: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Give results their mapped axis back, before the batch, and say where it is."""
    pairs = zip(results, batch_axes, strict=True)
    split = tuple(x.unflatten(axis, (size, x.shape[axis] // size)) for x, axis in pairs)
    return split, tuple(batch_axes)


def first_order_only(
    run: Callable[..., Any], operator: str, cure: str = "take backend='reference'"
) -> Callable[..., Any]:
    """Wrap a backward pass so that differentiating it is an error that says what to do."""

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        @no_type_check
        def forward(*arguments):
            with torch.no_grad():
                return run(*arguments)

        @staticmethod
        @no_type_check
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        @no_type_check
        def backward(ctx, *grads):
            raise RuntimeError(f"{operator} has first-order gradients only here: {cure} for higher ones")

    def call(*arguments):
        # torch.compile traces first-order gradients only, and no Function inside another. Where no
        # graph is recorded there is nothing to refuse, and a Function costs 0.1 ms.
        direct = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        return run(*arguments) if direct else Backward.apply(*arguments)

    return call
