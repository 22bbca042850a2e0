"""Costs are what was seen of the most similar runs."""

import pytest

from mad_efla.execution.costs import Costs, estimate
from mad_efla.runs.folder import RunFolder
from tests.runs.test_folder import result
from tests.tiny import tiny

MAMBA = [{"name": "mamba2", "heads": 2}]


def seen(costs, run, seconds, steps=None):
    costs.observe_result(run.fingerprint, result(run.fingerprint, seconds=seconds, steps=steps or run.steps))


def test_costs_come_from_the_most_similar_runs_seen():
    done, seed, rate = tiny(), tiny(seed=1), tiny(optim__lr=0.5)
    longer, shorter = tiny(train__steps=60), tiny(train__steps=60, task__seq_len=24)
    other = tiny(mixers=MAMBA)
    costs = Costs([done, seed, rate, longer, shorter, other])
    assert costs.seconds(done.fingerprint) is None
    seen(costs, done, 10.0)
    seen(costs, rate, 20.0)
    assert costs.seconds(seed.fingerprint) == 15.0  # alike: the mean
    per_token = 30.0 / (2 * costs.tokens(done.fingerprint))
    assert costs.seconds(longer.fingerprint) == pytest.approx(per_token * costs.tokens(longer.fingerprint))
    assert costs.seconds(other.fingerprint) == pytest.approx(15.0)  # the median of other mixers
    assert not costs.is_seen(other.fingerprint)
    seen(costs, longer, 100.0)
    assert costs.seconds(longer.fingerprint) == 100.0
    near = costs.seconds(shorter.fingerprint)
    assert near == pytest.approx(130.0 / 4 * costs.tokens(shorter.fingerprint) / costs.tokens(done.fingerprint))


def test_a_run_that_stopped_early_is_cheap_for_its_like_and_not_per_token():
    solved, like, longer = tiny(), tiny(seed=1), tiny(train__steps=300)
    costs = Costs([solved, like, longer])
    seen(costs, solved, 10.0, steps=3)
    assert costs.seconds(like.fingerprint) == 10.0
    assert costs.seconds(longer.fingerprint) == pytest.approx(1000.0)


def test_the_pace_of_what_runs_counts_until_one_has_finished():
    run, like = tiny(), tiny(train__steps=60)
    costs = Costs([run, like])
    costs.observe_rate(run.fingerprint, 100.0)
    assert costs.seconds(like.fingerprint) == costs.tokens(like.fingerprint) / 100
    seen(costs, run, 5.0)
    costs.observe_rate(run.fingerprint, 1.0)
    assert costs.seconds(like.fingerprint) == pytest.approx(10.0)


def test_the_time_left_is_shared_by_workers_and_no_less_than_the_longest_run():
    runs = [tiny(seed=s, train__steps=n) for s, n in enumerate((30, 30, 300))]
    names = [r.fingerprint for r in runs]
    costs = Costs(runs)
    assert costs.longest(names) == names[2]
    assert costs.seconds_left(names, {}, 2) is None
    seen(costs, runs[0], 10.0)
    assert costs.seconds_left(names, {}, 1) == pytest.approx(120.0)
    assert costs.seconds_left(names, {}, 2) == pytest.approx(100.0)
    assert costs.seconds_left(names[:2], {names[2]: 0.9}, 2) == pytest.approx(15.0)
    assert costs.seconds_left([], {}, 2) == 0.0


def test_an_estimate_says_what_it_rests_on(tmp_path):
    runs = [tiny(), tiny(seed=1), tiny(mixers=MAMBA)]
    sizes = {r.fingerprint: (1000 * (i + 1), 10) for i, r in enumerate(runs)}
    guess = estimate(runs, tmp_path, sizes, 1)
    assert guess.seconds > 0
    assert (guess.done, guess.basis) == (0, "rough: from parameters and matrix speed")
    folder = RunFolder(tmp_path, runs[0].fingerprint)
    folder.create(runs[0])
    folder.finish(result(folder.fingerprint, seconds=4.0))
    assert estimate(runs, tmp_path, sizes, 1)[1:] == (1, "rough: from finished runs of other mixers")
    assert estimate(runs[:2], tmp_path, sizes, 1) == (4.0, 1, "from finished runs")
