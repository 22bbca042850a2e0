"""Files that are replaced whole: afterwards a file is the old one or the new one."""

import contextlib
import errno
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from mad_efla.config import ConfigError

# ------------------------------------------------------------------ files


def ensure_writable(out: Path, option: str = "--out") -> None:
    """Make a folder that is to be written.

    Args:
        out: The folder.
        option: Which names it.

    Raises:
        ConfigError: It cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{secrets.token_hex(8)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {out}: cannot be written ({error.strerror}); choose another folder") from None


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file atomically."""
    write_bytes(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, raw: bytes) -> None:
    """Replace a file atomically: afterwards it is the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system has folders that can be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sync(file: int) -> None:
    """Wait until what was written to a file is on its disk, where the file system can tell.

    Args:
        file: Its descriptor.

    Raises:
        OSError: It did not arrive there.
    """
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise


def now() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
