"""How an operator of ours is made one of torch's: with gradients, under torch.compile and torch.func.

A pass that torch cannot look into (compiled loops, launches, a Python loop over chunks) is a
`torch.library.custom_op`: a compiler calls it as a whole, with sizes from its fake, and a vmap rule
folds the mapped axis into the batch. `with_gradients` ties a forward and a backward pass together
by a Function around them and not by `register_autograd`: torch.func's transforms refuse an operator
that brings gradients of its own. A backward runs through `first_order_only`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mad_kernels.checks import working_dtype


def with_gradients(
    operator: str,
    backend: str,
    tensors: str,
    options: str = "",
    *,
    forward: Callable[..., tuple],
    backward: Callable[..., tuple],
    allocate: Callable[..., tuple],
    kept: Sequence[int] = (),
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register two passes as operators of torch, and tie them into one with gradients.

        forward(*tensors, *options, save) -> output, final state, *what is kept
        backward(*tensors, *what is kept, d_output, d_final, *options) -> a gradient for each tensor

    Tensors have the batch first, and so have their gradients; that of None is `allocate_gradients`'s.

    Args:
        operator: Name for messages.
        backend: The passes are `mad_kernels::<operator>_<backend>_forward` and `_backward`.
        tensors: Their names in turn, with "?" where one may be None.
        options: What follows them, as torch's schemas write it: "SymInt C".
        forward: The pass. `save` says whether to keep anything; it is left out where nothing is.
        backward: The pass back; `d_output` or `d_final` is None where nothing depends on it.
        allocate: Makes room for all results of `forward`, from the same arguments.
        kept: The axis of the batch in each result that is kept; without `save` that axis has length 0.

    Returns:
        The function of tensors and options to output and final state. Its gradients are of first
        order.
    """
    names = tensors.split()
    count = len(names)
    declared = [f"Tensor{'?' * x.endswith('?')} {x.rstrip('?')}" for x in names]
    numbers = [x for x in options.split(", ") if x]
    into = [*declared, *numbers, *["bool save"] * bool(kept)]
    back = [*declared, *(f"Tensor kept{i}" for i in range(len(kept)))]
    back += ["Tensor? d_output", "Tensor? d_final", *numbers]
    axes = [0] * count + [*kept] + [0] * (2 + len(numbers))

    def gradients(*arguments):
        return allocate_gradients(*arguments[:count])

    name = f"{operator}_{backend}"
    first = _register(f"{name}_forward", into, [0, 0, *kept], forward, allocate, [0] * len(into))
    second = _register(f"{name}_backward", back, [0] * count, backward, gradients, axes)
    pull = first_order_only(second, operator)

    class Operator(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            with torch.no_grad():
                return first(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.options = inputs[count:]
            ctx.save_for_backward(*inputs[:count], *output[2:])
            ctx.mark_non_differentiable(*output[2:])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, d_output, d_final, *_):
            given, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
            options = ctx.options[:-1] if kept else ctx.options
            if kept and not ctx.options[-1]:  # a transform hid from us that gradients were wanted
                with torch.no_grad():
                    saved = first(*given, *options, True)[2:]
            grads = pull(*given, *saved, d_output, d_final, *options)
            pairs = zip(grads, given, strict=True)
            return *(None if x is None else grad for grad, x in pairs), *(None for _ in ctx.options)

    def run(*arguments):
        if torch.compiler.is_compiling():  # it takes no tensor twice, as erase and write may be
            arguments = [x.view_as(x) if isinstance(x, Tensor) else x for x in arguments]
        if kept:
            wanted = any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
            arguments = (*arguments, wanted and torch.is_grad_enabled())
        return Operator.apply(*arguments)[:2]

    return run


def allocate_gradients(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Make room for the gradient of each tensor; that of None is empty, but has the batch."""
    batch = next(x for x in tensors if x is not None)
    return tuple(batch.new_empty(batch.shape[0], 0) if x is None else x.new_empty(x.shape) for x in tensors)


def widened(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Bring tensors to the dtype of an operator's sums, side by side in memory; None stays."""
    return [x if x is None else x.to(working_dtype(like)).contiguous() for x in tensors]


def filled(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Give a gradient side by side in memory, zeros where nothing depends on the result."""
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


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
        def forward(*arguments):
            with torch.no_grad():
                return run(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(f"{operator} has first-order gradients only here: {cure} for higher ones")

    def call(*arguments):
        # torch.compile traces first-order gradients only, and no Function inside another. Where no
        # graph is recorded there is nothing to refuse, and a Function costs 0.1 ms.
        direct = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        return run(*arguments) if direct else Backward.apply(*arguments)

    return call


def _register(
    name: str, arguments: list[str], results: list[int], run: Callable, allocate: Callable, axes: list[int]
) -> Callable[..., tuple]:
    """Register a pass, with the axis of the batch in each result and argument."""
    schema = f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * len(results))})"
    operator = torch.library.custom_op(f"mad_kernels::{name}", run, schema=schema, mutates_args=())
    operator.register_fake(allocate)

    @operator.register_vmap
    def rule(info, in_dims, *given):
        folded = fold(info.batch_size, in_dims, given, axes)
        return unfold(info.batch_size, operator(*folded), results)

    # torch.compile knows the registered operators, but not the objects that registered them.
    return getattr(torch.ops.mad_kernels, name).default
