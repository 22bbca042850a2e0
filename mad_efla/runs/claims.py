"""Who makes a run: a numbered claim in its folder, held by one process of one machine at a time.

    runs/<fingerprint>/claim.1, claim.2, ...    the highest number is whose the run is

A claim appears by a hard link, which only one process can make, on a shared folder too. Its owner
holds a lock on it, which dies with the process, and touches it every few seconds. It has ended when
the owner released it, when its lock is free (seen on the owner's machine, at once), or when it was
not touched for `LEASE_SECONDS` (seen from anywhere). Then the next number may be claimed. An owner
that was only asleep finds the higher number when it wakes up, and must not write any more.
"""

import contextlib
import fcntl
import os
import secrets
import socket
import threading
from pathlib import Path

LEASE_SECONDS = 60.0
BEAT_SECONDS = 5.0
_RELEASED = 0.0  # the time a released claim is set to: the beginning of 1970


class Fenced(Exception):
    """The claim was taken over while its owner seemed dead; it must write nothing more."""


class Claim:
    """A claim that this process holds.

    Args:
        path: Its file.
        file: The same, open and locked.
    """

    def __init__(self, path: Path, file: int):
        self.path, self._file = path, file
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._touch, daemon=True)
        self._beat.start()

    def check(self) -> None:
        """Raise `Fenced` if the claim is no longer the highest."""
        if _highest(self.path.parent) != _number(self.path):
            raise Fenced(f"{self.path}: taken over by {_read(_claim(self.path.parent))}")

    def release(self) -> None:
        """Release the claim; its number is never reused."""
        self._ended.set()
        self._beat.join()
        with contextlib.suppress(OSError):
            os.utime(self._file, (_RELEASED, _RELEASED))
        os.close(self._file)

    def _touch(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk or a lost server ends the claim later
                os.utime(self._file)


def take(folder: Path) -> Claim | None:
    """Claim a folder.

    Args:
        folder: The folder of the run; it must exist.

    Returns:
        The claim, or None where another process holds one that has not ended.
    """
    found = _claim(folder)
    temporary = folder / f".claim-{secrets.token_hex(8)}"
    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with contextlib.suppress(OSError):  # a disk that refuses locks: the claim's age has to do
            fcntl.flock(file, fcntl.LOCK_EX)
        os.write(file, f"{socket.gethostname()} process {os.getpid()}".encode())
        if found and _holds(found, os.fstat(file).st_mtime):  # the clock of the folder's own disk
            os.close(file)
            return None
        path = folder / f"claim.{_number(found) + 1 if found else 1}"
        try:
            os.link(temporary, path)
        except FileExistsError:  # another was first
            os.close(file)
            return None
    finally:
        temporary.unlink()
    return Claim(path, file)


def is_held(folder: Path) -> bool:
    """Tell whether some process holds the folder, by the clock of the folder's own disk.

    Where nothing can be written, the newest time that is found beside it stands for the clock; a
    claim whose owner died on another machine may then look held until something else is written.
    """
    found = _claim(folder)
    if found is None or _modified(found) <= _RELEASED:
        return False
    return _holds(found, _clock(folder))


def _clock(folder: Path) -> float:
    temporary = folder / f".claim-{secrets.token_hex(8)}"
    try:
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError:
        return max(map(_modified, [*folder.glob("*"), *folder.parent.glob("*/claim.*")]), default=0)
    try:
        return os.fstat(file).st_mtime
    finally:
        os.close(file)
        temporary.unlink()


def _modified(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return _RELEASED


def _holds(path: Path, now: float) -> bool:
    try:
        with path.open("rb") as file:
            if now - os.fstat(file.fileno()).st_mtime > LEASE_SECONDS:
                return False
            if file.read().split(b" ")[0].decode() != socket.gethostname():
                return True
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
            return False
    except FileNotFoundError:
        return False


def _claim(folder: Path) -> Path | None:
    highest = _highest(folder)
    return folder / f"claim.{highest}" if highest else None


def _highest(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return max((_number(p) for p in folder.glob("claim.*")), default=0)
    return 0


def _number(path: Path) -> int:
    suffix = path.suffix[1:]
    return int(suffix) if suffix.isdecimal() else 0


def _read(path: Path | None) -> str:
    with contextlib.suppress(OSError):
        return path.read_text() if path else "nobody: its file is gone"
    return "nobody: its file is gone"
