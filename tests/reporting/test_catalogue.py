"""What there is to choose from fits a terminal; what is known of one thing is complete."""

import pytest

from mad_efla import config, plugins, tasks
from mad_efla.plan import expand
from mad_efla.reporting.catalogue import phrase
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.schema import SweepRecord
from mad_efla.runs.sweeps import write_sweep
from tests.analysis.test_cells import done
from tests.cli.test_cli import call


@pytest.mark.parametrize("kind", ["tasks", "mixers", "plans"])
def test_a_list_has_a_line_each_that_fits_80_columns(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = call("list", kind).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    named = [line.split()[0] for line in lines if line.strip() and "─" not in line][1:]
    expected = {
        "tasks": plugins.names(tasks),
        "mixers": plugins.names(plugins.mad_efla.mixers),
        "plans": [p.stem for p in config.presets("sweeps")],
    }[kind]
    assert named == list(expected)
    assert all(len(line.split()) >= 3 for line in lines if line.split() and line.split()[0] in named)
    assert "…" not in "".join(lines)


def test_plans_say_how_many_runs_and_how_long_where_that_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mad_efla.execution.machine.cores", lambda: 2)
    text = call("list", "plans").stdout
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert rows["quick"].split()[-4:] == ["162", "not", "known", "yet"]
    assert "1,296" in rows["efla_controls"].split()
    assert "24/setting" in rows["mad"] and "180/task" in rows["robustness"]
    runs = expand.expand("recall", "capacity", [], "float32").runs
    for run in runs[::2]:  # one seed of each
        folder = RunFolder(tmp_path / "runs", run.fingerprint)
        folder.create(run)
        folder.finish(done(run, 0.5, 0.5).model_copy(update={"seconds": 60.0}))
    write_sweep(
        tmp_path / "runs",
        SweepRecord(
            id="a", task="recall", plan="capacity", protocol="custom", command="", fingerprints=(), started=1, ended=1
        ),
    )
    monkeypatch.setattr("mad_efla.execution.machine.resolve_precision", lambda device: "float32")
    (row,) = (line for line in call("list", "plans").stdout.splitlines() if line.split()[:1] == ["capacity"])
    assert row.rstrip().endswith("18 min 00 s")  # 36 runs of a minute on two workers


def test_a_plan_by_name_says_what_its_protocol_fixes_and_leaves_free():
    text = call("list", "plans", "mad").stdout
    for words in (
        "optim.betas [0.9, 0.999]",
        "optim.lr 0.0001 or 0.0005 or 0.001",
        "train.eval_every none",
        "mixers who learns",
        "grid: {'optim.lr'",
    ):
        assert words in " ".join(text.split())
    assert "train.precision" in text.partition("It leaves free")[0]
    assert "train.precision" in call("list", "plans", "quick").stdout.partition("It leaves free")[2]
    text = call("list", "plans", "efla_controls").stdout
    assert text.count("delta(") >= 25 and "324" in text and "This protocol fixes nothing." in text


def test_a_task_or_a_mixer_by_name_says_its_fields_and_what_it_is():
    text = " ".join(call("list", "tasks", "recall").stdout.split())
    assert "vocab_size int 16" in text and "seq_len=1024" in text and "Source:" in text
    text = " ".join(call("list", "mixers", "efla").stdout.split())
    assert "heads int 8" in text and "Source:" in text
    assert "did you mean 'efla'?" in call("list", "mixers", "elfa", code=2).stderr
    assert "is for mixers" in call("list", "mixers", "efla", "--at", "width=8", code=2).stderr


def test_phrases_are_cut_where_their_sense_allows():
    assert phrase("Short.", 20) == "Short"
    assert phrase("A list of tokens, and then more of them.", 20) == "A list of tokens"
    assert phrase("First. Second, third and fourth of them", 20) == "First"
    assert phrase("one two three four five", 12) == "one two"
