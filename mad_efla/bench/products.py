"""The matrix products of a training step, taken down once and made again on their own.

What a step costs beyond them is what software can save: they run at the processor's own rate. Taken
down are the products that torch runs as such, forward and backward, with their shapes, strides and
types; those inside other operators (attention, recurrences) count as these operators' work. Numbers
are drawn anew, operands of one form share memory, and results are thrown away.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}


class Products(TorchDispatchMode):
    """Take down the matrix products that run inside a `with` block; called, make them again.

    Attributes:
        flops: Two for every multiply-add of them.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0
        self._operands: dict[tuple, Tensor] = {}
        self._calls: list[tuple[Callable[..., Tensor], list[Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator; take it down if it is a product."""
        if func in _PRODUCTS:
            x, y = args[-2:]
            self.flops += 2 * x.numel() * y.shape[-1]
            self._calls.append((func, [self._alike(z) for z in args]))
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def __call__(self) -> None:
        """Make all of them, in their order."""
        for product, operands in self._calls:
            product(*operands)

    def _alike(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        form = (x.shape, x.stride(), x.dtype)
        if form not in self._operands:
            # Drawn flat: an operand may repeat numbers without storing them.
            extent = 1 + sum((n - 1) * step for n, step in zip(*form[:2], strict=True))
            flat = torch.randn(max(extent, 0), device=x.device).to(x.dtype)
            self._operands[form] = flat.as_strided(x.shape, x.stride())
        return self._operands[form]
