"""Data is made once, is what it says it is, and never stands in a run's way."""

import errno
import multiprocessing
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mad_efla.training import data, data_cache
from tests.tiny import tiny


def load(folder, run):
    return data_cache.load(folder, run.task, run.seed, run.data)


def path_of(folder, run):
    return folder / data_cache.key(run.task, run.seed, run.data)


def same(a, b):
    return all(
        np.array_equal(x, y)
        for split in data.SPLITS
        for x, y in zip(getattr(a, split), getattr(b, split), strict=True)
        if x is not None
    )


@pytest.fixture
def counted(monkeypatch):
    """Count how often data is generated."""
    made, make = [], data.make
    monkeypatch.setattr(data, "make", lambda *a: made.append(a) or make(*a))
    return made


@pytest.mark.parametrize("name", ["recall", "memorization"])
def test_shared_data_is_the_data_and_is_made_once(tmp_path, counted, name):
    run = tiny(task__name=name)
    expected = data.make(run.task, run.seed, run.data)
    counted.clear()
    first, second = load(tmp_path, run), load(tmp_path, run)
    assert len(counted) == 1
    for found in (first, second):
        assert same(found, expected)
        assert found.digest == expected.digest
        assert np.array_equal(found.world, expected.world)
    load(tmp_path, tiny(task__name=name, optim__lr=0.5, train__steps=3))
    assert len(counted) == 1
    load(tmp_path, tiny(task__name=name, seed=1))
    assert len(counted) == 2


def test_tensors_share_the_files_memory_and_cannot_change_them(tmp_path):
    run = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that it may not write to
        tensor = torch.from_numpy(load(tmp_path, run).train.inputs)
    before = load(tmp_path, run).train.inputs.copy()
    tensor += 1
    assert np.array_equal(load(tmp_path, run).train.inputs, before)
    assert str(path_of(tmp_path, run) / "train.inputs.npy") in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("spoil", ["cut", "flip", "remove", "empty", "digest", "more"])
def test_what_is_broken_is_made_again_and_said(tmp_path, caplog, spoil):
    run = tiny()
    load(tmp_path, run)
    expected, path = data.make(run.task, run.seed, run.data), path_of(tmp_path, run)
    file = path / "train.inputs.npy"
    raw = bytearray(file.read_bytes())
    if spoil == "cut":
        file.write_bytes(raw[: len(raw) // 2])
    elif spoil == "flip":
        raw[-3] ^= 1
        file.write_bytes(raw)
    elif spoil == "remove":
        file.unlink()
    elif spoil == "empty":
        file.write_bytes(b"")
    elif spoil == "digest":
        (path / "digest").write_text("0" * 16)
    else:
        (path / "train.other.npy").write_bytes(raw)
    assert same(load(tmp_path, run), expected)
    assert f"{path}: is broken and is made again" in caplog.text
    assert (path / "digest").read_text() == expected.digest
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == [path.name]


@pytest.mark.parametrize("call", ["mkdir", "rename", "save"])
def test_a_disk_that_takes_nothing_costs_no_run_its_data(tmp_path, monkeypatch, call):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    run = tiny()
    place = np if call == "save" else data_cache.Path
    monkeypatch.setattr(place, call, full)
    found = load(tmp_path / "new", run)
    monkeypatch.undo()
    assert same(found, data.make(run.task, run.seed, run.data))
    assert not path_of(tmp_path / "new", run).exists()


def _load_at_once(folder, log, barrier):
    make = data.make

    def counted(*arguments):
        with log.open("a") as file:
            file.write("made\n")
        return make(*arguments)

    data.make = counted
    barrier.wait()
    load(folder, tiny())


def test_of_many_processes_one_generates(tmp_path):
    context = multiprocessing.get_context("fork")
    log, barrier = tmp_path / "log", context.Barrier(6)
    processes = [context.Process(target=_load_at_once, args=(tmp_path / "data", log, barrier)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "made\n"


def test_data_is_removed_when_the_last_run_that_needs_it_has_ended(tmp_path):
    first, again, other = tiny(), tiny(optim__lr=0.5), tiny(seed=1)
    needs = data_cache.Needs(tmp_path, [first, again, other])
    loaded = {run.fingerprint: load(tmp_path, run) for run in (first, other)}
    needs.drop(first)
    assert path_of(tmp_path, first).exists()
    needs.drop(again)
    assert not path_of(tmp_path, first).exists()
    assert path_of(tmp_path, other).exists()
    assert same(loaded[first.fingerprint], data.make(first.task, 0, first.data))  # still mapped
    needs.drop(other)
    assert not tmp_path.exists()


def test_what_a_killed_call_left_is_removed_after_a_day(tmp_path, monkeypatch):
    load(tmp_path, tiny())
    (tmp_path / ".half-written").mkdir()
    data_cache.Needs(tmp_path, [])
    assert path_of(tmp_path, tiny()).exists()
    monkeypatch.setattr(data_cache, "_STALE_SECONDS", -1.0)
    data_cache.Needs(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("works", [False, True], ids=["refused", "granted to all"])
def test_without_locks_data_is_kept_all_the_same(tmp_path, monkeypatch, counted, works):
    def flock(file, operation):
        if not works:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    run = tiny()
    expected = data.make(run.task, run.seed, run.data)
    counted.clear()
    assert same(load(tmp_path, run), expected)
    assert same(load(tmp_path, run), expected)
    assert len(counted) == 1
    write = data_cache._write

    def second(path, made):  # while another process writes the same
        write(path, made)
        write(path, made)

    monkeypatch.setattr(data_cache, "_write", second)
    monkeypatch.setattr("shutil.rmtree", lambda *a, **k: None)
    assert same(load(tmp_path, tiny(seed=1)), data.make(run.task, 1, run.data))


def test_what_is_old_is_told_by_the_clock_of_its_own_disk(tmp_path, monkeypatch):
    run = tiny()
    load(tmp_path, run)
    monkeypatch.setattr("time.time", lambda: 4e9)  # this machine's clock is far ahead
    data_cache.Needs(tmp_path, [])
    assert path_of(tmp_path, run).exists()
    os.utime(path_of(tmp_path, run), (1e9, 1e9))
    data_cache.Needs(tmp_path, [])
    assert not path_of(tmp_path, run).exists()
