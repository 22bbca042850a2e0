"""Quantities of a layer over lags and tokens: forgetting, the state, reach. Each knows its axes and marks."""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from mad_efla.reporting.figures.layers import GREY, SMALL, Drawn, Quantity, mark, plain_numbers
from mad_efla.reporting.figures.quartiles import (
    key_spread,
    products_left,
    rank_over_time,
    reach_distance,
    reach_width,
    remembering,
    state_sizes,
    x_shares,
)
from mad_efla.spectrum import EULER_LIMIT, SATURATED

_FLOOR = 1e-3  # of axes for what falls to nothing


def _frame_x(ax: Axes, drawn: list[Drawn]) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    if any(run.part.beta is not None for run in drawn):
        ax.set_xlim(right=max(10, ax.get_xlim()[1]))
        for at, text, shift in ((EULER_LIMIT, "Euler's limit", -6), (SATURATED, "saturated", 2)):
            ax.axvline(at, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
            ax.annotate(
                f"{text}, {at:g}",
                (at, 0.04),
                xycoords=("data", "axes fraction"),
                rotation=90,
                xytext=(shift, 0),
                textcoords="offset points",
                va="bottom",
                fontsize=SMALL,
                color=GREY,
            )


def _frame_products(ax: Axes, drawn: list[Drawn]) -> None:
    ax.set_xscale("log")
    plain_numbers(ax.xaxis)
    _fall(ax)
    mark(ax, 1 / math.e, "1/e", "left")


def _frame_remembering(ax: Axes, drawn: list[Drawn]) -> None:
    ax.set_xscale("log")
    ax.margins(x=0)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    plain_numbers(ax.xaxis)
    _ends(ax, drawn)


def _ends(ax: Axes, drawn: list[Drawn]) -> None:
    """Write the last value of each curve behind it, apart from each other."""
    ordered = sorted(drawn, key=lambda run: run.curve.middle[-1])
    gap, at = 0.1, -math.inf
    heights = []
    for i, run in enumerate(ordered):
        room = 0.96 - gap * (len(ordered) - 1 - i)  # for those above
        at = max(min(run.curve.middle[-1], room), at + gap)
        heights.append(at)
    for run, height in zip(ordered, heights, strict=True):
        ax.annotate(
            f"{100 * run.curve.middle[-1]:.3g} %",
            (1, height),
            xycoords="axes fraction",
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=run.look.color,
        )


def _fall(ax: Axes) -> None:
    """Scale for what starts at about 1 and falls, or does not."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(min(max(low, _FLOOR), 0.09), max(high, 1.3))
    plain_numbers(ax.yaxis)


FORGETTING = [
    Quantity(
        "tokens with at most this x",
        "x: beta |k|², or -log decay",
        lambda layer: layer.tokens if layer.tokens and layer.tokens.x is not None else None,
        x_shares,
        _frame_x,
    ),
    Quantity(
        "median singular value of\nproducts of transitions",
        "lag, tokens",
        lambda layer: layer.products,
        products_left,
        _frame_products,
    ),
    Quantity(
        "heads with a longer horizon",
        "lag, tokens\n(numbers: beyond the longest)",
        lambda layer: layer.products,
        remembering,
        _frame_remembering,
    ),
]


def _frame_rank(ax: Axes, drawn: list[Drawn]) -> None:
    sizes = sorted({run.part.log_singular_values.shape[-1] for run in drawn})
    ax.set_ylim(0, max(1.12 * sizes[-1], ax.get_ylim()[1]))
    for size in sizes:
        mark(ax, size, f"capacity {size}")


def _frame_sizes(ax: Axes, drawn: list[Drawn]) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _fall(ax)


def _frame_keys(ax: Axes, drawn: list[Drawn]) -> None:
    _frame_sizes(ax, drawn)
    mark(ax, 1, "orthogonal keys")


STATE = [
    Quantity("effective rank\nof the state", "tokens read", lambda layer: layer.state, rank_over_time, _frame_rank),
    Quantity(
        "singular values of the last state,\nshare of the largest",
        "index",
        lambda layer: layer.state,
        state_sizes,
        _frame_sizes,
    ),
    Quantity(
        "Gram eigenvalues of the keys,\ntimes their width", "index", lambda layer: layer.keys, key_spread, _frame_keys
    ),
]


def _frame_distance(ax: Axes, drawn: list[Drawn]) -> None:
    _evenly(ax, drawn, lambda read: (read - 1) / 2)


def _frame_width(ax: Axes, drawn: list[Drawn]) -> None:
    _evenly(ax, drawn, lambda read: read)


def _evenly(ax: Axes, drawn: list[Drawn], of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Draw what looking at all tokens alike gives."""
    read = np.array([1.0, max(run.curve.x[-1] for run in drawn)])
    ax.plot(read, of(read), color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    ax.annotate(
        "all alike",
        (read[1], of(read)[1]),
        xytext=(-2, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=SMALL,
        color=GREY,
    )


REACH = [
    Quantity(
        "mean distance looked back,\ntokens", "tokens read", lambda layer: layer.reach, reach_distance, _frame_distance
    ),
    Quantity("tokens looked at,\nexp(entropy)", "tokens read", lambda layer: layer.reach, reach_width, _frame_width),
]
