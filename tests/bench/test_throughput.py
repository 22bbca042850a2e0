"""Ways to make many runs on a device, rehearsed on a CPU; stacked runs learn as single ones."""

import json

import pytest
import torch
from click.testing import CliRunner

from mad_efla.bench import throughput
from mad_efla.cli import cli
from mad_efla.runs.folder import RunFolder
from mad_efla.training import model, step
from mad_efla.training.loop import Loop
from tests.tiny import tiny


def static_steps(runs, tmp_path):
    found = []
    for run in runs:
        folder = RunFolder(tmp_path, run.fingerprint)
        folder.create(run)
        loop = Loop(run, folder, torch.device("cpu"))
        module = loop.model.double()
        found.append(step.Static(module, run.train, run.optim, *loop.splits["train"]))
    return found


@pytest.mark.parametrize("mixer", ["efla", "mamba2"])
def test_stacked_runs_have_the_gradients_and_steps_of_single_ones(tmp_path, mixer):
    fields = {"mixers": [{"name": mixer, "heads": 2}], "optim__lr": 2.0**-7, "optim__weight_decay": 0.1}
    singles = static_steps([tiny(seed=s, **fields) for s in range(3)], tmp_path)
    stacked = throughput.Stacked(singles)
    before = {name: x.detach().clone() for name, x in stacked.parameters.items()}
    rows = torch.stack([torch.arange(16) + 16 * i for i in range(3)])
    losses = stacked.update(rows)
    for i, single in enumerate(singles):
        torch.testing.assert_close(losses[i], single.update(rows[i]), rtol=1e-12, atol=0)
        for name, x in single.module.named_parameters():
            gradient = stacked.parameters[name].grad[i]
            torch.testing.assert_close(gradient, x.grad, rtol=1e-9, atol=1e-13, msg=name)
            moved, wanted = stacked.parameters[name][i] - before[name][i], x - before[name][i]
            # Adam's first step is as long for a gradient of rounding errors as for any other.
            sure = x.grad.abs() > 1e-9
            torch.testing.assert_close(moved[sure], wanted[sure], rtol=1e-5, atol=1e-12, msg=name)


def test_a_norm_of_each_run_is_not_stacked(tmp_path):
    with pytest.raises(ValueError, match="grad_clip: a stacked step has no norm of each run"):
        throughput.Stacked(static_steps([tiny(optim__grad_clip=1.0)], tmp_path))


def test_every_way_is_measured_and_a_plan_estimated(files):
    done = CliRunner().invoke(
        cli,
        [
            "bench",
            "device",
            "task.yaml",
            "--plan",
            "plan.yaml",
            "--set",
            "mixers=[efla]",
            "--set",
            "settings=all",
            "--device",
            "cpu",
            "--seconds",
            "0.01",
            "--at-once",
            "2",
            "--to",
            "lines.jsonl",
        ],
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (files / "lines.jsonl").read_text().splitlines()]
    assert done.output.splitlines() == (files / "lines.jsonl").read_text().splitlines()
    assert [(r["kind"], r.get("how"), r.get("setting"), r["runs"]) for r in rows] == [
        ("steps", "plain", "baseline", 1),
        ("steps", "static", "baseline", 1),
        ("steps", "shared", "baseline", 2),
        ("steps", "stacked", "baseline", 2),
        ("steps", "plain", "vocab_size=10", 1),
        ("estimate", None, None, 4),
    ]
    assert not [r for r in rows if "error" in r]
    assert all(r["steps_per_second"] > 0 for r in rows[:-1])
    assert rows[0]["off_plain"] == 0.0
    assert 0 < rows[1]["off_plain"] < 1e-3
    estimate = rows[-1]
    alone = sum(2 * 20 / rows[i]["steps_per_second"] for i in (0, 4)) / 3600
    assert estimate["steps"] == 80
    assert estimate["hours_alone"] == pytest.approx(alone)
    assert estimate["hours"] == pytest.approx(alone / max(1.0, estimate["gains"]["2 shared"]))


def test_a_way_that_fails_is_a_result(monkeypatch):
    def refuse(*given):
        raise ValueError("no such luck")

    monkeypatch.setattr(model, "build", refuse)
    monkeypatch.setattr(throughput, "_loop", lambda *given: None)
    (row,) = throughput._forms(tiny(), "cpu", 0.01, ["plain"])
    assert row["error"] == "ValueError: no such luck"
