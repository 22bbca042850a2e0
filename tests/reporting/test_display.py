"""What the terminal shows, with and without a terminal."""

import io

import pytest
from rich.console import Console

from mad_efla.execution.costs import Costs
from mad_efla.execution.queue import Event
from mad_efla.plan import expand
from mad_efla.reporting import live, tables, terminal
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.schema import Row
from tests.runs.test_folder import result
from tests.tiny import tiny


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path, tiny().fingerprint)
    folder.create(tiny())
    return folder


def followed(folder, monkeypatch, terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=140)
    monkeypatch.setattr(live, "stderr", lambda: console)
    monkeypatch.setattr(live, "_PLAIN_SECONDS", 0.0)
    run = tiny()
    costs = Costs([run, tiny(seed=1)])
    with live.Follow([run, tiny(seed=1)], [run], costs, 1) as follow:
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
    ("seconds", "text"), [(0.4, "0 s"), (42, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert terminal.duration(seconds) == text


def test_an_example_is_cut_into_blocks_that_fit():
    lines = terminal.example([1, 2, 3, 4], ["key"] * 4, [-100, 7, -100, 12], [9, 7, 9, 3], 18)
    words = [line.plain.split() for line in lines]
    assert words == [
        ["tokens", "1", "2"],
        ["scored", "7"],
        ["solver", "7"],
        [],
        ["tokens", "3", "4"],
        ["scored", "12"],
        ["solver", "3"],
        [],
    ]
    assert all(len(line.plain) <= 18 for line in lines)


def test_a_long_dry_run_has_a_row_per_setting_and_mixer():
    found = [tiny(seed=s, optim__lr=lr) for lr in (1e-3, 1e-2) for s in range(60)]
    sizes = {run.fingerprint: (1000, 10) for run in found}
    few, many = (tables.runs(runs, expand.differences(runs), sizes) for runs in (found[:100], found))
    assert (len(few.rows), len(many.rows)) == (100, 1)
    cells = dict(zip([c.name for c in many.columns], many.rows[0], strict=True))
    assert (cells["runs"], cells["lr"]) == ("120", "0.001, 0.01")


def test_more_runs_than_lines_leave_the_whole_in_sight(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=140, height=12)
    monkeypatch.setattr(live, "stderr", lambda: console)
    runs = [tiny(seed=s) for s in range(40)]
    events = [Event(r, "running", RunFolder(tmp_path, r.fingerprint)) for r in runs]
    with live.Follow(runs, runs, Costs(runs), 40) as follow:
        follow.update(events)
        follow.live.refresh()
    drawn = console.file.getvalue()
    assert "0/40 runs" in drawn
    assert "(32 of the running not shown)" in drawn
    assert drawn.count("recall baseline") <= 2 * 8


def test_what_is_no_terminal_gets_plain_text_whatever_the_environment_asks_for(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal.stdout().print("[bold red]words[/]")
    terminal.stderr().print("[bold red]words[/]")
    assert capsys.readouterr() == ("words\n", "words\n")
