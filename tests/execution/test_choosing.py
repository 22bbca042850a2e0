"""Choose on seeds of its own, then measure the chosen point on others."""

import json

import pytest

from mad_efla.analysis.leaderboard import leaderboard
from mad_efla.config import ConfigError
from mad_efla.execution.choosing import decided, named
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import load, of_planned
from tests.analysis.test_cells import done
from tests.cli.test_cli import call
from tests.plan.test_expand import expanded
from tests.tiny import PLAN, write_files

CHOOSE = PLAN + "grid: {optim.lr: [1e-4, 1e-2, 3e-2]}\nchoose: {seeds: [100]}\n"
SWEEP = ["sweep", "task.yaml", "--plan", "plan.yaml", "--no-tracking"]


def finish(out, run, accuracy):
    folder = RunFolder(out, run.fingerprint)
    folder.create(run)
    folder.finish(done(run, accuracy, accuracy))


def test_the_grid_is_made_on_its_own_seeds_and_one_point_on_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = expanded(tmp_path, CHOOSE)
    assert {(r.optim.lr, r.seed) for r in sweep.runs} == {(lr, 100) for lr in (1e-4, 1e-2, 3e-2)}
    assert decided(sweep, tmp_path).runs == sweep.runs
    efla, deltanet = sweep.runs[:3], sweep.runs[3:]
    for run, accuracy in zip(efla, (0.2, 0.7, 0.9), strict=True):
        finish(tmp_path, run, accuracy)
    found = decided(sweep, tmp_path)
    assert [(r.mixer, r.optim.lr, r.seed) for r in found.runs[6:]] == [
        ("efla(heads=2)", 3e-2, 0),
        ("efla(heads=2)", 3e-2, 1),
    ]
    for run, accuracy in zip(deltanet, (0.2, 0.9, 0.1), strict=True):
        finish(tmp_path, run, accuracy)
    found = decided(found, tmp_path)
    assert [r.optim.lr for r in found.runs[6:]] == [3e-2, 3e-2, 1e-2, 1e-2]
    assert found.id == sweep.id


def test_a_point_that_failed_for_good_does_not_hold_up_the_choice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = expanded(tmp_path, CHOOSE)
    first, *others = sweep.runs[:3]
    folder = RunFolder(tmp_path, first.fingerprint)
    folder.create(first)
    folder.fail("failed", "ValueError: no", "")
    for run in others:
        finish(tmp_path, run, 0.5)
    assert {r.optim.lr for r in decided(sweep, tmp_path).runs[6:]} == {1e-2}


def test_a_sweep_chooses_measures_and_makes_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    (tmp_path / "plan.yaml").write_text(CHOOSE)
    dry = call(*SWEEP, "--dry-run").stdout
    assert "these choose, on seeds [100]; then the chosen point of each of 2 cells" in dry
    assert "10 runs, 0 of them done" in dry
    table = call(*SWEEP, "--workers", "0").stdout
    made = sorted(p.parent.name for p in tmp_path.glob("runs/*/result.json"))
    assert len(made) == 10
    (group,) = load(tmp_path / "runs")
    assert sum(p.chooses for p in group.planned) == 6
    (board,) = json.loads(call("score", "--json").stdout)
    assert [cell["seeds"] for cell in board["cells"]] == [[0, 1], [0, 1]]
    assert all(cell["missing"] == "" for cell in board["cells"])
    times = {f: (tmp_path / "runs" / f / "result.json").stat().st_mtime_ns for f in made}
    assert call(*SWEEP, "--workers", "0").stdout == table
    assert {f: (tmp_path / "runs" / f / "result.json").stat().st_mtime_ns for f in made} == times


def test_a_choice_that_is_interrupted_shows_no_seed_that_chose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    (tmp_path / "plan.yaml").write_text(CHOOSE)
    call(*SWEEP, "--workers", "0")
    for run in load(tmp_path / "runs")[0].runs.values():
        if run.seed != 100:
            (tmp_path / "runs" / run.fingerprint / "result.json").unlink()
    (board,) = json.loads(call("score", "--json").stdout)
    assert board["cells"] == []


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (CHOOSE.replace("[100]", "[1]"), r"share \[1\]; a seed that chose must not be measured"),
        (CHOOSE.replace("[100]", "[]"), "at least 1 item"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, monkeypatch, plan, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=why):
        expanded(tmp_path, plan)


def test_a_grid_that_set_has_settled_leaves_nothing_to_choose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = expanded(tmp_path, CHOOSE, sets=["optim.lr=0.005"])
    assert {(r.optim.lr, r.seed) for r in sweep.runs} == {(0.005, 0), (0.005, 1)}
    assert not sweep.measured


CHECKED = CHOOSE + "checks: {recall: {easy: {task.seq_len: 6, train.steps: 10}}}\n"


def test_a_check_is_made_once_without_the_grid_and_takes_no_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = expanded(tmp_path, CHECKED)
    checks = [r for r in sweep.runs if r.fingerprint in sweep.checks]
    assert [(r.mixer, r.setting, r.seed, r.optim.lr, r.steps) for r in checks] == [
        ("efla(heads=2)", "easy", 0, 1e-2, 10),
        ("deltanet(heads=2)", "easy", 0, 1e-2, 10),
    ]
    for run in sweep.runs:
        finish(tmp_path, run, 0.5)
    found = decided(sweep, tmp_path)
    assert [r.fingerprint for r in found.runs[-2:]] == [r.fingerprint for r in checks]
    assert found.id == sweep.id
    results = {r.fingerprint: done(r, 0.5, 0.5) for r in found.runs}
    board = leaderboard(of_planned(named(found), found.runs, results))
    assert [(c.setting, c.mixer, c.seeds) for c in board.checks] == [
        ("easy", "efla(heads=2)", [0]),
        ("easy", "deltanet(heads=2)", [0]),
    ]
    assert {c.setting for c in board.cells} == {"baseline"}
    assert [t.settings for t in board.tasks] == [1, 1]
    assert not any("rank" in note for note in board.notes)


def test_a_sweep_prints_its_verdict_above_a_table_with_the_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    (tmp_path / "plan.yaml").write_text(CHECKED)
    text = call(*SWEEP).stdout
    assert text.index("over 2 seeds at one setting") < text.index("easy (chec")
