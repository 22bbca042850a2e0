"""IDX, the format of MNIST's files: a magic number, the sizes of the axes, then bytes.

    0 0 8 n   size_1 ... size_n (four bytes each, the highest first)   one byte per entry

Only unsigned bytes (type 8) are read, as MNIST and the data sets made in its likeness hold nothing
else. A file may be compressed by gzip, whatever its name says.

Source: LeCun, Cortes, Burges, The MNIST database of handwritten digits, "file formats".
"""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from mad_efla.config import ConfigError

_UNSIGNED_BYTES = 8


class Published(NamedTuple):
    """What a published file is known by: its size in bytes and its MD5, both uncompressed."""

    size: int
    md5: str


def find(folder: Path, name: str) -> Path | None:
    """Return `name` or `name.gz` in a folder, or None."""
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)


def read(path: Path, axes: int, published: Published | None = None) -> UInt8[np.ndarray, "..."]:
    """Read one file.

    Args:
        path: Of the file, compressed or not.
        axes: How many it must have: 3 for images, 1 for labels.
        published: Size and checksum it must have; None takes any.

    Raises:
        ConfigError: It cannot be read, is broken, or is not the published one.
    """
    raw = _bytes(path)
    if published is not None:
        _check(path, raw, published)
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise ConfigError(f"{path}: begins with {raw[:4].hex()!r}, not as IDX with 0000; replace it")
    kind, found = raw[2], raw[3]
    if kind != _UNSIGNED_BYTES or found != axes:
        raise ConfigError(
            f"{path}: holds type {kind} on {found} axes, must be unsigned bytes (8) on {axes}; is "
            "it another of the four files?"
        )
    start = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", raw[4:start]) if len(raw) >= start else ()
    if len(shape) < axes or len(raw) - start != math.prod(shape):
        raise ConfigError(
            f"{path}: holds {max(len(raw) - start, 0)} entries, its head says "
            f"{' x '.join(map(str, shape)) or 'nothing'}; it is cut off or broken, replace it"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: {error}; replace the file") from None


def _check(path: Path, raw: bytes, published: Published) -> None:
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if (len(raw), found) != published:
        raise ConfigError(
            f"{path}: has {len(raw)} bytes and MD5 {found}, the published file {published.size} "
            f"and {published.md5}; replace it, or name the data set otherwise with task.dataset"
        )
