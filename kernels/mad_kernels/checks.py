"""The arguments of an operator, checked once where a caller hands them over.

A specification names each tensor's axes, `"B L H Dk"`. The first tensor that shows an axis fixes
its size, and every later one has to agree. Messages give the value, the rule and the cure.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def check_tensors(operator: str, tensors: Mapping[str, tuple[Tensor | None, str]]) -> dict[str, int]:
    """Check axes, dtypes and devices of an operator's tensors; a tensor that is None is skipped.

    Args:
        operator: Name that opens every message.
        tensors: Argument name to (tensor, axes); the first entry sets dtype family and device.

    Returns:
        Axis name to size.

    Raises:
        ValueError: If a tensor has other axes, an unsupported dtype, or sits on another device.
    """
    given = {name: (x, axes.split()) for name, (x, axes) in tensors.items() if x is not None}
    first = next(iter(given))
    sizes: dict[str, tuple[int, str]] = {}
    for name, (x, axes) in given.items():
        place = f"{operator}: {name}"
        _check_dtype(place, x, first, given[first][0])
        if x.dim() != len(axes):
            shape = tuple(x.shape)
            raise ValueError(
                f"{place} has shape {shape}, {x.dim()} axes, but takes {len(axes)}: lay it out as [{' '.join(axes)}]"
            )
        for axis, size in zip(axes, x.shape, strict=True):
            expected, owner = sizes.setdefault(axis, (size, name))
            if size != expected:
                raise ValueError(
                    f"{place} has {axis}={size} but {owner} has {axis}={expected}: "
                    f"give both the same {axis}; {name} is laid out as [{' '.join(axes)}]"
                )
    return {axis: size for axis, (size, _) in sizes.items()}


def check_chunk(operator: str, chunk: int) -> None:
    """Refuse a chunk length below one token.

    Raises:
        ValueError: If `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"{operator}: chunk={chunk} must be at least 1 token: leave it None")


def working_dtype(x: Tensor) -> torch.dtype:
    """Give the dtype of states and sums: float64 for float64, float32 for anything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_dtype(place: str, x: Tensor, first: str, leader: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{place} is {x.dtype}, but only float64, float32 and bfloat16 keep a state's range: "
            f"cast it with .bfloat16() or .float()"
        )
    if (x.dtype == torch.float64) != (leader.dtype == torch.float64):
        raise ValueError(
            f"{place} is {x.dtype} but {first} is {leader.dtype}: "
            f"float64 does not mix with shorter floats, cast one of them"
        )
    if x.device != leader.device:
        raise ValueError(
            f"{place} is on {x.device} but {first} on {leader.device}: "
            f"move both to one device with .to({str(leader.device)!r})"
        )
