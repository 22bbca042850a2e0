"""An archive holds what runs left, stands wherever their folder does, and is the same twice."""

import json
import shutil
from pathlib import Path

import pandas
import pyarrow
import pytest
from pyarrow import parquet

import mad_efla as mad
from mad_efla.analysis.leaderboard import leaderboards
from mad_efla.config import ConfigError
from mad_efla.reporting import export
from mad_efla.runs import archive
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import load
from tests.cli.test_cli import call
from tests.tiny import write_files

SWEEP = ["sweep", "task.yaml", "--plan", "plan.yaml", "--no-tracking", "--workers", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_files(folder)
        call(*SWEEP)
        done = call("archive", "runs", "--to", "kept/all.parquet")
        assert done.stdout == "kept/all.parquet: 4 runs\n"
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_numbers_of_an_archive_are_those_of_its_folder(here):
    folder, kept = (export.as_json(leaderboards(load(Path(p)))) for p in ("runs", "kept/all.parquet"))
    assert folder == kept
    assert call("score", "kept/all.parquet").stdout == call("score", "runs").stdout
    text = call("results", "kept/all.parquet").stdout
    assert "## plan" in text
    assert "4 of 4 done" in text


def test_equal_runs_give_equal_bytes_and_an_archive_archived_is_itself(here):
    first = Path("kept/all.parquet").read_bytes()
    call("archive", "runs", "--to", "kept/again.parquet")
    call("archive", "kept/all.parquet", "--to", "kept/third.parquet")
    assert Path("kept/again.parquet").read_bytes() == first
    assert Path("kept/third.parquet").read_bytes() == first


def test_a_row_a_run_that_others_can_read(here):
    table = pandas.read_parquet("kept/all.parquet").set_index("fingerprint")
    runs = mad.load("runs")
    frame = runs.frame()
    assert table["test_token_accuracy"].to_dict() == frame.test_token_accuracy.to_dict()
    assert set(table["optim.lr"]) == {0.01}
    row = table.iloc[0]
    folder = RunFolder(here / "runs", row.name)
    assert json.loads(row.config)["train"] == json.loads((folder.path / "config.json").read_text())["train"]
    assert {c["metric"] for c in row.curves} == {m for r in folder.rows()[0] for m in r.metrics}
    assert json.loads(row.environment) == folder.result().environment
    assert str(here) not in Path("kept/all.parquet").read_bytes().decode("latin-1")


def test_the_curves_and_configurations_come_back_whole(here):
    for fingerprint, run in archive.Archive(Path("kept/all.parquet")).runs.items():
        folder = RunFolder(here / "runs", fingerprint)
        assert run.run() == folder.run()
        assert run.result() == folder.result()
        assert run.rows()[0] == folder.rows()[0]
        with pytest.raises(ConfigError, match="archived without weights"):
            run.load_model()


def test_a_sweep_does_not_make_what_is_known(here):
    shutil.rmtree("runs")
    call(*SWEEP, "--known", "kept/all.parquet")
    assert len(list(Path("runs").glob("*/result.json"))) == 4
    assert not list(Path("runs").glob("*/model.pt"))  # nothing was trained
    call("archive", "runs", "--to", "kept/again.parquet")
    one, other = (pandas.read_parquet(f"kept/{n}.parquet") for n in ("all", "again"))
    assert one.result.tolist() == other.result.tolist()


def test_part_of_a_folder_and_an_archive_are_read_together(here):
    shutil.rmtree(next(p.parent for p in Path("runs").glob("*/result.json")))
    both = mad.load("runs", "kept/all.parquet")
    assert len(both) == 4
    assert set(both.status) == {"finished"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such archive"),
        (b"PAR1 not at all", "cannot be read as an archive"),
        ("half", "cannot be read as an archive"),
        ("foreign", "is a table, but no archive of runs"),
        ("newer", "of version 99, and this mad-efla reads up to 1"),
    ],
)
def test_what_is_no_archive_of_ours_is_a_sentence(here, content, said):
    file = here / "other.parquet"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "half":
        whole = Path("kept/all.parquet").read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif content == "foreign":
        pandas.DataFrame({"a": [1]}).to_parquet(file)
    elif content == "newer":
        table = parquet.read_table("kept/all.parquet")
        parquet.write_table(table.replace_schema_metadata({"mad_efla": '{"version": 99, "records": []}'}), file)
    done = call("score", "other.parquet", code=2)
    assert said in done.stderr


def test_only_what_is_done_is_kept(here):
    for path in Path("runs").glob("*/result.json"):
        path.unlink()
    done = call("archive", "runs", "--to", "none.parquet", code=2)
    assert "none of these runs is done" in done.stderr
    assert not Path("none.parquet").exists()


def test_runs_of_other_numbers_are_named_and_not_pooled(here):
    table = parquet.read_table("kept/all.parquet")
    column = table.column_names.index("config")
    other = [text.replace('"batch_size": 16', '"batch_size": 8') for text in table["config"].to_pylist()]
    parquet.write_table(table.set_column(column, "config", pyarrow.array(other)), "kept/other.parquet")
    (group,) = load(Path("kept/other.parquet"))
    assert not group.results
    assert len(group.unreadable) == 4
    assert "was made by another version (numbers=" in group.unreadable[0].reason
