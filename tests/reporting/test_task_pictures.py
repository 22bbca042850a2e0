"""Pictures of tasks: every token is there, answers stand below what they answer, files are ours."""

import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import CliRunner

from mad_efla.cli import cli
from mad_efla.reporting import catalogue, terminal
from mad_efla.reporting.figures import tasks

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"/mad-efla (show .* --svg \S+)", (ROOT / "Makefile").read_text())


def cells(svg):
    """Return texts and rectangles of a picture, by the x of their middle or left, and y."""
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    texts = [(float(e.get("x", 0)), float(e.get("y", 0)), e.text) for e in root.iter(f"{space}text")]
    boxes = [{k: e.get(k) for k in ("x", "y", "fill")} for e in root.iter(f"{space}rect")]
    return texts, boxes


def test_every_task_of_mad_has_a_picture_in_the_reference():
    shown = [shlex.split(command)[1] for command in COMMANDS]
    drawn = re.findall(r"notebooks/images/tasks/(\w+)\.svg", (ROOT / "REFERENCE.md").read_text())
    assert set(drawn) <= set(shown)
    assert {"recall", "noisy_recall", "fuzzy_recall"} < set(drawn)
    assert {"selective_copying", "compression", "memorization"} < set(drawn)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_pictures_kept_are_what_the_command_writes(command, tmp_path):
    *words, kept = shlex.split(command)
    done = CliRunner().invoke(cli, [*words, str(tmp_path / "new" / "a.svg")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "new" / "a.svg").read_bytes() == (ROOT / kept).read_bytes()
    assert (ROOT / kept).stat().st_size < 60_000


def test_answers_stand_below_the_tokens_they_are_scored_at():
    (block,) = catalogue.examples("recall", ["task.seq_len=24"], 0, 1)
    inputs, _, targets, _ = block
    texts, _ = cells(tasks.picture("recall", [block]))
    rows = {}
    for x, y, text in texts:
        if text.isdigit():
            rows.setdefault(y, []).append((x, int(text)))
    read, answered = (dict(rows[y]) for y in sorted(rows))
    assert list(read.values()) == inputs
    scored = [i for i, target in enumerate(targets) if target >= 0]
    assert answered == {list(read)[i]: targets[i] for i in scored}


def test_long_sequences_go_on_in_a_new_line_and_lose_nothing():
    (block,) = catalogue.examples("selective_copying", [], 0, 1)
    inputs, roles, targets, _ = block
    texts, _ = cells(tasks.picture("selective_copying", [block]))
    shown = [int(text) for *_, text in texts if text.isdigit()]
    said = [t for t, role in zip(inputs, roles, strict=True) if role != "blank"]
    assert sorted(shown) == sorted(said + [t for t in targets if t >= 0])
    assert max(x for x, *_ in texts) < 1000


def test_a_legend_names_the_roles_there_are_and_those_of_a_users_own_task():
    blocks = [([1, 2], ["key", "<odd>"], [-100, 3], [-100, 3])]
    texts, boxes = cells(tasks.picture("own:Own", blocks))
    words = [text for *_, text in texts if not text.isdigit()]
    assert words == ["reads", "answers", "key", "<odd>", "answer, scored"]
    assert len({b["fill"] for b in boxes}) == 2  # blue for the key; all else is white


def test_a_role_of_one_letter_stands_in_place_of_the_id_and_in_no_legend():
    blocks = [([7, 5, 3], ["digit", "<", "digit"], [-100, -100, 2], [-100, -100, 2])]
    texts, _ = cells(tasks.picture("own:Own", blocks))
    assert [text for *_, text in texts if text.isdigit() or len(text) == 1] == ["7", "<", "3", "2"]
    (line, *_) = terminal.example(*blocks[0], columns=80)
    assert line.plain.split() == ["tokens", "7", "<", "3"]


def test_what_is_compressed_is_answered_from_the_last_token_alone():
    (block,) = catalogue.examples("compression", ["task.seq_len=8"], 0, 1)
    root = ElementTree.fromstring(tasks.picture("compression", [block]))
    paths = [e.get("d") for e in root.iter("{http://www.w3.org/2000/svg}path")]
    starts = [float(re.match(r"M([\d.]+) ", d)[1]) for d in paths]
    assert len(paths) == 2 + 8  # one from the last token, a rail, one to each answer
    assert starts[0] == max(starts)


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    done = CliRunner().invoke(cli, ["show", "recall", "--svg", str(tmp_path / "taken" / "a.svg")])
    assert done.exit_code == 2
    assert "name another file" in done.output
