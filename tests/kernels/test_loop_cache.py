"""Compiled loops on disk: what is broken is compiled again, to the same bits, and said."""

import os
import types

import numpy as np
import pytest
from numba.core import config

from mad_kernels.lanes import compile_loop


def _sum(x):
    total = 0.0
    for number in x:
        total += number * number
    return total


def loop():
    """Return the loop as a new process would have it."""
    return compile_loop(types.FunctionType(_sum.__code__, globals(), "_sum"))


def _flip(raw):
    return raw[:-50] + bytes([raw[-50] ^ 1]) + raw[-49:]


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:100], _flip], ids=["empty", "cut", "altered"])
def test_a_broken_loop_is_compiled_again_to_equal_bits(tmp_path, monkeypatch, caplog, suffix, damage):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    x = np.random.default_rng(0).standard_normal(101)
    bits = loop()(x)
    kept = loop()
    assert kept(x) == bits
    assert sum(kept.stats.cache_hits.values()) == 1
    (path,) = tmp_path.rglob(f"*{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    again = loop()
    assert again(x) == bits
    assert sum(again.stats.cache_hits.values()) == 0
    if damage is not _flip or suffix == ".nbc":  # an index that is altered may only miss
        assert "is broken" in caplog.text
    mended = loop()
    assert mended(x) == bits
    assert sum(mended.stats.cache_hits.values()) == 1


def test_a_loop_that_cannot_be_kept_runs_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    compiled = loop()
    monkeypatch.setattr(os, "replace", full)
    assert compiled(np.ones(3)) == 3
    assert "No space left" in caplog.text
    assert not list(tmp_path.rglob("*.nb?"))
