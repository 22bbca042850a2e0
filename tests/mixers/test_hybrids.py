"""A model is a list of layers: hybrids from the plan to the table."""

import pytest
import torch

from mad_efla.analysis.cells import cells
from mad_efla.plan import expand
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import of_runs
from mad_efla.training import fits, loop, model
from tests.tiny import PLAN, TASK, tiny

HYBRID = [{"name": "attention", "heads": 2, "window": 4}, {"name": "efla", "heads": 2}]
LABEL = "attention(heads=2, window=4)+efla(heads=2)"


def test_a_list_in_a_plan_trains_and_is_one_row_of_the_table(tmp_path):
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "plan.yaml").write_text(
        PLAN.replace("mixers: [", "mixers: [[{name: attention, heads: 2, window: 4}, ")
        .replace("}, {name: deltanet", "}], {name: deltanet")
        .replace("depth: 1", "depth: 2")
        .replace("[0, 1]", "[0]")
    )
    found = expand.expand("task.yaml", "plan.yaml", [], "float32")
    assert [r.mixer for r in found.runs] == [LABEL, "deltanet(heads=2)"]
    results = {}
    for run in found.runs:
        folder = RunFolder(tmp_path / "runs", run.fingerprint)
        folder.create(run)
        results[run.fingerprint] = loop.train(run, folder)
    hybrid = results[found.runs[0].fingerprint]
    assert hybrid.status == "finished"
    ran = {pair.split(":")[0] for pair in hybrid.environment["backends"].split()}
    assert ran == {"delta_rule", "rms_norm", "short_conv", "swiglu"}
    fit = fits.check(found)
    sizes = {r.mixer: fit.sizes[r.fingerprint] for r in found.runs}
    lines = {line.mixer: line for line in cells(of_runs(found.runs, results))}
    assert lines.keys() == {LABEL, "deltanet(heads=2)"}
    assert lines[LABEL].state_size == hybrid.state_size == sizes[LABEL][1]


def test_the_layers_come_in_order_and_their_states_add_up():
    run = tiny(mixers=HYBRID, model__depth=4)
    built = model.build(run)
    assert [m.config.name for m in built.mixers] == ["attention", "efla"] * 2
    alone = [model.build(tiny(mixers=[fields])).mixers[0].state_size(12) for fields in HYBRID]
    assert alone == [2 * 16 * 3, 2 * 8 * 8 + 48 * 3]
    assert model.state_size(built, 12) == 2 * sum(alone)


def test_every_layer_of_a_hybrid_is_trained():
    built = model.build(tiny(mixers=["attention", "mamba", "identity", "hyena"], model__depth=4))
    built(torch.randint(0, 8, (2, 12))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in built.parameters())


@pytest.mark.parametrize("order", [["attention", "efla"], ["efla", "attention"]])
def test_the_order_of_layers_is_part_of_the_run(order):
    run = tiny(mixers=order, model__depth=2)
    assert run.mixer == "+".join(order)
    assert run.fingerprint != tiny(mixers=order[::-1], model__depth=2).fingerprint
