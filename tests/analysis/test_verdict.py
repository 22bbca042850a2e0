"""The verdict says what the numbers carry, and no more."""

from mad_efla.analysis import verdict
from mad_efla.analysis.leaderboard import leaderboard
from mad_efla.runs.read import of_planned, of_runs
from mad_efla.runs.schema import planned
from tests.analysis.test_cells import done
from tests.tiny import tiny

CHANCE = 0.25


def said(values, *, length=12, rates=(0.01,), chance=CHANCE, checks=(), choosing=None):
    """Return the verdict on `values[mixer]`, test accuracies by seed, at rates where the middle one wins."""
    entries, runs, results = [], [], {}
    for mixer, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            for rate in rates:
                run = tiny(mixers=[mixer], task__seq_len=length, seed=seed, optim__lr=rate, setting="hard")
                best = rate == rates[len(rates) // 2]
                runs.append(run)
                entries.append(planned(run))
                results[run.fingerprint] = done(run, accuracy if best else 0.9 * accuracy, accuracy, chance=chance)
    for mixer, accuracy in dict(checks).items():
        run = tiny(mixers=[mixer], task__seq_len=6, setting="easy")
        runs.append(run)
        entries.append(planned(run, check=True))
        results[run.fingerprint] = done(run, accuracy, accuracy, chance=chance)
    return verdict.sentences(leaderboard(of_planned(entries, runs, results)))


def joined(values, **fields):
    return " ".join(said(values, **fields))


CLEAR = {"efla": (0.91, 0.92, 0.93, 0.92, 0.91), "deltanet": (0.80, 0.82, 0.81, 0.80, 0.82)}
CLOSE = {"efla": (0.91, 0.92, 0.93, 0.92, 0.91), "deltanet": (0.92, 0.90, 0.91, 0.93, 0.90)}


def test_a_leader_is_named_with_its_distance_its_interval_and_the_seeds():
    first = said(CLEAR)[0]
    assert first.startswith("efla leads with 91.8 % [90.8, 92.8] over 5 seeds at one setting: 10.8 points [")
    assert "above deltanet, the next (p " in first
    assert "Holm" in first


def test_a_difference_that_other_seeds_might_turn_round_is_not_settled():
    first = said(CLOSE)[0]
    assert "efla and deltanet are not told apart" in first
    assert "which is not settled" in first
    assert "leads" not in first


def test_who_is_behind_for_sure_is_still_named_where_the_first_two_are_close():
    lines = said(CLOSE | {"attention": (0.6, 0.61, 0.62, 0.6, 0.61)})
    assert any(line.startswith("efla leads attention by 31.0 points") for line in lines)


def test_with_one_seed_nothing_is_settled():
    text = joined({"efla": (0.9,), "deltanet": (0.5,)})
    assert "A single seed has no interval, so nothing is settled" in text
    assert "leads" not in text


def test_a_mixer_at_chance_is_shown_with_what_guessing_gives_and_what_was_tried():
    values = CLEAR | {"mamba2": (0.26, 0.27, 0.25, 0.26, 0.26)}
    text = joined(values, rates=(0.001, 0.01, 0.1), checks={"mamba2": 0.99, "efla": 1.0})
    assert (
        "mamba2 stays at chance at all 3 learning rates within 30 steps: 27.0 %, where guessing gives 25.0 %. "
        "The easy check it answers to 99.0 %. This says nothing of what it learns with more." in text
    )
    assert "deltanet by" not in text.split("mamba2")[1]


def test_a_rate_that_learned_elsewhere_is_not_called_chance_at_all_rates():
    run = {lr: tiny(optim__lr=lr, mixers=["mamba2"]) for lr in (0.001, 0.01)}
    results = {
        run[0.001].fingerprint: done(run[0.001], 0.26, 0.26, chance=CHANCE),
        run[0.01].fingerprint: done(run[0.01], 0.9, 0.26, chance=CHANCE),
    }
    text = " ".join(verdict.sentences(leaderboard(of_runs(run.values(), results))))
    assert "stays at chance at its chosen learning rate" in text


def test_where_the_chance_level_is_not_known_nobody_is_said_to_be_at_it():
    assert "chance" not in joined({"efla": (0.1, 0.1), "deltanet": (0.2, 0.21)}, chance=None)


def test_one_rate_for_all_is_said_to_confound():
    assert "Every mixer had one learning rate, 0.01" in joined(CLEAR)


def test_rates_chosen_on_the_measured_seeds_and_rates_at_an_edge_are_said():
    text = joined(CLEAR, rates=(0.01, 0.02, 0.03))
    assert "chosen on the seeds that are measured" in text
    assert "may do better" not in text
    text = joined(CLEAR, rates=(0.01, 0.02))
    assert "The largest learning rate tried was chosen for efla (0.02) and deltanet (0.02)" in text


def test_a_seed_that_learned_late_is_named():
    text = joined(CLEAR | {"deltanet": (0.80, 0.82, 0.81, 0.2, 0.82)})
    assert "deltanet: 1 of 5 seeds at hard (least 20.0 %) learned later than the others" in text


def test_a_check_counts_in_no_score_and_a_failed_one_is_told():
    lines = said(CLEAR, checks={"efla": 1.0, "deltanet": 0.5})
    assert lines[0] == said(CLEAR)[0]
    assert any("The easy check is not solved by deltanet (50.0 %)" in line for line in lines)


def test_settings_that_disagree_forbid_a_lead():
    runs, results = [], {}
    for mixer, by_length in {"efla": (0.9, 0.3), "deltanet": (0.5, 0.4)}.items():
        for length, accuracy in zip((8, 12), by_length, strict=True):
            for seed in range(5):
                run = tiny(mixers=[mixer], task__seq_len=length, seed=seed, setting=f"L{length}")
                runs.append(run)
                results[run.fingerprint] = done(run, 0.9, accuracy + 0.001 * (seed * (1 + len(mixer)) % 5), chance=0.1)
    lines = verdict.sentences(leaderboard(of_runs(runs, results)))
    assert "not told apart" in lines[0]
    assert "ahead of deltanet at 1 and behind at 1" in " ".join(lines)


def test_nothing_is_said_of_nothing():
    assert verdict.sentences(leaderboard(of_runs([tiny()], {}))) == [
        "efla(heads=2) is not ranked: no run of it is done."
    ]
