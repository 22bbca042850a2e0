"""The loop: what it learns, what it writes, and that it can be stopped anywhere."""

import itertools
import math

import pytest
import torch

from mad_efla.mixers.delta import Delta
from mad_efla.plan import expand
from mad_efla.plan.run import OptimConfig
from mad_efla.runs.folder import RunFolder
from mad_efla.spectrum import training_scalars
from mad_efla.training import loop, model
from mad_efla.training.loop import Interrupted, Loop, learning_rate
from tests.tiny import tiny


def folder_of(run, tmp_path, name="runs"):
    folder = RunFolder(tmp_path / name, run.fingerprint)
    folder.create(run)
    return folder


def finish(run, folder, stops=()):
    """Train to the end, stopped on the way, each time after so many more steps."""
    for stop in stops:
        count = iter(range(10_000))
        with pytest.raises(Interrupted):
            loop.train(run, folder, stop=lambda n=stop, c=count: next(c) >= n, look=training_scalars)
    return loop.train(run, folder, look=training_scalars)


def test_a_tiny_run_learns_and_writes_everything(tmp_path):
    run = tiny(train__steps=150, data__train_examples=512, task__vocab_size=6)
    folder = folder_of(run, tmp_path)
    result = finish(run, folder)
    assert result.status == "finished"
    assert result.test.token_accuracy > 0.8
    assert result == folder.result()
    assert result.parameters == sum(p.numel() for p in model.build(run).parameters())
    ran = dict(pair.split(":") for pair in result.environment["backends"].split())
    assert ran.keys() == {"delta_rule", "rms_norm", "short_conv", "swiglu"}
    names = {name for row in folder.rows()[0] for name in row.metrics}
    assert names == {
        "train/loss",
        "train/learning_rate",
        "train/tokens_per_second",
        "val/loss",
        "val/token_accuracy",
        "val/macro_accuracy",
        "val/sequence_accuracy",
        "spectrum/eigenvalue_mean",
        "spectrum/eigenvalue_min",
        "spectrum/eigenvalue_max",
        "spectrum/saturated",
        "spectrum/beyond_euler",
        "spectrum/horizon_p50",
        "spectrum/horizon_beyond",
        "spectrum/state_effective_rank",
        "spectrum/state_capacity_used",
        "spectrum/effective_remembrance_p50",
    }
    weights = folder.load_model()
    assert weights.keys() == model.build(run).state_dict().keys()


def test_two_trainings_end_with_equal_bits(tmp_path):
    run = tiny()
    results = [finish(run, folder_of(run, tmp_path, name)) for name in ("a", "b")]
    first, second = (RunFolder(tmp_path / n, run.fingerprint).load_model() for n in ("a", "b"))
    assert results[0].test == results[1].test
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_looking_at_the_memory_moves_no_bit(tmp_path):
    run = tiny(mixers=["efla", "attention"], model__depth=2)
    finish(run, folder_of(run, tmp_path, "a"))
    loop.train(run, folder_of(run, tmp_path, "b"))
    first, second = (RunFolder(tmp_path / n, run.fingerprint).load_model() for n in ("a", "b"))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(("steps", "every"), [(30, 10), (100, 1), (33, 2)])
def test_the_memory_is_looked_at_evenly_and_at_the_end(tmp_path, steps, every):
    run = tiny(train__steps=steps, train__eval_every=every, train__stop_at=None)
    folder = folder_of(run, tmp_path)
    finish(run, folder)
    rows = [r for r in folder.rows()[0] if "spectrum/horizon_p50" in r.metrics]
    looked = [r.step for r in rows]
    assert looked[-1] == steps
    assert min(steps // every, loop.SPECTRUM_LOGS // 2) <= len(looked) <= loop.SPECTRUM_LOGS + 1
    assert len({b - a for a, b in itertools.pairwise(looked[:-1])}) == 1


def test_a_mixer_that_cannot_tell_of_its_memory_costs_a_warning(tmp_path, monkeypatch):
    run = tiny()
    monkeypatch.setattr(Delta, "dynamics", lambda mixer, x: 1 / 0)
    with pytest.warns(UserWarning, match="no spectrum from step 10 on: ZeroDivisionError"):
        result = finish(run, folder_of(run, tmp_path))
    assert result.status == "finished"


@pytest.mark.parametrize("stops", [(0,), (12,), (3, 0, 14)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, stops, precision):
    run = tiny(train__precision=precision, optim__grad_clip=1.0, train__eval_every=7)
    whole, parts = folder_of(run, tmp_path, "whole"), folder_of(run, tmp_path, "parts")
    expected, result = finish(run, whole), finish(run, parts, stops)
    assert result.test == expected.test
    assert result.chosen_step == expected.chosen_step
    first, second = whole.load_model(), parts.load_model()
    assert all(torch.equal(first[k], second[k]) for k in first)
    curves = [
        [(row.step, {k: v for k, v in row.metrics.items() if "second" not in k}) for row in folder.rows()[0]]
        for folder in (whole, parts)
    ]
    assert curves[0] == curves[1]


def test_the_chosen_weights_are_the_best_on_validation(tmp_path):
    run = tiny(train__steps=40, train__eval_every=5, optim__lr=3e-2)
    folder = folder_of(run, tmp_path)
    result = finish(run, folder)
    curve = {
        row.step: (row.metrics["val/token_accuracy"], -row.metrics["val/loss"])
        for row in folder.rows()[0]
        if "val/loss" in row.metrics
    }
    assert result.chosen_step == max(curve, key=lambda step: curve[step])
    assert result.validation.token_accuracy == max(accuracy for accuracy, _ in curve.values())


def test_the_test_split_is_looked_at_once_unless_the_protocol_says_otherwise(tmp_path, monkeypatch):
    looked = []
    scores = loop.Loop._scores
    monkeypatch.setattr(loop.Loop, "_scores", lambda self, split: looked.append(split) or scores(self, split))
    run = tiny()
    finish(run, folder_of(run, tmp_path))
    assert looked == ["validation"] * 3 + ["test"]  # what is known is not scored again
    looked.clear()
    run = tiny(train__select_split="test", train__select_metric="loss")
    folder = folder_of(run, tmp_path)
    result = finish(run, folder)
    assert looked == ["validation", "test"] * 3
    curve = [r.metrics["test_curve/loss"] for r in folder.rows()[0] if "test_curve/loss" in r.metrics]
    assert result.test.loss == min(curve)


def test_the_last_weights_are_scored_where_nothing_chooses(tmp_path):
    run = tiny(train__select_split="none")
    assert finish(run, folder_of(run, tmp_path)).chosen_step == 30


def test_a_solved_run_stops_early_and_says_so(tmp_path):
    run = tiny(train__stop_at=0.05)
    result = finish(run, folder_of(run, tmp_path))
    assert result.steps == 10
    assert "solved: validation token accuracy" in result.stopped


def test_divergence_is_a_result_with_its_step(tmp_path):
    run = tiny(mixers=[{"name": "delta", "heads": 2, "step": "euler"}], optim__lr=1e4)
    folder = folder_of(run, tmp_path)
    result = finish(run, folder)
    assert result.status == folder.status() == "diverged"
    assert result.test is None
    assert 1 < result.steps <= 30
    assert result.stopped.startswith("loss not finite at step ")
    values = [v for row in folder.rows()[0] for v in row.metrics.values()]
    assert all(math.isfinite(v) for v in values)


def test_answers_are_the_only_targets_unless_the_sequence_is_asked_for(tmp_path):
    losses = []
    for loss in ("answers", "sequence"):
        run = tiny(train__loss=loss)
        loop = Loop(run, folder_of(run, tmp_path), torch.device("cpu"))
        losses.append((loop.splits["train"][1] >= 0).float().mean().item())
    assert 0.2 < losses[0] < 0.5
    assert losses[1] == 1.0


# ------------------------------------------------------------- learning rates


def rates(plan, step_indices):
    run = expand.expand("recall", plan, [], "bfloat16").runs[-1]
    assert (run.optim.lr, run.steps) == (1e-3, 200 * 7)  # 800 examples: 7 batches
    return [learning_rate(run.optim, step, run.steps) for step in step_indices]


def test_mad_anneals_by_a_cosine_to_its_floor():
    first, middle, last = rates("mad", [0, 700, 1399])
    assert first == 1e-3
    assert middle == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-12)
    assert last == pytest.approx(1e-6, rel=2e-3)
    whole = rates("mad", range(1400))
    assert all(a > b for a, b in itertools.pairwise(whole))
    expected = [1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * s / 1400)) / 2 for s in range(1400)]
    assert whole == pytest.approx(expected, rel=1e-12)


def test_mad_lab_never_runs_its_schedule():
    assert set(rates("mad_lab", range(1400))) == {1e-3}


def test_warm_up_rises_to_the_peak():
    optim = OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine", min_lr=0.0)
    got = [learning_rate(optim, s, 8) for s in range(8)]
    assert got[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert got[6] == pytest.approx(0.5)


def test_the_rate_that_is_logged_is_the_rate_that_ran(tmp_path):
    run = tiny(optim__schedule="cosine")
    folder = folder_of(run, tmp_path)
    loop = Loop(run, folder, torch.device("cpu"))
    seen = []
    step = loop.optimizer.step
    loop.optimizer.step = lambda: (seen.append(loop.optimizer.param_groups[0]["lr"]), step())
    loop.steps(lambda: False)
    assert seen == [learning_rate(run.optim, s, 30) for s in range(30)]
    logged = [r.metrics["train/learning_rate"] for r in folder.rows()[0] if "train/loss" in r.metrics]
    assert logged == [seen[9], seen[19], seen[29]]


def test_tokens_per_second_counts_a_short_last_batch_as_what_it_is(tmp_path):
    run = tiny(data__train_examples=40)  # batches of 16, 16 and 8
    found = Loop(run, folder_of(run, tmp_path), torch.device("cpu"))
    found.step = 6
    assert (found._rows(0), found._rows(5), found._rows(3)) == (80, 8, 40)
