"""Is the verdict the same again? `python -m tests.verdict` runs a plan on ten disjoint sets of seeds.

Each set has a seed that chooses and as many measured ones as the plan, so each is what one user
would see. Their mean stands for the truth, and is counted against every set:

    orders      rankings that are not that of the means over all sets
    intervals   printed intervals that hold the mean over all sets
    pairs       pairs called different although all sets together do not say so, or say the opposite

The order of two mixers that all sets together do not tell apart is not counted as different.
Interrupted, the same command goes on; the folder keeps the runs.
"""

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click

from mad_efla.analysis import statistics
from mad_efla.analysis.leaderboard import Leaderboard, leaderboard
from mad_efla.runs.read import load


class Count(NamedTuple):
    """What ten verdicts agree on.

    Attributes:
        orders: Sets whose order contradicts that of all sets.
        sets: How many there are.
        covered: Intervals that hold the mean over all sets.
        intervals: How many there are.
        wrong: Pairs of a set called different against all sets.
        called: Pairs of a set called different.
        pairs: Pairs of a set.
    """

    orders: int
    sets: int
    covered: int
    intervals: int
    wrong: int
    called: int
    pairs: int


def count(boards: Sequence[Leaderboard]) -> Count:
    """Count agreement of boards that differ in their seeds alone, each with the same ranked mixers."""
    means = [{m.mixer: m.average.mean for m in b.mixers if m.average} for b in boards]
    names = sorted(means[0], key=lambda n: -_mean([m[n] for m in means]))
    truth = {n: _mean([m[n] for m in means]) for n in names}
    differ = {
        (a, b): statistics.interval([m[a] - m[b] for m in means], -1.0)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    told = {pair for pair, d in differ.items() if d.low is not None and d.low > 0}
    orders = sum(any(m[a] < m[b] for a, b in told) for m in means)
    intervals = [
        (m.average, truth[m.mixer]) for b in boards for m in b.mixers if m.average and m.average.low is not None
    ]
    covered = sum(i.low <= true <= i.high for i, true in intervals)
    pairs = [pair for board in boards for pair in board.pairs]
    called = [pair for pair in pairs if pair.differ]
    wrong = sum((p.first, p.second) not in told for p in called)
    return Count(orders, len(boards), covered, len(intervals), wrong, len(called), len(pairs))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@click.command()
@click.option("--task", default="recall", show_default=True)
@click.option("--plan", default="quick", show_default=True)
@click.option("--sets", default=10, show_default=True, help="Disjoint sets of seeds.")
@click.option("--seeds", default=5, show_default=True, help="Measured seeds of a set.")
@click.option("--out", default="verdict", show_default=True, type=click.Path(path_type=Path))
@click.option("--set", "assignments", multiple=True, help="As of `mad-efla sweep`.")
def main(task: str, plan: str, sets: int, seeds: int, out: Path, assignments: tuple[str, ...]) -> None:
    """Run PLAN on disjoint sets of seeds and count how often its verdict is the same."""
    boards = []
    for i in range(sets):
        own = [f"seeds={[1000 + seeds * i + j for j in range(seeds)]}", f"choose.seeds={[5000 + i]}", *assignments]
        words = [word for text in own for word in ("--set", text)]
        folder = out / f"set-{i:02d}"
        command = [Path(sys.executable).with_name("mad-efla"), "sweep", task, "--plan", plan, "--no-tracking"]
        done = subprocess.run([*command, "--out", folder, *words], capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(done.stderr[-2000:])
        (group,) = load(folder)
        boards.append(leaderboard(group))
        line = ", ".join(
            f"{m.mixer} {100 * m.average.mean:.1f} [{100 * m.average.low:.1f}, {100 * m.average.high:.1f}]"
            for m in boards[-1].mixers
            if m.average and m.average.low is not None and m.average.high is not None
        )
        chosen = ", ".join(f"{c.mixer} {c.rate:g}" for c in boards[-1].cells)
        click.echo(f"set {i}: {line}; rates {chosen}")
    found = count(boards)
    click.echo(f"orders against that of all sets: {found.orders} of {found.sets}")
    click.echo(f"intervals that hold the mean of all sets: {found.covered} of {found.intervals}")
    click.echo(f"pairs called different: {found.called} of {found.pairs}, {found.wrong} of them against all sets")


if __name__ == "__main__":
    main()
