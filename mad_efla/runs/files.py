"""Files that are replaced whole: afterwards a file is the old one or the new one."""

import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from mad_efla.config import ConfigError

# ------------------------------------------------------------------ files


def ensure_writable(out: Path) -> None:
    """Make the folder for runs.

    Raises:
        ConfigError: It cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{secrets.token_hex(8)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None


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
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def now() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
