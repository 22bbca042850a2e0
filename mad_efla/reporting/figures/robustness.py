"""Figures of what corruption does: accuracy over severity, what the layer does, which part did it.

curves   a panel per corruption, a line per mixer: means over seeds in a band of 95 %
states   a panel per quantity of the layer, a line per mixer, over one corruption's severity
blame    a panel per mixer, a row per part of its layer: accuracy with it alone corrupted, and
         with it alone set back
"""

import math

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mad_efla.analysis.corruption import Arm
from mad_efla.reporting import figures
from mad_efla.reporting.figures import sweeps
from mad_efla.spectrum.causes import Account

SEVERITY = {
    "dropout": "probability that a pixel is lost",
    "intensity": "factor on all pixels",
    "noise": "standard deviation",
    "inversion": "share of the negative",
    "shift": "pixels",
    "burst": "share of pixels saturated",
}
_ACROSS = 3
# Quantity, what to call it, and whether its axis is logarithmic.
_QUANTITIES = (
    ("accuracy", "test accuracy", False),
    ("lambda_mean", "λ = |k|², mean", True),
    ("erase_mean", "erase strength, mean", True),
    ("wiped", "tokens that erase over 98 %", False),
    ("state_log_norm_max", "largest singular value of a state", True),
    ("keys_square_cosine", "squared cosine of two keys", False),
    ("gain_noise", "gain of noise, model", True),
)


def chunks(names: list[str]) -> list[list[str]]:
    """Cut mixers into groups that can be told apart in one figure, about equally large."""
    count = -(-len(names) // figures.MANY)
    size = -(-len(names) // max(count, 1))
    return [names[i : i + size] for i in range(0, len(names), size)]


def curves(arms: list[Arm], *, width: float = figures.PAGE) -> Figure:
    """Draw accuracy over severity, of at most as many mixers as can be told apart.

    Args:
        arms: Of one task and setting.
        width: Inches.
    """
    names = list(dict.fromkeys(name for arm in arms for name in arm.curves))
    panels = [
        sweeps.Panel(
            name,
            SEVERITY.get(name, "severity"),
            [sweeps.Curve(arm.mixer, c.severities, c.accuracy) for arm in arms if (c := arm.curves.get(name))],
        )
        for name in names
    ]
    return sweeps.curves(panels, [arm.mixer for arm in arms], marks=False, width=width)


def states(accounts: list[Account], *, width: float = figures.PAGE) -> Figure:
    """Draw what layers do as one corruption grows, means over seeds; only what some mixer has."""
    found = [q for q in _QUANTITIES if any(q[0] in a.scalars for a in accounts)]
    look = figures.lines([a.mixer for a in accounts])
    down = -(-len(found) // _ACROSS)
    with figures.style():
        figure = Figure(figsize=(width, 0.35 + 1.6 * down + 0.16 * -(-len(accounts) // 3)))
        grid = figure.subplots(down, _ACROSS, squeeze=False, sharex=True)
        for axes, (name, title, logarithmic) in zip(grid.flat, found, strict=False):
            for account in accounts:
                if name in account.scalars:
                    y = account.scalars[name]
                    if name == "state_log_norm_max":
                        y = [math.exp(min(v, 200.0)) for v in y]
                    line = look[account.mixer]
                    axes.plot(account.severities, y, color=line.color, dashes=line.dashes)
            axes.set_title(title, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            if logarithmic:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_locator(NullLocator())
            else:
                axes.set_ylim(-0.04, 1.06)
            axes.grid(axis="y", color="0.92", linewidth=0.6)
        for axes in grid.flat[len(found) :]:
            axes.remove()
        for column in range(_ACROSS):
            rows = [r for r in range(down) if r * _ACROSS + column < len(found)]
            if rows:
                grid[rows[-1], column].tick_params(labelbottom=True)
        corruption = accounts[0].corruption
        figure.supxlabel(
            f"{corruption}: {SEVERITY.get(corruption, 'severity')}", fontsize=matplotlib.rcParams["axes.labelsize"]
        )
        handles = [
            Line2D([], [], color=look[a.mixer].color, dashes=look[a.mixer].dashes, label=a.mixer) for a in accounts
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        return figure


def blame(accounts: list[Account], *, width: float = figures.PAGE) -> Figure:
    """Draw which part of the layer lowers the accuracy alone, and which restores it alone."""
    drawn = [a for a in accounts if a.blames]
    parts = list(dict.fromkeys(part for a in drawn for part in a.blames))
    # All parts together say nothing: one end is the corrupted accuracy, the other the clean one.
    parts = [p for p in parts if p.count("+") < 5]
    blue, orange = (figures.lines(["a", "b"])[n].color for n in "ab")
    across = min(len(drawn), _ACROSS)
    down = -(-len(drawn) // across)
    with figures.style():
        figure = Figure(figsize=(width, down * (0.5 + 0.2 * len(parts)) + 0.6))
        grid = figure.subplots(down, across, sharey=True, sharex=True, squeeze=False)
        for axes, account in zip(grid.flat, drawn, strict=False):
            for y, part in enumerate(parts):
                if part not in account.blames:
                    continue
                for score, shift, colour, face in zip(
                    account.blames[part], (-0.15, 0.15), (orange, blue), (orange, "white"), strict=True
                ):
                    low, high = (score.mean if end is None else end for end in score[1:])
                    axes.plot([100 * low, 100 * high], [y + shift] * 2, color=colour, linewidth=0.8)
                    axes.plot(100 * score.mean, y + shift, "o", ms=4, color=colour, markerfacecolor=face)
            for level in (account.clean.mean, account.corrupted.mean):
                axes.axvline(100 * level, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
            axes.set_yticks(range(len(parts)), parts)
            axes.set_ylim(len(parts) - 0.5, -0.5)
            axes.set_xlim(-3, 103)
            axes.grid(axis="y", color="0.93", linewidth=0.6)
            axes.tick_params(axis="y", length=0)
            axes.set_title(account.mixer, loc="left")
        for axes in grid.flat[len(drawn) :]:
            axes.remove()
        one = drawn[0]
        figure.supxlabel(
            f"test accuracy, %, at {one.corruption} {one.severity:g} "
            "(dotted: all of the layer's parts corrupted, and none)",
            fontsize=matplotlib.rcParams["axes.labelsize"],
        )
        marks = [
            Line2D([], [], color=orange, marker="o", ms=4, label="only this part corrupted"),
            Line2D([], [], color=blue, marker="o", ms=4, markerfacecolor="white", label="only this part set back"),
        ]
        figure.legend(handles=marks, loc="outside upper center", ncols=2)
        return figure
