"""Keeps a store up to date while a sweep goes on, from one background thread.

Training never waits for it. A guard stands by, for the case that this process is killed.
"""

import contextlib
import threading
import time
from pathlib import Path

from mad_efla.runs.schema import SweepRecord
from mad_efla.tracking import stores
from mad_efla.tracking.bridge import Bridge
from mad_efla.tracking.guard import Guard

LIVE_SECONDS = 3.0
CLOSE_SECONDS = 20.0
_LONGEST_PAUSE = 60.0


class Mirror:
    """Keeps MLflow up to date with a sweep while inside.

    Args:
        uri: The store, as `resolve_uri` returns it.
        out: The folder of run folders.
        record: The sweep, already written.
        log_models: Log the models of finished runs, too.

    Attributes:
        problem: One sentence on why MLflow is not up to date; None if it is.
        guard: The process that stands by; None where there is none to be had.
    """

    def __init__(self, uri: str, out: Path, record: SweepRecord, *, log_models: bool = False):
        self.problem: str | None = None
        self.guard: Guard | None = None
        self._bridge = Bridge(uri, out, log_models)
        self._record = record
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        with contextlib.suppress(OSError):  # the sweep is worth more than its guard
            self.guard = Guard(self._bridge.uri, self._bridge.out, self._record.id)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Make a last synchronisation, waiting for it no longer than `CLOSE_SECONDS`."""
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self.problem = stores.explain(stores.Late(), self._bridge.uri, self._bridge.out)
        if self.guard:
            self.guard.end()

    def _follow(self) -> None:
        pause = 0.0
        with stores.live(self._bridge.out, self._record.id):
            while not self._stop.wait(pause):
                self.problem = self._sync()
                failing = min(2 * max(pause, LIVE_SECONDS), _LONGEST_PAUSE)
                pause = failing if self.problem else LIVE_SECONDS
        self.problem = self._sync()

    def _sync(self) -> str | None:
        deadline = time.monotonic() + CLOSE_SECONDS
        return self._bridge.sync(deadline, only=self._record.id).problem
