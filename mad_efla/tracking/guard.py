"""A small process that brings MLflow up to date when the driver of a sweep was killed.

A driver killed by SIGKILL cannot say so, and its runs would stay RUNNING in MLflow until somebody
synchronises. So every `Mirror` has a guard, which waits on a pipe from the driver for

    a line          JSON: the store, the run folders, the sweep, where Python finds modules
    then a byte     the driver has ended by itself, and there is nothing to do
    or end of file  it was killed: wait until its workers have let go of its runs, synchronise once

The guard is started by its path. As a module (`-m`) it would import this package first, and with it
torch; so it is a bare interpreter until it is needed. The store comes through the pipe because an
address may hold a password, which a command line shows. Only the driver holds the other end of the
pipe: workers come from a process of their own, which is handed none of our descriptors.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

LOCK_SECONDS = 30.0  # a worker notices its driver's death within a step, and writes a checkpoint
SYNC_SECONDS = 20.0
_LIFE_SECONDS = 120  # of a guard whose driver is dead, whatever MLflow does
_END_SECONDS = 5.0
_POLL_SECONDS = 0.1


class Guard:
    """The driver's side: starts the process, and ends it.

    Args:
        uri: The store, as `resolve_uri` returns it.
        out: The folder of run folders.
        sweep: Id of the sweep.

    Attributes:
        process: The guard.

    Raises:
        OSError: There is no process to be had.
    """

    def __init__(self, uri: str, out: Path, sweep: str):
        told = {"uri": uri, "out": str(out.absolute()), "sweep": sweep, "path": sys.path}
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # a pipe that it held open would keep its reader waiting
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C, and the terminal's end, are not for it
            bufsize=0,
        )
        assert self.process.stdin
        self.process.stdin.write(json.dumps(told).encode() + b"\n")

    def end(self) -> None:
        """Send the guard home: the driver has ended by itself."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.communicate(b".", timeout=_END_SECONDS)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def main() -> None:
    """Wait for the driver to end, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n") or sys.stdin.buffer.read(1):
        return
    signal.alarm(_LIFE_SECONDS)
    told = json.loads(line)
    sys.path[:] = told["path"]
    synchronise(told["uri"], Path(told["out"]), told["sweep"])


def synchronise(uri: str, out: Path, sweep: str) -> None:
    """Bring MLflow up to date with a sweep once no process holds one of its runs."""
    from mad_efla.runs.folder import RunFolder
    from mad_efla.runs.sweeps import read_sweeps
    from mad_efla.tracking.bridge import Bridge

    deadline = time.monotonic() + LOCK_SECONDS
    folders = [RunFolder(out, f) for r in read_sweeps(out) if r.id == sweep for f in r.fingerprints]
    while time.monotonic() < deadline and any(f.status() == "running" for f in folders):
        time.sleep(_POLL_SECONDS)
    Bridge(uri, out).sync(time.monotonic() + SYNC_SECONDS, only=sweep)


if __name__ == "__main__":
    main()
