"""Keeps a store up to date while sweeps go on, from one background thread.

Training never waits for it. If this process is killed, the next `sync`, `ui` or sweep says so in MLflow.
"""

import threading
import time
from pathlib import Path

from mad_efla.runs.schema import SweepRecord
from mad_efla.tracking.bridge import Bridge
from mad_efla.tracking.locks import Live
from mad_efla.tracking.problems import Late, explain, meaning

LIVE_SECONDS = 3.0
CLOSE_SECONDS = 20.0
_LONGEST_PAUSE = 60.0


class Mirror:
    """Keeps MLflow up to date with the sweeps of a call while inside.

    Args:
        uri: The store, as `resolve_uri` returns it.
        out: The folder of run folders.
        sweeps: The sweeps, already written.
        log_models: Log the models of finished runs, too.

    Attributes:
        problem: One sentence on why MLflow is not up to date; None if it is.
        notes: What could not be read, or is refused by MLflow, and why.
    """

    def __init__(self, uri: str, out: Path, *sweeps: SweepRecord, log_models: bool = False):
        self.problem: str | None = None
        self.notes: tuple[str, ...] = ()
        self._bridge = Bridge(uri, out, log_models)
        self._sweeps = {sweep.id for sweep in sweeps}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Make a last synchronisation, waiting for it no longer than `CLOSE_SECONDS`."""
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self.problem = self._explain(Late())

    def said(self) -> list[str]:
        """Return what the user has to know, a line each."""
        return [*(f"note: {note}" for note in self.notes), *([f"warning: {self.problem}"] if self.problem else [])]

    def _follow(self) -> None:
        live, pause = Live(self._bridge.out, sorted(self._sweeps)), 0.0
        while not self._stop.wait(pause):
            live.show()
            self._sync()
            failing = min(2 * max(pause, LIVE_SECONDS), _LONGEST_PAUSE)
            pause = failing if self.problem else LIVE_SECONDS
        live.end()
        self._bridge.files.again = 0.0
        self._sync()

    def _sync(self) -> None:
        try:
            report = self._bridge.sync(time.monotonic() + CLOSE_SECONDS, only=self._sweeps)
            self.problem, self.notes = report.problem, report.notes
        except Exception as error:  # this thread must not end in silence
            self.problem = self._explain(error)

    def _explain(self, error: Exception) -> str:
        return explain(meaning(error, self._bridge.uri).sentence, self._bridge.out)
