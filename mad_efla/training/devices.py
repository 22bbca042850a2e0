"""Which GPU a process trains on, where a machine has several: the one with the fewest of ours.

A process holds a lock on a file named after a GPU and a place on it, for as long as it lives; so
processes spread by themselves, whoever started them, and a killed one leaves its place free.
"""

import fcntl
import itertools
import os
import tempfile
from pathlib import Path

import torch

_held: int | None = None  # the lock, until the process ends


def take() -> None:
    """Choose this process's GPU, once; where there is only one there is nothing to choose."""
    global _held
    if _held is None and torch.cuda.device_count() > 1:
        number, _held = place(torch.cuda.device_count())
        torch.cuda.set_device(number)


def place(devices: int) -> tuple[int, int]:
    """Take the first free place among devices: the first on each, then the second on each, ...

    Returns:
        The device's number, and the file whose lock holds the place.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace("/", "-")
    folder = Path(tempfile.gettempdir()) / f"mad-efla-{os.getuid()}" / visible
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for row in itertools.count():
        for device in range(devices):
            file = os.open(folder / f"cuda-{device}.{row}", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
            except OSError:  # no locks here: spread by chance
                return os.getpid() % devices, file
            else:
                return device, file
    raise AssertionError
