"""The IDX reader takes what is whole and says what is wrong with the rest."""

import gzip
import struct

import numpy as np
import pytest

from mad_efla.config import ConfigError
from mad_efla.tasks import _idx
from tests.pixels import encode

IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_what_was_written_is_read(tmp_path, pack):
    (tmp_path / "a").write_bytes(pack(encode(IMAGES)))
    found = _idx.read(tmp_path / "a", 3)
    assert found.dtype == np.uint8
    assert np.array_equal(found, IMAGES)


def test_a_compressed_file_is_found_under_its_other_name(tmp_path):
    (tmp_path / "a.gz").write_bytes(b"")
    assert _idx.find(tmp_path, "a") == tmp_path / "a.gz"
    assert _idx.find(tmp_path, "b") is None


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "begins with ''"),
        (b"\x89PNG1234", "begins with '89504e47'"),
        (encode(IMAGES)[:-1], "holds 23 entries, its head says 2 x 3 x 4"),
        (encode(IMAGES) + b"\0", "holds 25 entries"),
        (encode(IMAGES)[:9], "its head says nothing"),
        (encode(IMAGES[0]), "unsigned bytes .8. on 3"),
        (b"\0\0\x0d\3" + encode(IMAGES)[4:], "holds type 13 on 3 axes"),
        (gzip.compress(encode(IMAGES), mtime=0)[:-9], "replace the file"),
        (gzip.compress(encode(IMAGES), mtime=0)[:12] + b"\xff" * 30, "replace the file"),
        (struct.pack(">4I", 0x00000803, 2**31, 2**31, 2**31), "holds 0 entries"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, raw, why):
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(ConfigError, match=why) as caught:
        _idx.read(tmp_path / "a", 3)
    assert str(tmp_path / "a") in str(caught.value)


def test_a_published_file_is_held_to_size_and_checksum(tmp_path):
    path = tmp_path / "a"
    raw = encode(IMAGES)
    path.write_bytes(gzip.compress(raw))
    known = _idx.Published(len(raw), "f" * 32)
    with pytest.raises(ConfigError, match=r"has 40 bytes and MD5 \w{32}, the published file 40"):
        _idx.read(path, 3, known)
