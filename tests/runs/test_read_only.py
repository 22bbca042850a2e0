"""Reading needs no writing: whoever may only look at a folder of runs sees all of it."""

import errno
import io
import os
from pathlib import Path

import pytest

from tests.cli.test_cli import SWEEP, call, folders

_CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "utime", "truncate", "link", "symlink")


@pytest.fixture
def read_only(files, monkeypatch):
    """Runs in a folder that nobody may write any more, the claim of one not released."""
    call(*SWEEP, "--set", "seeds=[0]")
    one, other = folders(files)
    os.utime(next(one.path.glob("claim.*")))
    (other.path / "result.json").unlink()
    out, real, make = str((files / "runs").resolve()), io.open, os.open

    def guard(path):
        if os.path.realpath(os.fspath(path)).startswith(out):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opened(file, mode="r", *arguments, **options):
        if not isinstance(file, int) and set(mode) & set("wax+"):
            guard(file)
        return real(file, mode, *arguments, **options)

    def made(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            guard(path)
        return make(path, flags, *arguments, **options)

    def changed(function):
        return lambda path, *arguments, **options: (guard(path), function(path, *arguments, **options))[1]

    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr("io.open", opened)
    monkeypatch.setattr("os.open", made)
    for name in _CHANGES:
        monkeypatch.setattr(f"os.{name}", changed(getattr(os, name)))
    return one


@pytest.mark.parametrize("command", ["status runs", "score runs", "results runs", "report runs --to page/index.html"])
def test_a_folder_that_is_read_only_is_shown(read_only, command):
    assert "recall" in call(*command.split()).stdout + "".join(
        path.read_text(encoding="utf-8") for path in Path("page").glob("*.html")
    )


def test_a_run_in_a_read_only_folder_is_looked_into(read_only):
    assert "efla(heads=2)" in call("spectrum", read_only.fingerprint, "--examples", "2").stdout
    assert read_only.fingerprint in call("logs", read_only.fingerprint).stdout


def test_what_has_to_write_there_says_which_option_names_another_place(read_only):
    assert "choose another folder" in call("report", "runs", code=2).stderr
    assert "--out runs: cannot be written" in call(*SWEEP, "--set", "seeds=[5]", code=2).stderr
