"""`mad-efla data` and `mad-efla bench data`: the generators without the trainer."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from mad_efla.cli import cli
from mad_efla.config import ConfigError
from mad_efla.plan import expand
from mad_efla.training import data

FILE = """
task: {name: memorization, vocab_size: 32, seq_len: 8}
data: {train_examples: 64, validation_examples: 16, test_examples: 16}
vary:
  task.vocab_size: [64, 128]
  data.train_examples: [32]
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "task.yaml").write_text(FILE)
    return tmp_path


def call(*arguments, code=0):
    done = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def test_data_writes_what_training_would_see(file):
    done = call("data", "task.yaml", "--out", "out", "--seed", "3")
    names = [f"memorization-baseline-seed3-{s}.npz" for s in ("test", "validation", "train")]
    assert done.stdout.split() == [f"out/{name}" for name in names]
    assert sorted(p.name for p in (file / "out").iterdir()) == sorted(names)
    (baseline, *_) = expand.settings("task.yaml")
    made = data.make(baseline.task, 3, baseline.data)
    for split in data.SPLITS:
        with np.load(file / "out" / f"memorization-baseline-seed3-{split}.npz") as found:
            assert set(found) == {"inputs", "targets", "config", "version", "digest"}
            assert found["inputs"].dtype == np.int8
            assert np.array_equal(found["inputs"], getattr(made, split).inputs)
            assert np.array_equal(found["targets"], getattr(made, split).targets)
            assert str(found["digest"]) == made.digest
            assert int(found["version"]) == type(baseline.task).version
            assert json.loads(str(found["config"])) == {
                "task": {"name": "memorization", "vocab_size": 32, "seq_len": 8},
                "data": {"train_examples": 64, "validation_examples": 16, "test_examples": 16},
                "seed": 3,
                "setting": "baseline",
                "split": split,
            }


def test_recall_comes_with_the_plain_next_tokens(file):
    call("data", "recall", "--out", "out", "--split", "test", "--set", "data.train_examples=8")
    with np.load(file / "out" / "recall-baseline-seed0-test.npz") as found:
        assert np.array_equal(found["next_tokens"][:, :-1], found["inputs"][:, 1:])


@pytest.mark.parametrize(
    ("which", "labels"),
    [
        ("all", ["baseline", "vocab_size=64", "vocab_size=128", "train_examples=32"]),
        ("0", ["baseline"]),
        ("2", ["vocab_size=128"]),
        ("vocab_size=64", ["vocab_size=64"]),
    ],
)
def test_a_setting_is_chosen_by_label_or_number(file, which, labels):
    done = call("data", "task.yaml", "--out", "out", "--setting", which, "--split", "train")
    assert done.stdout.split() == [f"out/memorization-{label}-seed0-train.npz" for label in labels]


def test_an_override_holds_in_every_setting_and_ends_the_changes_of_its_field(file):
    settings = expand.settings("task.yaml", ["task.vocab_size=40"])
    assert [s.label for s in settings] == ["baseline", "train_examples=32"]
    assert all(s.task.vocabulary == 40 for s in settings)


def test_fields_may_change_together(file):
    text = FILE + "  together:\n    - {task.vocab_size: 64, data.train_examples: 16}\n"
    (file / "task.yaml").write_text(text)
    *_, last = expand.settings("task.yaml")
    assert last.label == "vocab_size=64,train_examples=16"
    assert (last.task.vocabulary, last.data.train_examples) == (64, 16)
    labels = [s.label for s in expand.settings("task.yaml", ["data.train_examples=8"])]
    assert labels == ["baseline", "vocab_size=64", "vocab_size=128"]


def test_equal_seeds_give_equal_files_and_a_file_is_replaced_whole(file):
    for folder in ("a", "b", "b"):
        call("data", "task.yaml", "--out", folder)
    names = sorted(p.name for p in (file / "a").iterdir())
    assert names == sorted(p.name for p in (file / "b").iterdir())
    for name in names:
        assert (file / "a" / name).read_bytes() == (file / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setting", "vocab_siz=64"], "--setting vocab_siz=64: must be all, 0 to 3, or a label"),
        (["--setting", "4"], "--setting 4: must be all, 0 to 3"),
        (["--set", "optim.lr=1"], "optim.lr: data has only fields of `task` and `data`"),
        (["--set", "task.vocab_size=4"], "task.vocab_size=4 must be at least 5"),
        (["--set", "task.vocabulary=4"], "unknown key; did you mean 'vocab_size'?"),
        (["--set", "data.test_examples=0"], "data.test_examples=0"),
        (["--out", "task.yaml/below"], "Not a directory"),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line(file, arguments, message):
    done = call("data", "task.yaml", "--out", "out", *arguments, code=2)
    assert message in done.stderr
    assert not (file / "out").exists()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(file, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    (baseline, *_) = expand.settings("task.yaml")
    with pytest.raises(ConfigError, match="No space left on device; name another --out"):
        list(data.save(file / "out", baseline.task, 0, baseline.data, "baseline", ["test"]))
    assert list((file / "out").iterdir()) == []


def test_bench_data_prints_a_row_for_each_setting(file):
    done = call("bench", "data", "task.yaml", "--rounds", "2")
    rows = [line for line in done.stdout.splitlines() if "memorization" in line]
    assert len(rows) == 4
    assert "seconds" in done.stdout
    assert "ceiling" in done.stdout
