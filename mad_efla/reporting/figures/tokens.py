"""What single tokens do, a panel per run and layer: their eigenvalues, and how far each step errs on them."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from mad_efla.reporting.figures import lines
from mad_efla.reporting.figures.layers import GREY, SMALL, by_run, nothing, plain_numbers
from mad_efla.reporting.figures.quartiles import ERRORS, eigenvalue_shares, error_shares
from mad_efla.spectrum import EULER_LIMIT, Diagnosis, LayerDiagnosis, PerToken

_BIN = 0.025  # of eigenvalues
_STEPS = {"euler": "Euler", "implicit": "implicit", "rk2": "RK-2", "rk4": "RK-4"}


def eigenvalues(rows: list[dict[str, LayerDiagnosis]]) -> Figure:
    """Draw a strip per head: where the eigenvalues of its tokens lie."""
    runs = list(dict.fromkeys(n for row in rows for n, x in row.items() if x.tokens))
    centres = _centres([x.tokens for row in rows for x in row.values() if x.tokens])
    figure, cells = by_run(rows, runs)
    shown = None
    for ax, name, i in cells:
        tokens = rows[i][name].tokens if name in rows[i] else None
        if tokens is not None:
            shown = _strips(ax, tokens, centres)
        else:
            nothing(ax)
            ax.set_yticks([])
        if ax.get_ylabel():
            ax.set_ylabel(f"layer {i}, head")
    figure.supxlabel("eigenvalue of the transition along the token's key", fontsize="medium")
    if shown is not None:
        bar = figure.colorbar(shown, ax=figure.axes, shrink=0.6, aspect=30, pad=0.02)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
        bar.set_label("tokens of a head in a bin")
    return figure


def strip_column(figure: Figure, grid: GridSpec, column: int, diagnosis: Diagnosis) -> None:
    """Draw the eigenvalues of one run in a column of an overview, a row per layer.

    Args:
        figure: The overview.
        grid: Its panels.
        column: Which of its columns, from 0.
        diagnosis: Of the run.
    """
    tokens = [layer.tokens for layer in diagnosis.layers]
    centres = _centres([t for t in tokens if t is not None])
    for i, own in enumerate(tokens):
        ax = figure.add_subplot(grid[i, column])
        if own is not None:
            _strips(ax, own, centres)
            ax.set_ylabel("head")
        else:
            nothing(ax)
            ax.set_yticks([])
        if i == 0:
            ax.set_title("eigenvalues\nalong the key", loc="left", pad=9)
        ax.tick_params(labelbottom=i == len(tokens) - 1)
    ax.set_xlabel("eigenvalue\n(dark: many tokens)")


def _centres(tokens: list[PerToken]) -> np.ndarray:
    """Return the middles of bins that hold all eigenvalues; one of them is 0."""
    least = min(float(t.eigenvalue.min()) for t in tokens)
    first = -1.1 if least < -_BIN / 2 else -0.1
    return np.arange(round(first / _BIN), round(1.1 / _BIN) + 1) * _BIN


def _strips(ax: Axes, tokens: PerToken, centres: np.ndarray) -> Any:
    shares = eigenvalue_shares(tokens, centres)
    half = (centres[1] - centres[0]) / 2
    image = ax.imshow(
        np.where(shares > 0, shares, np.nan),
        aspect="auto",
        cmap="rocket_r",
        norm=PowerNorm(0.5, 0, 1),
        interpolation="nearest",
        extent=(centres[0] - half, centres[-1] + half, len(shares) - 0.5, -0.5),
    )
    for mark in (-1, 0, 1):
        if centres[0] <= mark:
            ax.axvline(mark, color=GREY, linewidth=0.7, linestyle=":")
    ax.set_xticks([mark for mark in (-1, -0.5, 0, 0.5, 1) if centres[0] <= mark])
    plain_numbers(ax.xaxis)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    beyond = (tokens.eigenvalue.abs() > 1 + 1e-9).double().mean().item()
    if beyond:
        ax.annotate(
            f"{100 * beyond:.2g} % beyond ±1",
            (0, 1),
            xycoords="axes fraction",
            xytext=(2, 1),
            textcoords="offset points",
            va="bottom",
            fontsize=SMALL,
        )
    return image


def integrated(layer: LayerDiagnosis) -> PerToken | None:
    """Return the tokens of a layer of the delta family, whose x a step is taken over."""
    return layer.tokens if layer.tokens and layer.tokens.beta is not None else None


def exactness(rows: list[dict[str, LayerDiagnosis]]) -> Figure:
    """Draw a panel per run and layer: on how many tokens each step errs by how much."""
    runs = list(dict.fromkeys(n for row in rows for n, x in row.items() if integrated(x)))
    figure, cells = by_run(rows, runs, around=0.9)
    looks = lines(list(_STEPS))
    for ax, name, i in cells:
        tokens = integrated(rows[i][name]) if name in rows[i] else None
        ax.set_xscale("log")
        ax.set_xlim(*ERRORS)
        ax.set_xticks([1e-6, 1e-3, 1])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
        if tokens is None or tokens.x is None:
            nothing(ax)
            continue
        for step, look in looks.items():
            x, _, share, _ = error_shares(tokens, step)
            ax.plot(x, share, color=look.color, dashes=look.dashes)
        beyond = (tokens.x > EULER_LIMIT).double().mean().item()
        ax.annotate(
            f"x: median {tokens.x.median():.2g}, {100 * beyond:.2g} % over {EULER_LIMIT:g}",
            (0.5, 1),
            xycoords="axes fraction",
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=SMALL,
            color=GREY,
        )
    figure.supxlabel("error along the key,\n|factor of the step - exp(-x)|", fontsize="medium")
    figure.supylabel("tokens with a larger error", fontsize="medium")
    handles = [Line2D([], [], color=look.color, dashes=look.dashes, label=_STEPS[step]) for step, look in looks.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4 if len(runs) > 1 else 2)
    return figure
