"""Figures with a row per layer: a column per quantity, or per run; their legend and notes."""

import textwrap
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from mad_efla.reporting.figures import PAGE, Line
from mad_efla.reporting.figures.quartiles import Quartiles
from mad_efla.spectrum import LayerDiagnosis

GREY = "0.4"
SMALL = 6.0  # points
_SIDE_BY_SIDE = 4  # runs
_WITH_QUARTILES = 3  # runs whose quartiles can still be told apart
_TITLE = 24  # characters of a column's title in a line


class Drawn(NamedTuple):
    """What a panel shows of a run: the layer's kind, what was measured, its curve and look."""

    kind: str
    part: Any
    curve: Quartiles
    look: Line


class Quantity(NamedTuple):
    """A column of a figure: one quantity, for each layer.

    Attributes:
        title: What is drawn, with its unit.
        x: Over what, with its unit.
        part: Takes what is drawn out of a layer; None where the layer has none.
        curve: Makes the curve of it.
        frame: Sets scales and marks, once all rows are drawn.
    """

    title: str
    x: str
    part: Callable[[LayerDiagnosis], Any]
    curve: Callable[[Any], Quartiles]
    frame: Callable[[Axes, list[Drawn]], None]

    def parts(self, row: dict[str, LayerDiagnosis]) -> dict[str, Any]:
        """Return what there is to draw of the runs."""
        found = {name: self.part(layer) for name, layer in row.items()}
        return {name: part for name, part in found.items() if part is not None}


def page(columns: int, rows: int, *, wide: int = 0) -> tuple[Figure, GridSpec]:
    """Open a figure across the page.

    Args:
        columns: Panels side by side.
        rows: Layers.
        wide: Further columns that the caller fills.
    """
    width = PAGE * min(1, (columns + wide) / 3 + 0.1)
    figure = Figure(figsize=(width, 1.2 + 1.35 * rows))
    return figure, figure.add_gridspec(rows, columns + wide)


def draw(
    figure: Figure,
    grid: GridSpec,
    panels: list[Quantity],
    rows: list[dict[str, LayerDiagnosis]],
    looks: dict[str, Line],
) -> None:
    """Draw quantities in columns and layers in rows; a column has the same axes everywhere.

    Args:
        figure: Where.
        grid: Its panels; columns beyond the quantities are left alone.
        panels: The quantities.
        rows: Layers by the runs' names, the first layer first.
        looks: Colour and dashes by the runs' names.
    """
    for column, panel in enumerate(panels):
        cells: list[tuple[Axes, list[Drawn]]] = []
        for i, row in enumerate(rows):
            first = cells[0][0] if cells else None
            ax = figure.add_subplot(grid[i, column], sharex=first, sharey=first)
            drawn = [
                Drawn(row[name].kind, part, panel.curve(part), looks[name]) for name, part in panel.parts(row).items()
            ]
            for run in drawn:
                _plot(ax, run, shade=len(looks) <= _WITH_QUARTILES)
            if column == 0:
                ax.set_ylabel(f"layer {i}", weight="bold")
            cells.append((ax, drawn))
        for ax, drawn in cells:
            if drawn:
                panel.frame(ax, drawn)
            else:
                nothing(ax)
            ax.tick_params(labelbottom=ax is cells[-1][0])
        cells[0][0].set_title(panel.title, loc="left")
        cells[-1][0].set_xlabel(panel.x)


def by_run(
    rows: list[dict[str, LayerDiagnosis]], runs: list[str], *, around: float = 0.5
) -> tuple[Figure, list[tuple[Axes, str, int]]]:
    """Open a figure with a column per run and a row per layer; many runs make further blocks.

    Args:
        rows: The layers.
        runs: Their names, which become titles.
        around: Inches for what stands above and below the panels.
    """
    across, depth = min(len(runs), _SIDE_BY_SIDE), len(rows)
    blocks = -(-len(runs) // across)
    wide = PAGE * (0.25 + 0.75 * across / _SIDE_BY_SIDE)
    figure = Figure(figsize=(wide, around + blocks * (0.3 + 1.15 * depth)))
    grid = figure.add_gridspec(blocks * depth, across)
    cells = []
    for n, name in enumerate(runs):
        block, column = divmod(n, across)
        for i in range(depth):
            ax = figure.add_subplot(grid[block * depth + i, column])
            if i == 0:
                ax.set_title(_over_lines(name), pad=11)
            if column == 0:
                ax.set_ylabel(f"layer {i}")
            ax.tick_params(labelbottom=i == depth - 1)
            cells.append((ax, name, i))
    return figure, cells


def _over_lines(name: str) -> str:
    """Break a long name, before what stands in brackets if anything does."""
    if len(name) > _TITLE:
        name = name.replace("(", " (", 1)
    return "\n".join(textwrap.wrap(name, _TITLE))


def drawn_looks(
    panels: list[Quantity], rows: list[dict[str, LayerDiagnosis]], looks: dict[str, Line]
) -> dict[str, Line]:
    """Return the looks of the runs that appear in some panel.

    Args:
        panels: The quantities.
        rows: Layers by the runs' names.
        looks: Colour and dashes by the runs' names.
    """
    seen = {name for panel in panels for row in rows for name in panel.parts(row)}
    return {name: look for name, look in looks.items() if name in seen}


def _plot(ax: Axes, run: Drawn, *, shade: bool) -> None:
    x, *quartiles = run.curve
    low, middle, high = (q.clip(1e-90, 1e90) for q in quartiles)  # a log axis has no zero
    ax.plot(
        x,
        middle,
        color=run.look.color,
        dashes=run.look.dashes,
        marker="o" if run.kind == "attention" else "",
        markevery=max(1, len(x) // 8),
        markersize=3.5,
        markerfacecolor="white",
    )
    if shade:
        ax.fill_between(x, low, high, color=run.look.color, alpha=0.15, linewidth=0)


def explain(figure: Figure, looks: dict[str, Line], notes: list[str]) -> None:
    """Put the legend above, and below what lines and shades are.

    Args:
        figure: Whose.
        looks: Colour and dashes by the runs' names.
        notes: Written below, one after the other.
    """
    handles = [Line2D([], [], color=x.color, dashes=x.dashes, label=n) for n, x in looks.items()]
    across = int(figure.get_figwidth() * 15) // (max(map(len, looks)) + 7)
    figure.legend(handles=handles, loc="outside upper center", ncols=max(1, across))
    note(figure, notes)


def note(figure: Figure, notes: list[str]) -> None:
    """Write notes in small letters below a figure."""
    text = textwrap.fill("; ".join(notes), int(figure.get_figwidth() * 23))
    figure.supxlabel(text, fontsize=SMALL, color=GREY, x=0.99, ha="right")


def line_notes(looks: dict[str, Line]) -> list[str]:
    """Say what lines are, and shades where there are any."""
    shades = ["shades: quartiles"] if len(looks) <= _WITH_QUARTILES else []
    return ["lines: medians over heads and sequences", *shades]


def mark(ax: Axes, y: float, text: str, side: Literal["left", "right"] = "right") -> None:
    """Draw a level across a panel, and its name at one end.

    Args:
        ax: The panel.
        y: The level.
        text: Its name.
        side: At which end.
    """
    ax.axhline(y, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    ax.annotate(
        text,
        (side == "right", y),
        xycoords=("axes fraction", "data"),
        xytext=(0 if side == "right" else 3, 1),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=SMALL,
        color=GREY,
    )


def nothing(ax: Axes) -> None:
    """Say in a panel that the run has nothing to show there."""
    ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center", color=GREY)


def plain_numbers(axis: Any) -> None:
    """Write the numbers of an axis as 0.1 and 100, where a logarithmic one has powers of ten."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
