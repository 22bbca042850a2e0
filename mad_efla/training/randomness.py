"""The process's global generators and switches, lent to one run at a time.

A layer may draw from torch's generators (dropout), from numpy's or from Python's. All are seeded
from the run, kept in its checkpoint, and given back as they were found; so is what a layer may
switch, from gradients and the default type to the environment and the working directory. So a run's
bits depend neither on the process that makes it nor on what ran there before.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from mad_efla.training import data

State = dict[str, Any]
_Switch = tuple[Callable[[], Any], Callable[[Any], Any]]


@contextlib.contextmanager
def lent() -> Iterator[None]:
    """Take gradients, in float32 by default; put switches and generators back afterwards."""
    before, found = state(), [read() for read, _ in _SWITCHES]
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        for (read, write), value in zip(_SWITCHES, found, strict=True):
            if read() != value:  # some are slow to set, or leave a trace
                write(value)
        restore(before)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Put the generators back afterwards."""
    before = state()
    try:
        yield
    finally:
        restore(before)


@contextlib.contextmanager
def building(seed: int) -> Iterator[None]:
    """Seed every global generator for the weights of a model, and put it back afterwards."""
    with untouched():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        yield


def seed(seed: int) -> None:
    """Seed every global generator from a run's seed."""
    of_torch, of_numpy, of_python = data.stream(seed, "training").integers(2**32, size=3).tolist()
    torch.manual_seed(of_torch)  # CUDA's, too
    np.random.seed(of_numpy)  # noqa: NPY002
    random.seed(of_python)


def state() -> State:
    """Return where the generators stand, as `torch.load` reads it with weights only."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    version, words, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [np.asarray(keys).tolist(), *rest],
        "python": [version, list(words), gauss],
    }


def restore(state: State) -> None:
    """Put the generators where `state` says."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _set_deterministic(mode: int) -> None:
    torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device == torch.device("cpu") else device)


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _attribute(of: Any, name: str) -> _Switch:
    return (lambda: getattr(of, name)), (lambda value: setattr(of, name, value))


_SWITCHES: tuple[_Switch, ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, _set_deterministic),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    _attribute(torch.backends.mkldnn, "enabled"),
    _attribute(torch.backends.cudnn, "enabled"),
    _attribute(torch.backends.cudnn, "benchmark"),
    _attribute(torch.backends.cudnn, "deterministic"),
    _attribute(torch.backends.cudnn, "allow_tf32"),
    (np.geterr, lambda how: np.seterr(**how)),
    (lambda: dict(os.environ), _set_environment),
    (os.getcwd, os.chdir),
)
"""What a layer could leave changed for whoever comes after it in the process."""
