"""Exploring: the same trials again, equally many for each mixer, and no score."""

import contextlib
import math
import shutil
import statistics
import sys

import pytest
from click.testing import CliRunner

from mad_efla.analysis.leaderboard import leaderboards
from mad_efla.cli import cli
from mad_efla.config import ConfigError
from mad_efla.execution import pool, search
from mad_efla.execution.costs import Costs
from mad_efla.runs.folder import RunFolder, finished, permanently_failed
from mad_efla.runs.read import of_runs
from mad_efla.runs.schema import Row, SweepRecord
from mad_efla.runs.sweeps import read_sweeps
from mad_efla.training.loop import Interrupted
from tests.plan.test_expand import expanded, refused
from tests.runs.test_folder import result
from tests.tiny import PLAN

SEARCH = (
    PLAN.replace("[0, 1]", "[0]").replace("protocol: custom", "")
    + """
search:
  method: tpe
  trials: 12
  over: {optim.lr: {log: [1e-5, 1e-1]}, optim.betas: {choice: [[0.9, 0.99], [0.9, 0.999]]}}
"""
)
PRUNED = SEARCH + "prune: hyperband\n"


@pytest.fixture
def learns(monkeypatch):
    """Put a rule in the place of training: nothing is learned far from a rate of 1e-3."""

    def train(run, folder, *, stop, **rest):
        best = math.exp(-((math.log10(run.optim.lr) + 3) ** 2))
        for step in range(run.eval_every, run.steps + 1, run.eval_every):
            accuracy = best * step / run.steps
            folder.append([Row(step, step, {"val/token_accuracy": accuracy})])
            if stop():
                folder.save_checkpoint({"step": step})
                raise Interrupted
        folder.finish(result(run.fingerprint, best, steps=run.steps))

    monkeypatch.setattr("mad_efla.execution.attempt.train", train)


def explore(tmp_path, plan=SEARCH, out="runs", stop_after=None, retry_failed=False, **sets):
    """Make the trials of a plan in this process; return their runs in order."""
    found = expanded(tmp_path, plan, sets=[f"{k.replace('__', '.')}={v}" for k, v in sets.items()])
    folder = tmp_path / out
    known = {r.id: r for r in read_sweeps(folder)}
    record = known.get(found.id) or SweepRecord(
        id=found.id,
        task=found.task,
        plan=found.plan,
        protocol=found.protocol,
        command="",
        fingerprints=(),
        started=1,
        ended=None,
    )
    work = search.Explore(found, record, folder, Costs([]), retry_failed=retry_failed)
    seen = []

    def watch(events):
        seen.extend(events)
        if stop_after is not None and sum(e.status != "running" for e in seen) >= stop_after:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        pool.perform(work, device="cpu", workers=0, watch=watch)
    (record,) = read_sweeps(folder)
    assert [r.fingerprint for r in work.runs] == list(record.fingerprints)
    return work.runs


def statuses(tmp_path, runs, out="runs"):
    return [RunFolder(tmp_path / out, r.fingerprint).status() for r in runs]


def test_every_mixer_gets_equally_many_trials_and_later_ones_are_better(tmp_path, learns):
    runs = explore(tmp_path, search__trials=30)
    assert {r.protocol for r in runs} == {"exploring"}
    assert set(statuses(tmp_path, runs)) == {"finished"}
    for mixer in ("efla(heads=2)", "deltanet(heads=2)"):
        rates = [r.optim.lr for r in runs if r.mixer == mixer]
        assert len(rates) == len(set(rates)) == 30
        assert all(1e-5 <= rate <= 1e-1 for rate in rates)
        misses = [abs(math.log10(rate) + 3) for rate in rates]
        drawn, proposed = statistics.median(misses[:10]), statistics.median(misses[15:])
        assert proposed < drawn / 2


def test_a_search_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, learns):
    whole = explore(tmp_path, PRUNED, out="whole", train__steps=60)
    for stop in (1, 4, 9, 5, None):
        parts = explore(tmp_path, PRUNED, out="parts", stop_after=stop, train__steps=60)
    assert parts == whole
    assert statuses(tmp_path, parts, "parts") == statuses(tmp_path, whole, "whole")
    more = explore(tmp_path, PRUNED, out="parts", train__steps=60, search__trials=14)
    assert more[: len(whole)] == whole
    assert len(more) == 28


def test_what_lags_behind_is_pruned_with_its_step_and_not_made_again(tmp_path, learns):
    runs = explore(tmp_path, PRUNED, train__steps=120)
    pruned = [r for r, s in zip(runs, statuses(tmp_path, runs), strict=True) if s == "pruned"]
    assert 2 <= len(pruned) < len(runs)
    for run in pruned:
        folder = RunFolder(tmp_path / "runs", run.fingerprint)
        failure = folder.failure()
        assert failure.reason.startswith("at step ")
        assert folder.load_checkpoint()["step"] < 120
        assert folder.result() is None
    assert permanently_failed(tmp_path / "runs", runs) == {r.fingerprint for r in pruned}
    assert explore(tmp_path, PRUNED, train__steps=120) == runs


def test_points_that_cannot_be_built_or_were_had_are_passed_over(tmp_path, learns):
    plan = SEARCH.replace("optim.lr: {log: [1e-5, 1e-1]}", "model.width: {choice: [16, 8]}")
    runs = explore(tmp_path, plan, train__steps=3)
    points = [(r.mixer, r.model.width, r.optim.betas) for r in runs]
    assert len(points) == len(set(points)) == 8  # all there are, though twelve were asked for


def test_depth_can_be_searched_and_a_trial_whose_folder_is_gone_is_made_anew(tmp_path, learns):
    plan = SEARCH.replace("optim.betas: {choice: [[0.9, 0.99], [0.9, 0.999]]}", "model.depth: {integer: [1, 2]}")
    runs = explore(tmp_path, plan, search__trials=4)
    assert {r.model.depth for r in runs} == {1, 2}
    shutil.rmtree(tmp_path / "runs" / runs[2].fingerprint)
    again = explore(tmp_path, plan, search__trials=4)
    assert len(again) == len(runs)
    assert set(runs) - set(again) <= {runs[2]}


def test_exploring_runs_have_no_score(tmp_path, learns):
    runs = explore(tmp_path, search__trials=2)
    results = finished(tmp_path / "runs", [r.fingerprint for r in runs])
    assert len(results) == 4
    assert leaderboards([of_runs(runs, results)]) == []


def test_a_sweep_that_searches_prints_its_best_and_goes_on_in_workers(files):
    (files / "plan.yaml").write_text(PRUNED)
    call = ["sweep", "task.yaml", "--plan", "plan.yaml", "--no-tracking"]
    small = ["--set", "search.trials=2", "--workers", "2"]
    dry = CliRunner().invoke(cli, [*call, *small, "--dry-run"], catch_exceptions=False)
    assert "search tpe: 2 trials like each of these, over optim.lr, optim.betas" in dry.stdout
    done = CliRunner().invoke(cli, [*call, *small], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "protocol exploring" in done.stdout
    assert "lr=" in done.stdout
    again = CliRunner().invoke(cli, [*call, *small], catch_exceptions=False)
    assert again.stdout == done.stdout
    score = CliRunner().invoke(cli, ["score"])
    assert (score.exit_code, "exploring runs only" in score.stderr) == (2, True)
    status = CliRunner().invoke(cli, ["status"], catch_exceptions=False).stdout
    assert "4 runs: " in status
    assert not (files / "runs" / "data").exists()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (SEARCH + "grid: {optim.lr: [1e-3]}\n", "search proposes all points by itself; take out grid"),
        (SEARCH + "protocol: quick\n", "search explores, by a protocol of its own"),
        (SEARCH.replace("seeds: [0]", "seeds: [0, 1]"), "give one of seeds"),
        (PLAN + "prune: hyperband\n", "plan.yaml:10: prune=hyperband ends trials; it needs a search"),
        (SEARCH.replace("tpe", "gp"), "search.method"),
        (SEARCH.replace("optim.lr", "optim.rl"), "optim.rl: unknown key; did you mean 'lr'?"),
        (SEARCH.replace("[1e-5, 1e-1]", "[1, 0.1]"), "must rise from low to high"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, plan, message):
    assert message in refused(tmp_path, plan=plan)


def test_without_optuna_the_cure_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert expanded(tmp_path, SEARCH).search
    with pytest.raises(ConfigError, match=r"pip install 'mad-efla\[search\]'"):
        explore(tmp_path)


def test_trials_that_failed_are_made_again_when_asked(tmp_path, learns, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("mad_efla.execution.attempt.train", lambda run, folder, **rest: 1 / 0)
        runs = explore(tmp_path, search__trials=2)
    assert set(statuses(tmp_path, runs)) == {"failed"}
    assert explore(tmp_path, search__trials=2) == runs
    assert set(statuses(tmp_path, runs)) == {"failed"}
    assert explore(tmp_path, search__trials=2, retry_failed=True) == runs
    assert set(statuses(tmp_path, runs)) == {"finished"}
