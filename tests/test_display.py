"""What the terminal shows, with and without a terminal."""

import io

import pytest
from rich.console import Console

from mad_efla import display
from mad_efla.execute import Event
from mad_efla.store import Row, RunFolder
from tests.test_store import result
from tests.tiny import tiny


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path, tiny().fingerprint)
    folder.create(tiny())
    return folder


def followed(folder, monkeypatch, terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=140)
    monkeypatch.setattr(display, "stderr", lambda: console)
    monkeypatch.setattr(display, "_PLAIN_SECONDS", 0.0)
    run = tiny()
    with display.Follow([run, tiny(seed=1)], [tiny(seed=1)]) as follow:
        follow.update([Event(run, "running", folder)])
        folder.append([Row(10, 1, {"train/loss": 1.5}), Row(10, 1, {"val/token_accuracy": 0.25})])
        follow.update([Event(run, "running", folder)])
        if follow.live:
            follow.live.refresh()
        folder.finish(result(run.fingerprint))
        follow.update([Event(run, "finished", folder)])
    return file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_following_shows_steps_loss_accuracy_and_the_end(folder, monkeypatch, terminal):
    text = followed(folder, monkeypatch, terminal)
    for part in ("10/30", "loss 1.500", "accuracy 0.250", "left", "finished: test accuracy 0.5000"):
        assert part in text
    assert ("━" in text) == terminal


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert display.duration(seconds) == text


def test_an_example_is_cut_into_blocks_that_fit():
    lines = display.example([1, 2, 3, 4], ["key"] * 4, [-100, 7, -100, 12], [9, 7, 9, 3], 18)
    words = [line.plain.split() for line in lines]
    assert words == [
        ["tokens", "1", "2"], ["scored", "7"], ["solver", "7"], [],
        ["tokens", "3", "4"], ["scored", "12"], ["solver", "3"], [],
    ]  # fmt: skip
    assert all(len(line.plain) <= 18 for line in lines)


def test_what_is_no_terminal_gets_plain_text_whatever_the_environment_asks_for(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    display.stdout().print("[bold red]words[/]")
    display.stderr().print("[bold red]words[/]")
    assert capsys.readouterr() == ("words\n", "words\n")
