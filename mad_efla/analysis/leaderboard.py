"""Scores of a plan: per task the mean over settings, per mixer the mean over tasks, differences.

Every score is a weighted mean of cells (`cells.py`): settings count equally within a task, tasks
equally within a mean. Differences have the same weights, and the same seeds on both sides. Only
mixers that were measured on the same settings and seeds are ranked; of ranked mixers the order of
the means is the sign of the differences. The others are shown, and it is said what they lack.

The reference's rule, best of the grid on test, stands beside under its own name. Protocols are
never mixed: each group has a leaderboard of its own.
"""

import itertools
import math
from typing import NamedTuple

from mad_efla.analysis import statistics
from mad_efla.analysis.cells import Cell, cells, labels, missing_runs
from mad_efla.analysis.statistics import Difference, Interval
from mad_efla.runs.read import Group

METRICS = ("token_accuracy", "macro_accuracy", "sequence_accuracy")


class TaskScore(NamedTuple):
    """A mixer on a task.

    Attributes:
        mixer: The mixer's label.
        task: The task's name.
        accuracy: Mean over settings of test token accuracy, with its interval.
        macro_accuracy: The same of macro accuracy.
        sequence_accuracy: The same of the share of sequences with all answers right; None where it
            was not taken.
        best_on_test: The reference's rule: the same, with the grid point chosen on the test split.
        of_ceiling: Accuracy over what can be answered at all, mean over settings.
        settings: Settings scored.
        seeds: Least number of seeds of a setting.
        missing: What is not there: `2 missing, 1 diverged`; empty if nothing.
        note: What the reader has to know of its seeds and points; mostly empty.
    """

    mixer: str
    task: str
    accuracy: Interval | None
    macro_accuracy: Interval | None
    sequence_accuracy: Interval | None
    best_on_test: float | None
    of_ceiling: float
    settings: int
    seeds: int
    missing: str
    note: str


class MixerScore(NamedTuple):
    """A mixer over all tasks.

    Attributes:
        mixer: The mixer's label.
        average: Mean over tasks, with its interval; None unless every task has a score.
        rank: 1 is the highest mean, ties share the lower number; None where it is not ranked.
        unranked: Why not; empty where it is.
    """

    mixer: str
    average: Interval | None
    rank: int | None
    unranked: str


class Pair(NamedTuple):
    """Two mixers, the one that comes first in the leaderboard named first.

    Attributes:
        first: Label of one.
        second: Label of the other.
        difference: First minus second.
        p_corrected: Of `difference.p`, by Holm's correction over all pairs that have one.
        left_out: What one of them has and the other lacks; empty if nothing.
    """

    first: str
    second: str
    difference: Difference
    p_corrected: float | None
    left_out: str

    @property
    def differ(self) -> bool:
        """Whether both questions allow to say that they differ: the cautious answer.

        Other seeds would say the same (corrected p under .05), and no setting says the opposite.
        """
        d = self.difference
        against = d.losses if d.mean.mean > 0 else d.wins
        return self.p_corrected is not None and self.p_corrected < 0.05 and not against


class Leaderboard(NamedTuple):
    """All numbers of one group.

    Attributes:
        plan: The plan's name.
        protocol: The protocol's name.
        cells: See `cells.cells`; without those of checks.
        checks: Cells of settings that only check that all is well; nothing else counts them.
        tasks: A score for each mixer and task.
        mixers: Ranked ones first, by their mean.
        pairs: Every two mixers that share a setting and a seed.
        notes: What was left out, unreadable or unmatched, in sentences.
    """

    plan: str
    protocol: str
    cells: list[Cell]
    checks: list[Cell]
    tasks: list[TaskScore]
    mixers: list[MixerScore]
    pairs: list[Pair]
    notes: list[str]


def leaderboard(group: Group) -> Leaderboard:
    """Score a group of runs; equal input gives equal output."""
    every = cells(group)
    found = [cell for cell in every if not cell.check]
    tasks = list(dict.fromkeys(cell.task for cell in found))
    names = labels(group)
    missing = missing_runs(group)
    table = [
        _task_score(own, missing.get((name, task), ""))
        for task in tasks
        for name in names
        if (own := [c for c in found if (c.task, c.mixer) == (task, name)])
    ]
    mixers = _mixers(names, tasks, found)
    pairs = [] if group.protocol == "exploring" else _pairs([m.mixer for m in mixers], found)
    return Leaderboard(
        group.plan, group.protocol, found, [c for c in every if c.check], table, mixers, pairs, _notes(group, mixers)
    )


def leaderboards(groups: list[Group]) -> list[Leaderboard]:
    """Score every group but exploring ones.

    Their points were proposed from what earlier ones reached, so that no two mixers were given the
    same.
    """
    return [leaderboard(group) for group in groups if group.protocol != "exploring"]


def _task_score(own: list[Cell], missing: str) -> TaskScore:
    share = [1 / len(own)] * len(own)

    def mean(metric: str) -> Interval | None:
        values = [list(cell.values(metric).values()) for cell in own]
        return statistics.weighted(values, share) if all(values) else None

    of_ceiling = [math.fsum(v := list(c.values().values())) / len(v) / c.ceiling for c in own]
    test = [cell.best_on_test for cell in own if cell.best_on_test is not None]
    return TaskScore(
        own[0].mixer,
        own[0].task,
        *(mean(metric) for metric in METRICS),
        best_on_test=math.fsum(test) / len(test) if test else None,
        of_ceiling=math.fsum(of_ceiling) / len(of_ceiling),
        settings=len(own),
        seeds=min(len(cell.seeds) for cell in own),
        missing=missing,
        note="; ".join(dict.fromkeys(cell.note for cell in own if cell.note)),
    )


def weights(found: list[Cell]) -> dict[str, float]:
    """Return the weight of each condition: tasks count equally, and settings within a task."""
    tasks: dict[str, set[str]] = {}
    for cell in found:
        tasks.setdefault(cell.task, set()).add(cell.condition)
    return {c: 1 / len(tasks) / len(own) for own in tasks.values() for c in own}


def _mixers(names: list[str], tasks: list[str], found: list[Cell]) -> list[MixerScore]:
    shares = weights(found)
    own = {name: [cell for cell in found if cell.mixer == name] for name in names}
    whole = {(c.condition, seed) for c in found for seed in c.seeds}
    scores = []
    for name in names:
        average = None
        if own[name] and {cell.task for cell in own[name]} == set(tasks):
            scale = math.fsum(shares[c.condition] for c in own[name])
            average = statistics.weighted(
                [list(c.values().values()) for c in own[name]], [shares[c.condition] / scale for c in own[name]]
            )
        scores.append(MixerScore(name, average, None, _unranked(own[name], whole)))
    scores.sort(key=lambda m: (bool(m.unranked), -(m.average.mean if m.average else -1), m.mixer))
    ranked = [m.average.mean for m in scores if m.average and not m.unranked]
    return [
        m._replace(rank=1 + sum(other > m.average.mean for other in ranked)) if m.average and not m.unranked else m
        for m in scores
    ]


def _unranked(own: list[Cell], whole: set[tuple[str, int]]) -> str:
    """Say why a mixer cannot be ranked with the others; empty if it can."""
    if not own:
        return "no run of it is done"
    lacks = len(whole - {(c.condition, seed) for c in own for seed in c.seeds})
    if lacks:
        runs = "run is" if lacks == 1 else "runs are"
        return f"{lacks} {runs} missing that others have, counting settings and seeds"
    if any("not ranked" in cell.note for cell in own):
        return "it shares no grid point with the others"
    return ""


def _pairs(names: list[str], found: list[Cell]) -> list[Pair]:
    shares = weights(found)
    values = {name: {c.condition: c.values() for c in found if c.mixer == name} for name in names}
    pairs = []
    for first, second in itertools.combinations(names, 2):
        difference = statistics.difference(values[first], values[second], shares)
        if difference:
            left_out = _left_out(values[first], values[second])
            pairs.append(Pair(first, second, difference, difference.p, left_out))
    tested = [i for i, pair in enumerate(pairs) if pair.difference.p is not None]
    corrected = statistics.holm([p for i in tested if (p := pairs[i].difference.p) is not None])
    for i, p in zip(tested, corrected, strict=True):
        pairs[i] = pairs[i]._replace(p_corrected=p)
    return pairs


def _left_out(first: dict[str, dict[int, float]], second: dict[str, dict[int, float]]) -> str:
    one, other = ({(c, s) for c, own in x.items() for s in own} for x in (first, second))
    n = len(one ^ other)
    return f"{n} runs that one of them lacks" if n > 1 else "a run that one lacks" if n else ""


def _notes(group: Group, mixers: list[MixerScore]) -> list[str]:
    """Say what a reader of the leaderboard has to know."""
    notes = []
    if group.unreadable:
        first = group.unreadable[0]
        n = len(group.unreadable)
        notes.append(f"{n} run{'s' * (n > 1)} cannot be read: {first.path}: {first.reason}")
    known = {p.fingerprint for p in group.planned}
    gone = sum(f not in known and f not in group.runs for f in group.folders)
    gone -= len({u.path.name for u in group.unreadable} - known)
    if gone > 0:
        notes.append(f"{gone} planned run{'s have' if gone > 1 else ' has'} no folder any more")
    for mixer in mixers:
        if mixer.unranked:
            notes.append(f"{mixer.mixer} is not ranked: {mixer.unranked}")
    if any(m.unranked and "missing" in m.unranked for m in mixers):
        notes.append("the same sweep command makes what is missing")
    return notes
