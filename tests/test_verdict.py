"""The count of ten verdicts, on boards whose truth is known."""

import numpy as np

from mad_efla.analysis.leaderboard import leaderboard
from mad_efla.runs.read import of_runs
from tests.analysis.test_cells import done
from tests.tiny import tiny
from tests.verdict import count


def boards(means, spread, sets=10, seeds=5):
    rng, found = np.random.default_rng(0), []
    for i in range(sets):
        runs, results = [], {}
        for mixer, mean in means.items():
            for seed in range(seeds):
                run = tiny(mixers=[mixer], seed=100 * i + seed)
                runs.append(run)
                value = float(np.clip(rng.normal(mean, spread), 0, 1))
                results[run.fingerprint] = done(run, value, value)
        found.append(leaderboard(of_runs(runs, results)))
    return found


def test_mixers_far_apart_give_one_order_and_true_differences():
    found = count(boards({"efla": 0.8, "deltanet": 0.6, "mamba2": 0.3}, 0.02))
    assert (found.orders, found.sets, found.called, found.wrong, found.pairs) == (0, 10, 30, 0, 30)
    assert found.intervals == 30
    assert found.covered >= 26


def test_a_set_that_turns_a_settled_order_round_is_counted():
    found = boards({"efla": 0.8, "deltanet": 0.6}, 0.02)
    turned = boards({"efla": 0.5, "deltanet": 0.7}, 0.02, sets=1)
    result = count([*found, *turned])
    assert (result.orders, result.wrong, result.called) == (1, 1, 11)
    assert result.covered < result.intervals


def test_the_order_of_mixers_that_nothing_tells_apart_is_no_error():
    found = count(boards({"efla": 0.7, "deltanet": 0.7}, 0.05))
    assert found.orders == 0
    assert found.wrong == found.called
