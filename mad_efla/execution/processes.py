"""How processes of ours start.

On Linux they are forked from one process, a server, which has imported what a run needs and has
computed nothing: each starts within milliseconds, and all share the memory of torch. Elsewhere,
and with a GPU, forking after such imports is not known to be safe, and each process imports for
itself.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from mad_efla.config import ConfigError

# What the server begins with. glibc keeps freed memory instead of handing it back, which makes a
# training step 5 to 10 % faster; and numpy starts no threads, which a fork would lose.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "OPENBLAS_NUM_THREADS": "1",
}
# torch's optimisers and operators import its compiler, whether anything is compiled or not.
_IMPORTS = ["mad_efla.execution.worker", "torch._dynamo", "numba"]
_LONGEST = 60  # bytes of a temporary folder's name; a socket's has 107, and 31 are multiprocessing's
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_ATTEMPTS = 100  # to start a process, should the server just have been killed

_fresh = multiprocessing.get_context("spawn")
context = multiprocessing.get_context("forkserver") if sys.platform == "linux" else _fresh


def prepare(device: str = "cpu") -> None:
    """Start the server, which imports in the background, unless it is there; CUDA has none."""
    os.environ.update(ENVIRONMENT | os.environ)
    resource_tracker.ensure_running()  # before signals are held, which it lets go when it starts
    if sys.platform == "linux" and device != "cuda":
        forkserver.set_forkserver_preload(_IMPORTS)
        with _signals_held(), _room_for_sockets():
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
    """Be ready in a new process: the environment of its parent, and an answer to SIGTERM.

    What a task or a layer starts here are processes like any others: they may be started, which
    multiprocessing refuses under a daemon, and they end at SIGTERM. Those still there at this
    process's end are ended by `end`.
    """
    multiprocessing.current_process().daemon = False
    os.register_at_fork(after_in_child=functools.partial(signal.signal, signal.SIGTERM, signal.SIG_DFL))
    os.environ.clear()  # the server's is as old as the server
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, on_sigterm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def end() -> NoReturn:
    """End this process, and what it has started with it; the interpreter would take a while to say goodbye."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)


@contextlib.contextmanager
def _room_for_sockets() -> Iterator[None]:
    """Let multiprocessing make its folder where the name of a socket in it is not too long.

    Raises:
        ConfigError: There is no such place.
    """
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) > _LONGEST:
        short = next((f for f in _SHORT if os.access(f, os.W_OK | os.X_OK)), None)
        if short is None:
            raise ConfigError(
                f"TMPDIR={before}: has {len(os.fsencode(before))} bytes, and a socket in it can be named up to "
                f"{_LONGEST}; set TMPDIR to a shorter folder, or use --workers 0"
            )
        tempfile.tempdir = short
    try:
        yield
    finally:
        tempfile.tempdir = before


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
