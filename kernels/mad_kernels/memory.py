"""Tensors as the flat memory that compiled loops read and write, and whether they may.

Loops take plain tensors on the CPU. What torch.func wraps, torch.compile traces or another library
derives from a tensor has no memory to show; operators keep a form in plain torch for those.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from mad_kernels.checks import DTYPES, working_dtype
from mad_kernels.dispatch import runs_compiled_loops


def in_memory(*tensors: Tensor | None) -> bool:
    """Tell whether compiled loops can take all of these tensors; None is skipped."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(
        type(x) in (Tensor, nn.Parameter) and runs_compiled_loops(x) and x.dtype in DTYPES
        for x in tensors
        if x is not None
    )


def check_in_memory(operator: str, *tensors: Tensor | None) -> None:
    """Refuse tensors that compiled loops cannot take, where those were asked for.

    Raises:
        ValueError: One of them is not plain, or of another dtype.
    """
    if not in_memory(*tensors):
        raise ValueError(
            f"{operator}: backend='numba' takes plain tensors of float64, float32 or bfloat16, not "
            f"what torch.func wraps or torch.compile traces: leave backend 'auto'"
        )


def array(x: Tensor) -> np.ndarray:
    """Show a contiguous tensor as a flat array; bfloat16 as its bits, uint16."""
    x = x.detach().view(-1)
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def arrays(*tensors: Tensor | None) -> list[np.ndarray | None]:
    """Show tensors as contiguous arrays of their shapes; None stays."""
    return [None if x is None else x.detach().contiguous().numpy() for x in tensors]


def lines(x: Tensor, axes: int = 1) -> tuple[np.ndarray, int]:
    """Show a tensor as lines over its last axes, and how far apart they begin.

    A slice of the last axis, such as a part of a projection, is shown where it stands; what has no
    such form, like a gradient that repeats one number without storing it, is copied.
    """
    width = x.shape[-axes:].numel()
    step = _step(x, axes) if x.numel() else None
    if step is None:
        return array(x.contiguous()), width
    count = x.numel() // width
    return array(x.detach().as_strided(((count - 1) * step + width,), (1,))), step


def constants(x: Tensor, *values: float) -> np.ndarray:
    """Give numbers to loops in the type in which they work on a tensor."""
    return np.array(values, np.float64 if x.dtype == torch.float64 else np.float32)


def padded(x: Tensor, like: Tensor) -> np.ndarray:
    """Give a vector to loops in the type in which they work on a tensor, filled up with zeros."""
    from mad_kernels.lanes import LANES  # brings numba, which takes its time

    values = x.detach().to(working_dtype(like)).numpy()
    into = np.zeros(-(-values.size // LANES) * LANES, values.dtype)
    into[: values.size] = values
    return into


def _step(x: Tensor, axes: int) -> int | None:
    """Find the distance between lines; None where they do not stand in steps, or overlap."""
    sizes, strides = list(x.shape), list(x.stride())
    expected = 1
    for _ in range(axes):
        size, stride = sizes.pop(), strides.pop()
        if size != 1 and stride != expected:
            return None
        expected *= size
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    if not kept:
        return expected
    step = kept[-1][1]
    for (_, outer), (size, inner) in pairwise(kept):
        if outer != size * inner:
            return None
    return step if step >= expected else None
