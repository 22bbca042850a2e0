"""Text is UTF-8 whatever the locale says, and what a terminal cannot show is replaced."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLI = "import sys; from mad_efla.cli import main; sys.exit(main())"


def _without_encoding(tree):
    """Yield the lines of calls that open a file as text in the locale's encoding."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        keywords = {k.arg: k.value for k in call.keywords}
        if "encoding" in keywords or owner == "os":
            continue
        if name in ("read_text", "write_text"):
            yield call.lineno
        elif name == "open":
            first = call.args[:1] if isinstance(call.func, ast.Attribute) else call.args[1:2]
            mode = next(iter(first), keywords.get("mode"))
            if not (isinstance(mode, ast.Constant) and "b" in str(mode.value)):
                yield call.lineno
        elif name in ("run", "Popen", "check_output") and {"text", "universal_newlines"} & keywords.keys():
            yield call.lineno


def test_every_file_is_opened_as_utf8_or_as_bytes():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("mad_efla", "kernels/mad_kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in _without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


PLAN = """
about: "Größe, naïve → 尺寸"
protocol: custom
mixers: [{name: efla, heads: 2}]
settings: {recall: {"größer → 大": {task.vocab_size: 10}}}
model: {width: 16, depth: 1}
data: {train_examples: 32, validation_examples: 16, test_examples: 16}
train: {batch_size: 16, steps: 2, eval_every: 2}
"""
TASK = "# Aufgabe: Schlüssel → Wert\ntask: {name: recall, vocab_size: 8, seq_len: 12}\n"
NOTES = "# Über uns\r\n\r\ncafé \xa0 → 尺寸\r\n\r\n## Was ich tat: größer\r\n\r\nIch.\r\n".encode()


@pytest.fixture
def ascii_only(monkeypatch):
    """Be in the C locale of old, with a terminal that knows ASCII alone."""
    for name in ("LANG", "LC_CTYPE", "PYTHONUTF8"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")  # else Python takes C for UTF-8 by itself
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("MAD_KERNELS_BACKEND", "reference")  # nothing to be compiled
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))))


def test_a_terminal_that_knows_ascii_alone_is_enough_for_everything(tmp_path, ascii_only):
    Path("task.yaml").write_text(TASK, encoding="utf-8")
    Path("größe.yaml").write_text(PLAN, encoding="utf-8")
    Path("readings").mkdir()
    Path("readings/größe.md").write_text("Größer ist schöner.\n", encoding="utf-8")
    Path("notes.md").write_bytes(NOTES + b"\xff not UTF-8\n")
    for command in (
        ["sweep", "task.yaml", "--plan", "größe.yaml", "--no-tracking", "--workers", "0", "--device", "cpu"],
        ["status", "runs"],
        ["results", "runs", "--readings", "readings", "--into", "notes.md"],
    ):
        done = subprocess.run([sys.executable, "-c", CLI, *command], capture_output=True)
        assert done.returncode == 0, (command, done.stdout[-500:], done.stderr[-1500:])
        assert b"Traceback" not in done.stdout + done.stderr
    written = Path("notes.md").read_bytes()
    assert written.startswith(NOTES + b"\xff not UTF-8\n")
    assert written.count("## größe".encode()) == 1
    assert "Größer ist schöner.".encode() in written
    assert "größer → 大".encode() in written


def test_a_section_ends_where_any_heading_of_the_users_begins():
    from mad_efla.reporting import results

    after = "Mein Fazit → schön\r\n==================\r\n\r\n## quick und mehr\r\n\r\nTab\there \r\n"
    page = results.into({"quick": "## quick\n\nnew\n"}, "# Über uns\r\n\r\n## quick\r\n\r\nold\r\n\r\n" + after)
    assert page == "# Über uns\r\n\r\n## quick\n\nnew\n\n" + after
