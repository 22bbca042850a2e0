"""Who writes a store, which sweeps go on, and whose the runs are; all by files beside the runs.

    <database>.claims/      held by the one process that writes a local store
    runs/.mlflow.claims/    held by the one process that mirrors this folder to a server
    runs/sweeps/<id>.live/  held by a process that makes runs of this sweep
    runs/sweeps/owner       a random word, written once: whose runs these are, on a server of many

Holding is by claims (`runs/claims.py`), since network disks refuse locks, or grant them to everybody.
"""

import contextlib
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mad_efla.config import digest
from mad_efla.runs import claims
from mad_efla.tracking.problems import in_time
from mad_efla.tracking.stores import sqlite_path


@contextlib.contextmanager
def exclusive(uri: str, out: Path, deadline: float) -> Iterator[None]:
    """Be the only process that writes this store, or these runs to a server.

    Raises:
        Late: Another process has it beyond the deadline.
    """
    folder = _place(uri, out)
    while (claim := claims.take(folder)) is None:
        in_time(deadline)
        time.sleep(0.1)
    try:
        for old in folder.glob("claim.*"):  # one file is enough to tell who has it
            if old != claim.path:
                old.unlink(missing_ok=True)
        yield
    finally:
        claim.release()


def _place(uri: str, out: Path) -> Path:
    """Make the folder of claims on a store; runs that can only be read have it among temporary files."""
    path = sqlite_path(uri)
    folder = path.parent / f".{path.name}.claims" if path else out / ".mlflow.claims"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError:
        if path:
            raise
    name = f"mad-efla-{os.getuid()}-{digest(f'{uri} {out.absolute()}')}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(exist_ok=True)
    return folder


class Live:
    """Shows other processes that sweeps go on.

    Args:
        out: The folder of run folders.
        sweeps: Ids of the sweeps.
    """

    def __init__(self, out: Path, sweeps: list[str]):
        self._places = {sweep: _live(out, sweep) for sweep in sweeps}
        self._claims: dict[str, claims.Claim] = {}

    def show(self) -> None:
        """Claim what no other process of the same sweep shows; called again, as that one may end."""
        for sweep, place in self._places.items():
            if sweep not in self._claims:
                with contextlib.suppress(OSError):  # the disk is full: it is shown as stopped meanwhile
                    place.mkdir(parents=True, exist_ok=True)
                    if claim := claims.take(place):
                        self._claims[sweep] = claim

    def end(self) -> None:
        """Say that this process makes no more runs."""
        while self._claims:
            self._claims.popitem()[1].release()


def is_live(out: Path, sweep: str) -> bool:
    """Say whether a process is at this sweep."""
    return claims.is_held(_live(out, sweep))


def _live(out: Path, sweep: str) -> Path:
    return out / "sweeps" / f"{sweep}.live"


def owner(out: Path) -> str:
    """Return whose the runs in a folder are: its random word, which goes with a copy of the folder.

    A folder that has none and can only be read is known by its machine and its path; one that is not there
    has no runs, and no word.
    """
    if not out.exists():
        return ""
    path = out / "sweeps" / "owner"
    with contextlib.suppress(OSError):
        if word := path.read_text(encoding="utf-8").strip():
            return word
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(secrets.token_hex(8))
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return digest(f"{socket.gethostname()} {out.absolute()}")
