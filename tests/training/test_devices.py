"""Processes spread over GPUs; places of dead ones are free."""

import errno
import os

from mad_efla.training import devices


def test_places_fill_row_by_row_and_come_free(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    taken = [devices.place(2) for _ in range(5)]
    assert [device for device, _ in taken] == [0, 1, 0, 1, 0]
    os.close(taken[1][1])
    assert devices.place(2)[0] == 1
    assert devices.place(3)[0] == 2


def test_where_no_file_can_be_locked_a_place_is_had_all_the_same(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("fcntl.flock", refuse)
    device, file = devices.place(2)
    os.close(file)
    assert device == os.getpid() % 2
