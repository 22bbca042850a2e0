"""The verdict: what a leaderboard allows to say, in sentences, and what it leaves open.

Nothing is said that the numbers do not carry. Two mixers differ if `leaderboard.Pair.differ` allows
it: other seeds would say the same, after Holm's correction, and no setting says the opposite. A
mixer stays at chance where every seed has, of what lies between guessing and the ceiling,

    (accuracy - chance) / (ceiling - chance)

less than a twentieth. The sentences stand above every table: in the terminal, the report, the
results page and the sweep's run in MLflow.
"""

from collections.abc import Iterable, Sequence

from mad_efla.analysis.cells import Cell
from mad_efla.analysis.leaderboard import Leaderboard, MixerScore, Pair
from mad_efla.analysis.statistics import Interval, lagging

AT_CHANCE = 0.05


def sentences(board: Leaderboard) -> list[str]:
    """Say who leads, what is not settled, who did not learn, and what the rates leave open.

    Args:
        board: A leaderboard; of a task, or of several.

    Returns:
        Whole sentences, the most important first; none where no run is done.
    """
    if board.protocol == "exploring":
        return ["Each mixer's points were proposed from what its earlier ones reached, so mixers are not compared."]
    own = {m.mixer: [c for c in board.cells if c.mixer == m.mixer] for m in board.mixers}
    ranked = [m for m in board.mixers if m.rank is not None and m.average]
    lost = [m.mixer for m in board.mixers if own[m.mixer] and all(map(at_chance, own[m.mixer]))]
    learned = [m for m in ranked if m.mixer not in lost]
    said = _standing(board, learned, ranked)
    said += [_lost(name, own[name], board.checks) for name in lost]
    said += [line for m in learned if (line := _partly(m.mixer, own[m.mixer]))]
    said += [line for m in learned if (line := _behind(m.mixer, own[m.mixer]))]
    if len(ranked) > 1 or (ranked and any(cell.rates for cell in board.cells)):
        said += _rates({m.mixer: own[m.mixer] for m in learned})
    if line := _checks(board.checks, lost):
        said.append(line)
    return said + [f"{note}." for note in board.notes]


def at_chance(cell: Cell) -> bool:
    """Tell whether no seed of a cell is above what guessing gives; False where that is not known."""
    values = list(cell.values().values())
    return cell.chance is not None and all(_share(v, cell) < AT_CHANCE for v in values)


def _share(accuracy: float, cell: Cell) -> float:
    chance = cell.chance or 0.0
    return (accuracy - chance) / max(cell.ceiling - chance, 1e-9)


# ------------------------------------------------------------------ who leads


def _standing(board: Leaderboard, learned: Sequence[MixerScore], ranked: Sequence[MixerScore]) -> list[str]:
    """Compare the first mixer with every other that learned."""
    if not learned:
        return ["No mixer learned the task."] if ranked else []
    first, *others = learned
    where = _where(board)
    if not others:
        return [f"{first.mixer} reaches {_percent(first.average)} {where}; no other mixer that learned is ranked."]
    pairs = {p.second: p for p in board.pairs if p.first == first.mixer}
    if any(pairs[m.mixer].difference.p is None for m in others):
        return [
            f"{first.mixer} has the highest mean, {_percent(first.average)} {where}. "
            "A single seed has no interval, so nothing is settled: give `seeds` at least two."
        ]
    differ = [pairs[m.mixer] for m in others if pairs[m.mixer].differ]
    open_ = [pairs[m.mixer] for m in others if not pairs[m.mixer].differ]
    said = []
    if open_:
        ahead = _listed([f"{p.second} by {_points(p)}" for p in open_])
        names = _listed([first.mixer, *(p.second for p in open_)])
        said.append(
            f"{names} are not told apart {where}. {first.mixer} has {_percent(first.average)} and is ahead of "
            f"{ahead}, which is not settled."
        )
        if differ:
            said.append(f"{first.mixer} leads {_listed([f'{p.second} by {_points(p)}' for p in differ])}.")
    else:
        second = differ[0]
        said.append(
            f"{first.mixer} leads with {_percent(first.average)} {where}: {_points(second)} above "
            f"{second.second}, the next{_correction(second)}."
        )
    if agreement := _agreement(first.mixer, pairs[others[0].mixer]):
        said.append(agreement)
    return said


def _where(board: Leaderboard) -> str:
    settings = {(c.task, c.condition) for c in board.cells}
    seeds = min(len(c.seeds) for c in board.cells)
    over = f"over {seeds} seeds" if seeds > 1 else "with one seed"
    return f"{over} at {'one setting' if len(settings) == 1 else f'{len(settings)} settings'}"


def _agreement(name: str, pair: Pair) -> str:
    d = pair.difference
    if d.settings == 1:
        return ""
    if not d.wins and not d.losses:
        return f"At none of the {d.settings} settings alone does {name} differ from {pair.second}."
    return (
        f"Of {d.settings} settings, {name} is ahead of {pair.second} at {d.wins} and behind at {d.losses}, "
        "counting those whose own interval leaves out zero."
    )


def _correction(pair: Pair) -> str:
    return "" if pair.p_corrected is None else f" (p {_p(pair.p_corrected)} after Holm's correction)"


# ------------------------------------------------------------------ who did not learn


def _lost(name: str, cells: Sequence[Cell], checks: Iterable[Cell]) -> str:
    reached = max(v for c in cells for v in c.values().values())
    chance = max(c.chance or 0.0 for c in cells)
    steps = {run.steps for c in cells for run in c.runs}
    rates = _tried(cells)
    easy = [c.accuracy.mean for c in checks if c.mixer == name and c.accuracy]
    within = f" within {max(steps):,} steps" if steps else ""
    said = f"{name} stays at chance{rates}{within}: {100 * reached:.1f} %, where guessing gives {100 * chance:.1f} %."
    if easy:
        said += f" The easy check it answers to {100 * min(easy):.1f} %."
    return said + " This says nothing of what it learns with more."


def _tried(cells: Sequence[Cell]) -> str:
    """Say at how many rates, if no point that was tried does better than the chosen one."""
    counts = {len(c.rates) for c in cells}
    if len(counts) != 1 or not all(c.best_validation is not None for c in cells):
        return ""
    if any(_share(c.best_validation or 0.0, c) >= AT_CHANCE for c in cells):
        return " at its chosen learning rate"
    n = counts.pop()
    return f" at all {n} learning rates" if n > 1 else " at the one learning rate tried"


def _partly(name: str, cells: Sequence[Cell]) -> str:
    few = [c.setting for c in cells if at_chance(c)]
    return f"{name} stays at chance at {_listed(few)}." if few else ""


def _behind(name: str, cells: Sequence[Cell]) -> str:
    """Name seeds that lag: no interval of a few seeds covers them."""
    found = []
    for cell in cells:
        values = list(cell.values().values())
        if n := lagging(values):
            found.append(f"{n} of {len(values)} seeds at {cell.setting} (least {100 * min(values):.1f} %)")
    if not found:
        return ""
    return f"{name}: {_listed(found)} learned later than the others, so its interval is too narrow."


# ------------------------------------------------------------------ rates and checks


def _rates(own: dict[str, list[Cell]]) -> list[str]:
    """Say what the learning rates leave open: one for all, chosen on what is measured, at an edge."""
    cells = [c for found in own.values() for c in found]
    rates = {rate for c in cells for rate in c.rates}
    if not rates:
        return []
    if all(len(c.rates) == 1 for c in cells):
        if len(own) < 2:
            return []
        given = f"one learning rate, {rates.pop():g}" if len(rates) == 1 else "one learning rate a setting"
        return [f"Every mixer had {given}, and mixers differ in their best: the order may change with it."]
    said = []
    if any(not c.chosen_apart for c in cells if len(c.rates) > 1):
        said.append("Learning rates were chosen on the seeds that are measured, so scores lean upwards.")
    for which, end in (("least", min), ("largest", max)):
        names = [
            f"{name} ({end(cell.rates):g})"
            for name, found in own.items()
            if (cell := next((c for c in found if len(c.rates) > 1 and c.rate == end(c.rates) and _open(c)), None))
        ]
        if names:
            smaller = "smaller" if which == "least" else "larger"
            said.append(
                f"The {which} learning rate tried was chosen for {_listed(names)}: a {smaller} one may do better."
            )
    return said


def _open(cell: Cell) -> bool:
    """Tell whether a better rate could still matter."""
    return cell.accuracy is not None and _share(cell.accuracy.mean, cell) < 0.99


def _checks(checks: Sequence[Cell], lost: Sequence[str]) -> str:
    known = [c for c in checks if c.accuracy and c.mixer not in lost]
    failed = [f"{c.mixer} ({100 * c.accuracy.mean:.1f} %)" for c in known if c.accuracy and c.accuracy.mean < 0.9]
    if failed:
        return f"The easy check is not solved by {_listed(failed)}: look at its runs before you trust the rest."
    return ""


# ------------------------------------------------------------------ words


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _percent(value: Interval | None) -> str:
    if value is None:
        return "no score"
    if value.low is None or value.high is None:
        return f"{100 * value.mean:.1f} %"
    return f"{100 * value.mean:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _points(pair: Pair) -> str:
    d = pair.difference.mean
    if d.low is None or d.high is None:
        return f"{100 * d.mean:.1f} points"
    return f"{100 * d.mean:.1f} points [{100 * d.low:.1f}, {100 * d.high:.1f}]"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"
