"""Figures of sweeps: scores in rows, mixers by tasks, small multiples, score against memory.

Accuracies come in as shares, in [0, 1], and are drawn in percent; what reaches left and right or
up and down of a mark is its 95 % interval, and a mark without one stands for a single seed. Every
figure is drawn `width` inches wide: it has the panels a row that fit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from mad_efla.analysis.statistics import Interval
from mad_efla.reporting import figures

_PANEL = (2.1, 1.75)  # least width, and height, of a panel in inches
_CELL = (0.72, 1.5, 0.36)  # least and largest width, and height, of a cell of the heat map
_DARK = 72  # percent, beyond which a cell of the heat map is written on in white
_MARKS = "osD^vPX<"
_Draw = Callable[[Axes, dict[str, figures.Line]], None]


class Curve(NamedTuple):
    """What one mixer does along an axis: rising x, or words, and a score for each."""

    name: str
    x: list[float] | list[str]
    y: list[Interval]


class StatePoint(NamedTuple):
    """A mixer's score beside what it remembers.

    Attributes:
        name: The mixer's label.
        states: Least and largest state over what the score is the mean of.
        score: Its score.
    """

    name: str
    states: tuple[int, int]
    score: Interval


class Panel(NamedTuple):
    """One of several small plots that share their colours and the axis of accuracy."""

    title: str
    x_label: str
    content: Sequence[Curve] | Sequence[StatePoint]


def rows(
    scores: dict[str, Interval],
    *,
    x_label: str,
    around: Literal["zero", "share"] = "share",
    width: float = figures.PAGE,
) -> Figure:
    """Draw means with their intervals, one row each, in the order given.

    Args:
        scores: By what the row is called.
        x_label: What is measured.
        around: `share` shows the axis from 0 to 100, `zero` a line at 0 and what lies about it.
        width: Inches.
    """
    with figures.style():
        figure = Figure(figsize=(width, 0.62 + 0.2 * len(scores)))
        axes = figure.subplots()
        colour = seaborn.color_palette("colorblind").as_hex()[0]
        for y, score in enumerate(scores.values()):
            axes.errorbar(100 * score.mean, y, xerr=_reach(score), fmt="o", ms=4, color=colour, capsize=2)
        axes.set_yticks(range(len(scores)), list(scores))
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.set_xlabel(x_label)
        axes.grid(axis="x", color="0.9", linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if around == "zero":
            axes.axvline(0, color="0.3", linewidth=0.8, zorder=0)
        else:
            axes.set_xlim(-2, 102)
        return _settled(figure)


def heat_map(scores: dict[tuple[str, str], Interval], *, x_label: str = "", width: float = figures.PAGE) -> Figure:
    """Draw mixers by tasks, in the order in which they first come; empty where there is no score.

    Args:
        scores: By mixer and task, or setting.
        x_label: Said below, if anything.
        width: Inches; more where the cells would not hold their figures.
    """
    mixers, tasks = (list(dict.fromkeys(key[i] for key in scores)) for i in (0, 1))
    values = np.full((len(mixers), len(tasks)), np.nan)
    words = np.full(values.shape, "", dtype=object)
    for (mixer, task), score in scores.items():
        at = mixers.index(mixer), tasks.index(task)
        values[at], words[at] = 100 * score.mean, _words(score)
    margin = 0.25 + 0.062 * max(map(len, mixers))
    least, most = (margin + cell * len(tasks) for cell in _CELL[:2])
    width = max(least, min(width, most))
    with figures.style():
        figure = Figure(figsize=(width, 0.75 + _CELL[2] * len(mixers)))
        axes = figure.subplots()
        colour = seaborn.color_palette("colorblind").as_hex()[0]
        shades = seaborn.light_palette(colour, as_cmap=True)
        seaborn.heatmap(
            values,
            ax=axes,
            annot=words,
            fmt="",
            cmap=shades,
            vmin=0,
            vmax=100,
            cbar=False,
            linewidths=0.8,
            xticklabels=[t.replace("_", "\n") for t in tasks],
            yticklabels=mixers,
            annot_kws={"size": 6.5, "linespacing": 1.25},
        )
        for text, value in zip(axes.texts, values[~np.isnan(values)], strict=True):
            text.set_color("white" if value > _DARK else "0.1")
        axes.set_xlabel(x_label)
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        axes.tick_params(axis="x", labelrotation=0)
        axes.tick_params(axis="y", labelrotation=0)
        return _settled(figure)


def curves(
    panels: list[Panel],
    names: list[str],
    *,
    marks: bool = True,
    y_label: str = "test accuracy, %",
    width: float = figures.PAGE,
) -> Figure:
    """Draw panels of `Curve`s: along an axis of difficulty, over learning rates, over steps.

    An axis of numbers that span a factor of four is logarithmic; words are spaced evenly.

    Args:
        panels: What to draw.
        names: The mixers in the order of their colours; others are left out.
        marks: Whether each value is marked, with its interval as a bar; else a line in a band,
            marked where it ends.
        y_label: What is measured.
        width: Inches.
    """

    def draw(axes: Axes, panel: Panel, look: dict[str, figures.Line]) -> None:
        found = [c for c in panel.content if isinstance(c, Curve) and c.name in look]
        places = _places(axes, [x for c in found for x in c.x], every=marks)
        shade = min(0.15, 0.5 / len(found))
        for curve in found:
            x = [places[value] for value in curve.x]
            mean = [100 * y.mean for y in curve.y]
            line, mark = look[curve.name], _MARKS[names.index(curve.name)]
            if marks:
                bars = np.hstack([_reach(y) for y in curve.y])
                axes.errorbar(
                    x,
                    mean,
                    yerr=bars,
                    marker=mark,
                    ms=3.2,
                    capsize=1.5,
                    elinewidth=0.7,
                    color=line.color,
                    dashes=line.dashes,
                )
            else:
                low, high = zip(*(_ends(y) for y in curve.y), strict=True)
                axes.fill_between(x, low, high, color=line.color, alpha=shade, linewidth=0)
                axes.plot(x, mean, color=line.color, dashes=line.dashes, marker=mark, ms=3.2, markevery=[-1])

    return _multiples(panels, names, draw, y_label, width)


def memory(panels: list[Panel], names: list[str], *, width: float = figures.PAGE) -> Figure:
    """Draw score against state, in panels of `StatePoint`s: what a mixer recalls for what it carries.

    Marks of equal states stand side by side, four points of type apart.

    Source: Arora et al. 2024, Simple linear attention language models balance the
    recall-throughput tradeoff, arXiv 2402.18668.

    Args:
        panels: What to draw; a bar across spans the states that the score is the mean over.
        names: The mixers in the order of their colours; others are left out.
        width: Inches.
    """

    def draw(axes: Axes, panel: Panel, look: dict[str, figures.Line]) -> None:
        found = [p for p in panel.content if isinstance(p, StatePoint) and p.name in look]
        sizes = [size for p in found for size in p.states]
        _scale_states(axes, min(sizes), max(sizes))
        for point in found:
            low, high = point.states
            x, mean = math.sqrt(low * high), 100 * point.score.mean
            line, mark = look[point.name], _MARKS[names.index(point.name)]
            equal = [p.name for p in found if p.states == point.states]
            aside = 4 / 72 * (equal.index(point.name) - (len(equal) - 1) / 2)
            place = axes.transData + ScaledTranslation(aside, 0, axes.figure.dpi_scale_trans)
            axes.plot([low, high], [mean, mean], color=line.color, linewidth=0.7, transform=place)
            axes.errorbar(
                x,
                mean,
                yerr=_reach(point.score),
                fmt=mark,
                ms=4,
                capsize=1.5,
                elinewidth=0.7,
                color=line.color,
                transform=place,
            )

    return _multiples(panels, names, draw, "test accuracy, %", width)


def _scale_states(axes: Axes, least: int, largest: int) -> None:
    """Set an axis of states: logarithmic, with a place for mixers that carry nothing."""
    if least:
        axes.set_xscale("log")
        near = largest < 4 * least
        axes.xaxis.set_major_locator(MaxNLocator(4) if near else LogLocator(subs=(1, 2, 5)))
        axes.set_xlim(least / 1.4, largest * 1.4)
    else:
        axes.set_xscale("symlog", linthresh=100)
        axes.set_xlim(-20, max(largest, 100) * 1.4)
    axes.xaxis.set_major_formatter(lambda x, _: _short(x))
    axes.xaxis.set_minor_locator(NullLocator())


# ------------------------------------------------------------------ panels


def _multiples(
    panels: list[Panel],
    names: list[str],
    draw: Callable[[Axes, Panel, dict[str, figures.Line]], None],
    y_label: str,
    width: float,
) -> Figure:
    drawn = {c.name for p in panels for c in p.content}
    look = {n: line for n, line in figures.lines(names).items() if n in drawn}
    across = max(1, min(len(panels), int(width / _PANEL[0])))
    down = -(-len(panels) // across)
    wide = min(width, 0.6 + 3.2 * across)
    per_row = max(1, int((wide - 0.2) / (0.5 + 0.06 * max(map(len, look), default=0))))
    legend = 0.1 + 0.16 * -(-len(look) // per_row)
    with figures.style():
        figure = Figure(figsize=(wide, down * _PANEL[1] + legend))
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            draw(axes, panel, look)
            axes.set(title=panel.title, xlabel=panel.x_label, ylim=(-4, 106), yticks=range(0, 101, 25))
            axes.grid(axis="y", color="0.92", linewidth=0.6)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        figure.supylabel(y_label, fontsize=matplotlib.rcParams["axes.labelsize"])
        _legend(figure, names, look, per_row)
        return _settled(figure)


def _legend(figure: Figure, names: list[str], look: dict[str, figures.Line], per_row: int) -> None:
    handles = [
        Line2D([], [], color=line.color, dashes=line.dashes, marker=_MARKS[names.index(n)], ms=3.2)
        for n, line in look.items()
    ]
    figure.legend(
        handles,
        list(look),
        loc="outside lower center",
        ncols=min(per_row, len(look)),
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _settled(figure: Figure) -> Figure:
    """Lay a figure out once, to a ten-thousandth of its size.

    Otherwise each file lays it out anew, from where the file before left it.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = axes.get_position().bounds
        axes.set_position((round(left, 4), round(bottom, 4), round(width, 4), round(height, 4)))
    for text in figure.texts:
        x, y = text.get_position()
        text.set_position((round(x, 4), round(y, 4)))
    return figure


def _places(axes: Axes, values: list, *, every: bool) -> dict:
    """Choose where values stand on the axis, and set its scale and ticks; return the places."""
    distinct = list(dict.fromkeys(values))
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in distinct):
        axes.set_xticks(range(len(distinct)), [str(v) for v in distinct])
        axes.set_xlim(-0.3, len(distinct) - 0.7)
        return {v: i for i, v in enumerate(distinct)}
    if every:
        if min(distinct) > 0 and max(distinct) / min(distinct) >= 4:
            axes.set_xscale("log")
        axes.set_xticks(distinct, [_short(v) for v in distinct])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.02 * max(distinct))
    return {v: v for v in distinct}


def _reach(score: Interval) -> np.ndarray:
    """Return how far the interval reaches below and above the mean, in percent."""
    low, high = _ends(score)
    return np.clip([[100 * score.mean - low], [high - 100 * score.mean]], 0, None)


def _ends(score: Interval) -> tuple[float, float]:
    low, high = (score.mean if end is None else end for end in score[1:])
    return 100 * low, 100 * high


def _words(score: Interval) -> str:
    if score.low is None or score.high is None:
        return f"{100 * score.mean:.1f}"
    return f"{100 * score.mean:.1f}\n[{100 * score.low:.1f}, {100 * score.high:.1f}]"


def _short(value: float) -> str:
    """Write a number in few characters: 1e-3, 0.02, 512, 12.8k, 2k."""
    if value >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:g}" if value >= 0.01 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
