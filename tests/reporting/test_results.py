"""The results page: what it says is what the run files say."""

import pytest

from mad_efla.analysis.leaderboard import leaderboard
from mad_efla.config import ConfigError
from mad_efla.reporting import page, results, table
from mad_efla.runs.read import load
from tests.cli.test_cli import SWEEP, call, folders


def test_every_figure_comes_from_the_run_files(files):
    call(*SWEEP)
    text = call("results").stdout
    (group,) = load(files / "runs")
    board = leaderboard(group)
    for cell in board.cells:
        assert f"| {table.text(cell.accuracy, 'share')} |" in text.replace("**", "")
    assert f"[{100 * board.tasks[0].accuracy.low:.1f}, " in text
    environment = next(iter(group.results.values())).environment
    for word in (
        "4 of 4 done, 0 diverged",
        "| seeds | 0, 1 |",
        environment["torch"],
        "## plan",
        "### Protocol custom",
        "\n\nrecall\n\n",
    ):
        assert word in text


def test_equal_files_give_equal_bytes(files):
    call(*SWEEP)
    assert call("results").stdout == call("results").stdout
    for form in ("--json", "--csv", "--latex"):
        assert call("score", form).stdout == call("score", form).stdout


NOTES = """# My notes

A word before.

## What I did

- this

## plan

old

### under it

older

## What follows

```
## plan
```

the end"""


def test_a_page_keeps_every_byte_outside_its_own_sections(files):
    call(*SWEEP)
    (files / "R.md").write_text(NOTES, encoding="utf-8")
    for _ in range(2):
        call("results", "--into", "R.md")
        text = (files / "R.md").read_text(encoding="utf-8")
        before, after = NOTES.split("## plan\n\nold\n\n### under it\n\nolder\n\n")
        assert text.startswith(before + "## plan\n")
        assert text.endswith("\n" + after)
        assert "\nold" not in text
    assert text == results.into(results.sections(files / "runs"), text)


def test_a_plan_that_a_page_lacks_is_put_at_its_end(files):
    call(*SWEEP)
    text = results.into(results.sections(files / "runs"), "# Mine\n\nwords")
    assert text.startswith("# Mine\n\nwords\n\n## plan\n")


def test_what_is_missing_is_said(files):
    call(*SWEEP)
    for folder in folders(files)[:2]:
        (folder.path / "result.json").unlink()
    text = call("results").stdout
    assert "2 of 4 done" in text
    assert "is not ranked: no run of it is done" in text


def test_a_reading_stands_under_its_plan_s_heading_only_when_it_is_asked_for(files):
    call(*SWEEP)
    (files / "plan.md").write_text("Nothing can be told from this.\n")
    assert "Nothing can be told" not in call("results").stdout
    text = call("results", "--readings", ".").stdout
    assert text.index("## plan") < text.index("Nothing can be told") < text.index("| command |")


def test_a_folder_without_sweeps_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no sweep"):
        results.sections(tmp_path)


def test_a_folder_whose_run_is_gone_counts_as_missing(files):
    call(*SWEEP)
    gone = folders(files)[0]
    for path in gone.path.iterdir():
        path.unlink()
    gone.path.rmdir()
    assert "3 of 4 done" in call("results").stdout


def test_paths_and_addresses_stay_out_of_the_page():
    typed = "mad-efla sweep recall --out /home/me/runs --set 'seeds=[0, 1]' --tracking-uri=http://u:p@h"
    assert page.public_command(typed) == "mad-efla sweep recall --set 'seeds=[0, 1]'"
    assert page.public_command("mad-efla sweep a --no-tracking --tracking-uri x") == "mad-efla sweep a"
