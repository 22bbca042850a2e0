"""How processes of ours start.

On Linux they are forked from one process, a server, which has imported what a run needs and has
computed nothing: each starts within milliseconds, and all share the memory of torch. Elsewhere,
and with a GPU, forking after such imports is not known to be safe, and each process imports for
itself.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

# What the server begins with. glibc keeps freed memory instead of handing it back, which makes a
# training step 5 to 10 % faster; and numpy starts no threads, which a fork would lose.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "OPENBLAS_NUM_THREADS": "1",
}
# torch's optimisers and operators import its compiler, whether anything is compiled or not.
_IMPORTS = ["mad_efla.execution.worker", "torch._dynamo", "numba"]
_ATTEMPTS = 100  # to start a process, should the server just have been killed

_fresh = multiprocessing.get_context("spawn")
context = multiprocessing.get_context("forkserver") if sys.platform == "linux" else _fresh


def prepare(device: str = "cpu") -> None:
    """Start the server, which imports in the background, unless it is there; CUDA has none."""
    os.environ.update(ENVIRONMENT | os.environ)
    resource_tracker.ensure_running()  # before signals are held, which it lets go when it starts
    if sys.platform == "linux" and device != "cuda":
        forkserver.set_forkserver_preload(_IMPORTS)
        with _signals_held():
            forkserver.ensure_running()


def start(target: Callable[..., None], *arguments: Any, device: str = "cpu") -> BaseProcess:
    """Start a process that ends with this one; it has this one's environment.

    SIGINT stays blocked in it, since Ctrl-C is this process's business; `begin` admits SIGTERM.

    Args:
        target: What it calls first; it has to call `begin`.
        arguments: Of the target, behind what `begin` takes.
        device: What it will compute on.

    Raises:
        OSError: There is no process to be had.
        EOFError: Its server was killed again and again.
    """
    left = _ATTEMPTS
    while True:
        prepare(device)
        process = (_fresh if device == "cuda" else context).Process(
            target=target, args=(dict(os.environ), *arguments), daemon=True
        )
        left -= 1
        try:
            with _signals_held():
                process.start()
            return process
        except (ConnectionError, EOFError):
            if not left:
                raise
            time.sleep(0.05)  # until the system says that it is dead


def begin(environment: dict[str, str], on_sigterm: Callable[..., None] | signal.Handlers) -> None:
    """Be ready in a new process: the environment of its parent, and an answer to SIGTERM."""
    os.environ.clear()  # the server's is as old as the server
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, on_sigterm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back, here for a moment and in what is started meanwhile for good.

    A server that answered SIGTERM would be gone before the workers of a process group that is told
    to end, and could not tell how they ended.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
