"""Which backend of an operator runs, and a record of which one did.

Choice, first that speaks wins: the argument `backend`, the environment variable
`MAD_KERNELS_BACKEND`, the operator's own automatic choice. The variable holds one name for all
operators (`reference`) or pairs for some (`delta_rule:reference,ssd:chunked`), a pair winning over
a bare name. A name that the operator does not offer is refused; nothing falls back silently.

    with record_backends() as ran:
        model(tokens)
    sorted(ran)  # ["delta_rule:chunked", "short_conv:fused"]
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

import torch
from torch import Tensor

from mad_kernels.checks import check_chunk, working_dtype

VARIABLE = "MAD_KERNELS_BACKEND"
OPERATORS = (
    *("delta_rule", "dplr", "selective_scan", "ssd"),
    *("head_norm_gate", "rms_norm", "short_conv", "skip_gate", "swiglu", "token_shift"),
)
_HAS_NUMBA = find_spec("numba") is not None
_HAS_TRITON = find_spec("triton") is not None
_CUT = ("chunked", "numba")  # backends that take sequences in chunks, or keep a state of each
_WIDEST_STATE = 128  # a state that still fits into the registers of one program

_recorders: ContextVar[tuple[set[str], ...]] = ContextVar("mad_kernels_recorders", default=())


@contextmanager
def record_backends() -> Iterator[set[str]]:
    """Collect `operator:backend` for every operator called inside, in this thread or task.

    Recorders nest: an inner one does not hide calls from an outer one. Calls that torch.compile
    traces leave no record.

    Yields:
        A set that fills as operators are called.
    """
    ran: set[str] = set()
    token = _recorders.set((*_recorders.get(), ran))
    try:
        yield ran
    finally:
        _recorders.reset(token)


def runs_compiled_loops(x: Tensor) -> bool:
    """Tell whether the numba backends can take a tensor: numba is there, and `x` is on the CPU."""
    return x.device.type == "cpu" and _numba_is_installed()


def obstacle_to_triton(x: Tensor, *widths: int, otherwise: str = "chunked") -> str | None:
    """Tell what keeps the triton backends from a tensor and states of these widths.

    Args:
        x: A tensor of the call.
        widths: Of the state.
        otherwise: The backend to take where triton cannot.

    Returns:
        The rest of a sentence that starts with the backend, with a cure; None where nothing does.
    """
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed: pip install 'mad-efla[triton]'"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"runs on a CUDA device, but the tensors are on {x.device}: move them with .cuda(), "
            f"choose another backend, or interpret the kernels, TRITON_INTERPRET=1"
        )
    if x.dtype == torch.float64:
        return f"sums in float32, but the tensors are float64: cast them, or take {otherwise!r}"
    if max(widths, default=0) > _WIDEST_STATE:
        return f"takes widths of at most {_WIDEST_STATE}, not {max(widths)}: take {otherwise!r}"
    return None


def choose_backend(
    operator: str,
    backend: str,
    offered: Sequence[str],
    *,
    automatic: str | None = None,
    like: Tensor | None = None,
    obstacle: str | None = None,
) -> str:
    """Settle the backend of one call and record it.

    Args:
        operator: Name of the operator.
        backend: The caller's wish, or "auto".
        offered: Names this operator offers.
        automatic: The automatic choice for this call; None takes the first of `offered`.
        like: A tensor of the call, where a backend asks for one kind of device.
        obstacle: What keeps the triton backend from this call, see `obstacle_to_triton`.

    Returns:
        A name out of `offered`.

    Raises:
        ValueError: If the argument or the variable names a backend that is not offered, or one that
            cannot run here.
    """
    place = f"{operator}: backend"
    if backend == "auto":
        backend, place = _from_environment(operator), f"{operator}: {VARIABLE}"
    if backend == "auto":
        backend = automatic or offered[0]
    if backend not in offered:
        names = ", ".join(map(repr, (*offered, "auto")))
        raise ValueError(f"{place}={backend!r} is not offered by {operator}: choose one of {names}")
    if backend == "numba":
        _check_numba(place, like)
    if backend == "triton" and obstacle:
        raise ValueError(f"{place}='triton' {obstacle}")
    if not torch.compiler.is_compiling():  # a trace cannot look into a context variable
        for ran in _recorders.get():
            ran.add(f"{operator}:{backend}")
    return backend


def run_backend(
    operator: str,
    backends: Mapping[str, Callable[..., tuple[Tensor, Tensor]]],
    backend: str,
    tensors: Mapping[str, tuple[Tensor | None, str]],
    sizes: Mapping[str, int],
    *,
    like: str,
    widths: str = "",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the backend of a recurrence, make its first state if there is none, and run it.

    Args:
        operator: Name of the operator.
        backends: What runs each; the first one where neither numba nor triton can.
        backend: The caller's wish, or "auto".
        tensors: Argument name to (tensor, axes), in the order in which backends take them; the last
            is the state before the first token, None for zeros.
        sizes: Axis name to size, from `check_tensors`.
        like: Name of the tensor whose dtype the output has.
        widths: Axes of the state that triton holds in registers.
        chunk: Tokens per chunk, for the backends that cut a sequence; None is their own choice.

    Returns:
        What the backend returns: the output and the final state.

    Raises:
        ValueError: If `chunk` or `backend` does not fit.
    """
    if chunk is not None:
        check_chunk(operator, chunk)
    x, otherwise = tensors[like][0], next(iter(backends))
    assert x is not None
    obstacle = obstacle_to_triton(x, *(sizes[axis] for axis in widths.split()), otherwise=otherwise)
    automatic = "numba" if runs_compiled_loops(x) else otherwise
    if x.is_cuda and obstacle is None and "triton" in backends:
        automatic = "triton"
    chosen = choose_backend(operator, backend, tuple(backends), automatic=automatic, like=x, obstacle=obstacle)
    *given, (state, axes) = tensors.values()
    if state is None:
        state = x.new_zeros([sizes[axis] for axis in axes.split()], dtype=working_dtype(x))
    options = {"chunk": chunk} if chunk is not None and chosen in _CUT else {}
    return backends[chosen](*(z for z, _ in given), state, **options)


def _numba_is_installed() -> bool:
    return _HAS_NUMBA


def _check_numba(place: str, like: Tensor | None) -> None:
    if like is not None and like.device.type != "cpu":
        raise ValueError(
            f"{place}='numba' runs on the CPU, but the tensors are on {like.device}: "
            f"move them with .cpu() or choose another backend"
        )
    if not _numba_is_installed():
        raise ValueError(f"{place}='numba' needs the package numba, which is not installed: pip install numba")


def _from_environment(operator: str) -> str:
    chosen = {"": "auto"}
    for entry in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        target, _, name = entry.rpartition(":")
        if target and target not in OPERATORS:
            known = ", ".join(OPERATORS)
            raise ValueError(f"{VARIABLE}: {entry!r} names no operator: write one of {known}")
        chosen[target] = name
    return chosen.get(operator, chosen[""])
