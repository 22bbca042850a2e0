"""The points of a plan: combined, side by side, written out, drawn."""

import numpy as np
import pytest
from scipy import stats

from mad_efla.plan.grid import Range, Sample
from tests.plan.test_expand import expanded, refused
from tests.tiny import PLAN


def runs(tmp_path, text, sets=()):
    return expanded(tmp_path, plan=PLAN + text, sets=["seeds=[0]", "mixers=[efla]", *sets]).runs


def values(found):
    return [(r.optim.lr, r.optim.weight_decay) for r in found]


def test_zip_walks_side_by_side_and_grid_combines(tmp_path):
    text = "zip: {optim.lr: [0.1, 0.2], optim.weight_decay: [0.0, 0.5]}\ngrid: {model.depth: [2, 4]}\n"
    found = runs(tmp_path, text)
    assert sorted((r.model.depth, r.optim.lr, r.optim.weight_decay) for r in found) == [
        (2, 0.1, 0.0),
        (2, 0.2, 0.5),
        (4, 0.1, 0.0),
        (4, 0.2, 0.5),
    ]


def test_cells_are_taken_as_written(tmp_path):
    text = "cells: [{optim.lr: 0.1, optim.weight_decay: 0.3}, {optim.lr: 0.2}]\n"
    assert values(runs(tmp_path, text)) == [(0.1, 0.3), (0.2, 0.0)]


def test_set_settles_a_field_wherever_it_is_varied(tmp_path):
    text = "zip: {optim.lr: [0.1, 0.2], optim.weight_decay: [0.0, 0.5]}\n"
    assert values(runs(tmp_path, text, ["optim.lr=0.7"])) == [(0.7, 0.0), (0.7, 0.5)]
    text = "cells: [{optim.lr: 0.1}, {optim.lr: 0.2}]\n"
    assert values(runs(tmp_path, text, ["optim.lr=0.7"])) == [(0.7, 0.0)]
    text = "sample: {method: random, count: 3, over: {optim.lr: {log: [1e-4, 1e-2]}}}\n"
    assert values(runs(tmp_path, text, ["optim.lr=0.7"])) == [(0.7, 0.0)]


def test_samples_are_the_same_for_every_mixer_and_every_call(tmp_path):
    text = "sample: {method: sobol, count: 4, over: {optim.lr: {log: [1e-4, 1e-2]}}}\n"
    first = expanded(tmp_path, plan=PLAN + text, sets=["seeds=[0]"]).runs
    by_mixer = {m: [r.optim.lr for r in first if r.mixer == m] for m in {r.mixer for r in first}}
    assert len(by_mixer) == 2
    one, two = by_mixer.values()
    assert one == two
    assert len(set(one)) == 4
    assert [r.fingerprint for r in first] == [
        r.fingerprint for r in expanded(tmp_path, plan=PLAN + text, sets=["seeds=[0]"]).runs
    ]


@pytest.mark.parametrize("method", ["random", "sobol"])
def test_draws_follow_their_ranges(method):
    over = {
        "log": Range(log=(1e-4, 1e-1)),
        "uniform": Range(uniform=(2.0, 3.0)),
        "integer": Range(integer=(3, 6)),
        "choice": Range(choice=["a", "b"]),
    }
    drawn = Sample(method=method, count=1024, seed=1, over=over).draw()
    logs = np.log10([p["log"] for p in drawn])
    assert stats.kstest(logs, stats.uniform(-4, 3).cdf).pvalue > 1e-3
    assert stats.kstest([p["uniform"] for p in drawn], stats.uniform(2, 1).cdf).pvalue > 1e-3
    counts = np.unique([p["integer"] for p in drawn], return_counts=True)
    assert counts[0].tolist() == [3, 4, 5, 6]
    assert stats.chisquare(counts[1]).pvalue > 1e-3
    assert {p["choice"] for p in drawn} == {"a", "b"}
    assert drawn != Sample(method=method, count=1024, seed=2, over=over).draw()


def test_sobol_fills_every_part_of_a_range():
    sample = Sample(method="sobol", count=16, over={"x": Range(uniform=(0.0, 1.0))})
    assert sorted(int(16 * p["x"]) for p in sample.draw()) == list(range(16))


def test_unmatched_grids_are_refused_unless_they_are_called_so(tmp_path):
    text = "grid: {optim.lr: [0.1, 0.2]}\nper_mixer: {efla: {optim.lr: [0.3]}}\n"
    message = refused(tmp_path, plan=PLAN + text)
    assert "plan.yaml:11: per_mixer gives mixers grids of their own" in message
    custom = PLAN.replace("protocol: custom\n", "") + text + "unmatched: true\n"
    found = expanded(tmp_path, plan=custom, sets=["seeds=[0]"])
    assert found.protocol == "unmatched"
    assert {(r.mixer.split("(")[0], r.optim.lr, r.protocol) for r in found.runs} == {
        ("efla", 0.3, "unmatched"),
        ("deltanet", 0.1, "unmatched"),
        ("deltanet", 0.2, "unmatched"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {optim.lr: [1.0]}\nzip: {optim.lr: [2.0]}\n", "optim.lr is varied in grid and in zip"),
        ("zip: {optim.lr: [1.0], optim.weight_decay: [0.0, 0.1]}\n", "equally many values"),
        ("zip: {optim.lr: []}\n", "zip.optim.lr=[] must list at least one value"),
        (
            "search: {method: tpe, trials: 3, over: {mixers.efla.heads: {choice: [1, 2]}}}\n",
            "search.over.mixers.efla.heads: a search ranges over what all mixers share",
        ),
        ("grid: {optim.lr: []}\n", "grid.optim.lr=[] must list at least one value"),
        ("grid: {optim.lr: [x]}\n", 'plan.yaml:10: optim.lr="x"'),
        ("cells: [{optim.rl: 1.0}]\n", "optim.rl: unknown key; did you mean 'lr'?"),
        (
            "grid: {optim.lr: [0.1]}\nper_mixer: {eflaa: {optim.lr: [0.3]}}\nunmatched: true\n",
            "per_mixer.eflaa: no such mixer; did you mean 'efla'?",
        ),
        (
            "grid: {optim.lr: [0.1]}\nper_mixer: {efla: {model.depth: [2]}}\nunmatched: true\n",
            "must list values for a field of grid",
        ),
        ("sample: {method: sobol, count: 3, over: {optim.lr: {log: [1, 2]}}}\n", "power of two"),
        ("sample: {method: random, count: 2, over: {optim.lr: {log: [0, 2]}}}\n", "above zero"),
        ("sample: {method: random, count: 2, over: {optim.lr: {log: [2, 1]}}}\n", "must rise"),
        ("sample: {method: random, count: 2, over: {optim.lr: {}}}\n", "must be one of uniform"),
        ("sample: {method: halton, count: 2, over: {optim.lr: {log: [1, 2]}}}\n", "'random' or 'sobol'"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(tmp_path, text, message):
    found = refused(tmp_path, plan=PLAN + text)
    assert message in found
    assert "plan.yaml:1" in found
