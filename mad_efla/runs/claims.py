"""Who makes a run: a numbered claim in its folder, held by one process of one machine at a time.

    runs/<fingerprint>/claim.1, claim.2, ...    the highest number is whose the run is

A claim is a file that must not have been there before (`O_EXCL`), so one process alone can make it,
on a shared folder too. Its owner writes it again every few seconds. It has ended when the owner
released it, when it was not written for `LEASE_SECONDS` by the clock of the folder's own disk (seen
from anywhere), or when its process is gone (seen on the same machine, at once). Then the next number
may be claimed. An owner that was only asleep finds the higher number when it wakes up, and must not
write any more.

No file is locked: some file systems refuse locks, and others grant each one to everybody. A machine
is known by its kernel's boot id and process namespace, since host names may be equal.
"""

import contextlib
import os
import secrets
import socket
import threading
import uuid
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
        owner: What stands in it.
    """

    def __init__(self, path: Path, owner: bytes):
        self.path, self._owner = path, owner
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._renew, daemon=True)
        self._beat.start()

    def check(self) -> None:
        """Raise `Fenced` if the claim is no longer the highest."""
        if _highest(self.path.parent) != _number(self.path):
            found = _claim(self.path.parent)
            owner = _look(found)[1].partition("\n")[0] if found else ""
            raise Fenced(f"{self.path}: taken over by {owner or 'nobody: its file is gone'}")

    def release(self) -> None:
        """Release the claim; its number is never reused."""
        self._ended.set()
        self._beat.join()
        with contextlib.suppress(OSError):
            os.utime(self.path, (_RELEASED, _RELEASED))

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            # Written, since not every file server puts its own time when one is set to "now".
            with contextlib.suppress(OSError), self.path.open("r+b") as file:  # a lost server ends it later
                file.write(self._owner)


def take(folder: Path) -> Claim | None:
    """Claim a folder.

    Args:
        folder: The folder of the run; it must exist.

    Returns:
        The claim, or None where another process holds one that has not ended.

    Raises:
        OSError: The folder cannot be written.
    """
    found = _claim(folder)
    if found and _holds(found, _clock(folder)):
        return None
    path = folder / f"claim.{_number(found) + 1 if found else 1}"
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:  # another was first
        return None
    try:
        owner = _name(os.getpid()).encode()
        os.write(file, owner)
    finally:
        os.close(file)
    return Claim(path, owner)


def is_held(folder: Path) -> bool:
    """Tell whether some process holds the folder, by the clock of the folder's own disk.

    Where nothing can be written, the newest time that is found beside it stands for the clock; a
    claim whose owner died on another machine may then look held until something else is written.
    """
    found = _claim(folder)
    if found is None or _look(found)[0] <= _RELEASED:
        return False
    return _holds(found, clock(folder))


def clock(folder: Path) -> float:
    """Return the time by the clock of a folder's own disk, in seconds since the epoch.

    The one clock that all machines which share a folder agree on; where the folder cannot be
    written, the newest time that is found in it or in its neighbours.
    """
    try:
        return _clock(folder)
    except OSError:
        return max((_look(p)[0] for p in [*folder.glob("*"), *folder.parent.glob("*/claim.*")]), default=0.0)


def _clock(folder: Path) -> float:
    temporary = folder / f".clock-{secrets.token_hex(8)}.partial"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(file).st_mtime
    finally:
        os.close(file)
        temporary.unlink(missing_ok=True)


def _holds(path: Path, now: float) -> bool:
    modified, owner = _look(path)
    return now - modified <= LEASE_SECONDS and not _is_gone(owner)


def _look(path: Path) -> tuple[float, str]:
    """Return when a claim was last written, and by whom; of one that is gone, that it was released."""
    try:
        with path.open("rb") as file:  # a network folder tells what is new to whoever opens, not to `stat`
            return os.fstat(file.fileno()).st_mtime, file.read(1000).decode(errors="replace")
    except FileNotFoundError:
        return _RELEASED, ""
    except OSError:
        return path.stat().st_mtime, ""


def _name(process: int) -> str:
    """Name a process of this machine: for people, and so that it is not taken for another one."""
    return f"{socket.gethostname()} process {process}\n{_machine()} {_started(process)}\n"


def _is_gone(owner: str) -> bool:
    """Tell whether the owner of a claim is seen to be gone; nothing is seen of another machine."""
    try:
        process = int(owner.partition("\n")[0].split()[-1])
        machine, started = owner.splitlines()[1].rsplit(" ", 1)
    except (IndexError, ValueError):  # just being written, or by an earlier version
        return False
    if machine != _machine():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return _started(process) != started


def _machine() -> str:
    """Name this machine, from its start on, and the container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _started(process: int) -> str:
    """Say when a process started, in the kernel's ticks; "-" where the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "-"
    return "ended" if fields[0] in "ZX" else fields[19]


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
