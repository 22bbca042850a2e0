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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

VARIABLE = "MAD_KERNELS_BACKEND"
OPERATORS = ("delta_rule", "short_conv", "ssd")

_recorders: ContextVar[tuple[set[str], ...]] = ContextVar("mad_kernels_recorders", default=())


@contextmanager
def record_backends() -> Iterator[set[str]]:
    """Collect `operator:backend` for every operator called inside, in this thread or task.

    Recorders nest: an inner one does not hide calls from an outer one.

    Yields:
        A set that fills as operators are called.
    """
    ran: set[str] = set()
    token = _recorders.set((*_recorders.get(), ran))
    try:
        yield ran
    finally:
        _recorders.reset(token)


def choose_backend(operator: str, backend: str, offered: Sequence[str]) -> str:
    """Settle the backend of one call and record it.

    Args:
        operator: Name of the operator.
        backend: The caller's wish, or "auto".
        offered: Names this operator offers; the first one is the automatic choice.

    Returns:
        A name out of `offered`.

    Raises:
        ValueError: If the argument or the variable names a backend that is not offered.
    """
    place = f"{operator}: backend"
    if backend == "auto":
        backend, place = _from_environment(operator), f"{operator}: {VARIABLE}"
    if backend == "auto":
        backend = offered[0]
    if backend not in offered:
        names = ", ".join(map(repr, (*offered, "auto")))
        raise ValueError(f"{place}={backend!r} is not offered by {operator}: choose one of {names}")
    for ran in _recorders.get():
        ran.add(f"{operator}:{backend}")
    return backend


def _from_environment(operator: str) -> str:
    chosen = {"": "auto"}
    for entry in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        target, _, name = entry.rpartition(":")
        if target and target not in OPERATORS:
            known = ", ".join(OPERATORS)
            raise ValueError(f"{VARIABLE}: {entry!r} names no operator: write one of {known}")
        chosen[target] = name
    return chosen.get(operator, chosen[""])
