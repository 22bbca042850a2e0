"""Figures of what trained mixers do with their memory, from `spectrum.diagnose`, run beside run.

    eigenvalues   what a token leaves of the state along its key, head by head
    exactness     what each way to integrate the delta rule gets wrong on these keys
    forgetting    x of single tokens; what products of transitions leave; how long heads remember
    state         directions in use over time; singular values at the end; spread of the keys
    reach         how far back outputs look, attention's too; gain of each layer
    overview      of one run: products, rank, reach and eigenvalues in one figure

Rows are layers. A mixer is shown wherever a quantity exists for it, and a figure that would be
empty is not drawn. Colour and dashes name the run, the same in all figures.
"""

import math
import textwrap
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter
from torch import Tensor

from mad_efla import spectrum
from mad_efla.config import ConfigError
from mad_efla.plan.run import RunConfig
from mad_efla.reporting.figures import PAGE, Line, lines, style
from mad_efla.runs.archive import ArchivedRun
from mad_efla.runs.folder import RunFolder
from mad_efla.spectrum import (
    EULER_LIMIT,
    SATURATED,
    Diagnosis,
    KeyOverlap,
    LayerDiagnosis,
    PerToken,
    Products,
    Reach,
    StateSpectrum,
)
from mad_efla.training import data, model

_FLOOR = 1e-3  # of axes for what falls to nothing
_BIN = 0.025  # of eigenvalues
_GREY = "0.4"
_SMALL = 6.0  # points
_ROOM = 2.15  # inches for a column of an overview
_SIDE_BY_SIDE = 4  # runs
_WITH_QUARTILES = 3  # runs whose quartiles can still be told apart
_TITLE = 24  # characters of a column's title in a line
_STEPS = {"euler": "Euler", "implicit": "implicit", "rk2": "RK-2", "rk4": "RK-4"}
_ERRORS = (1e-6, 1e2)  # drawn


# ------------------------------------------------------------------ runs


def diagnose(folder: RunFolder | ArchivedRun, examples: int, seed: int) -> Diagnosis:
    """Diagnose a finished run on the beginning of its test split, on the CPU in float32.

    Args:
        folder: Of the run.
        examples: Sequences; no more than its test split has are taken.
        seed: Draws the noise and the replaced token.

    Raises:
        ConfigError: The run has no weights to look at.
    """
    run, status = folder.run(), folder.status()
    if status != "finished":
        raise ConfigError(f"{folder.fingerprint}: is {status}; only finished runs have weights")
    sizes = {"train_examples": 1, "validation_examples": 1}  # the test split is drawn before them
    sizes["test_examples"] = min(examples, run.data.test_examples)
    test = data.make(run.task, run.seed, run.data.model_copy(update=sizes)).test
    built = model.build(run)
    built.load_state_dict(folder.load_model())
    generator = torch.Generator().manual_seed(seed)
    return spectrum.diagnose(built.eval(), torch.as_tensor(test.inputs), generator=generator)


def names(runs: list[RunConfig]) -> list[str]:
    """Name each run by its mixer and by what else tells it from the others."""
    columns = [
        [run.task.name for run in runs],
        [run.setting for run in runs],
        [f"lr={run.optim.lr:g}" for run in runs],
        [f"seed={run.seed}" for run in runs],
    ]
    told = [column for column in columns if len(set(column)) > 1]
    found = [" ".join(parts) for parts in zip([run.mixer for run in runs], *told, strict=True)]
    return [
        name if found.count(name) == 1 else f"{name} {run.fingerprint[:6]}"
        for name, run in zip(found, runs, strict=True)
    ]


# ------------------------------------------------------------------ data


class Curve(NamedTuple):
    """A quantity over x: median and quartiles over heads, sequences and starts.

    A share is a single number; its quartiles are itself.
    """

    x: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


def eigenvalue_shares(tokens: PerToken, centres: np.ndarray) -> np.ndarray:
    """Return which share of each head's tokens has its eigenvalue near each centre, `[H, bins]`.

    Centres are evenly spaced; what lies beyond the outermost counts there.
    """
    values = tokens.eigenvalue.movedim(-1, 0).flatten(1).cpu().numpy()
    nearest = np.rint((values - centres[0]) / (centres[1] - centres[0]))
    bins = nearest.clip(0, len(centres) - 1).astype(int)
    return np.stack([np.bincount(head, minlength=len(centres)) / len(head) for head in bins])


def x_shares(tokens: PerToken) -> Curve:
    """Return the share of tokens, and channels, whose x is at most the curve's.

    What lies outside of 1e-4 to 1e4 is moved to these ends.
    """
    assert tokens.x is not None
    shares = np.linspace(0, 1, 201)
    x = np.quantile(tokens.x.cpu().numpy(), shares, method="inverted_cdf")
    return Curve(x.clip(1e-4, 1e4), shares, shares, shares)


def error_shares(tokens: PerToken, step: str) -> Curve:
    """Return the share of tokens on which a step's error is at least the curve's x.

    What lies outside of 1e-6 to 100 is moved to these ends.
    """
    assert tokens.x is not None
    errors = spectrum.step_error(tokens.x, step).flatten().cpu().numpy()
    shares = np.linspace(0, 1, 201)
    x = np.quantile(errors, 1 - shares, method="inverted_cdf").clip(*_ERRORS)
    return Curve(x, shares, shares, shares)


def products_left(products: Products) -> Curve:
    """Return the median singular value of products of transitions over the lag."""
    logs = products.log_singular_values.median(-1).values
    return _quartiles(products.lags, logs.movedim(1, 0), exp=True)


def remembering(products: Products) -> Curve:
    """Return the share of heads, sequences and starts that still remember, over the lag.

    One remembers up to its horizon, where its median singular value falls under 1/e. The last
    share is that of the horizons beyond the longest lag.
    """
    horizon = spectrum.horizon(products).median
    lags = np.geomspace(1, int(products.lags[-1]), 201)
    ends = np.sort(horizon.flatten().cpu().numpy())
    share = 1 - np.searchsorted(ends, lags, side="right") / len(ends)
    return Curve(lags, share, share, share)


def rank_over_time(state: StateSpectrum) -> Curve:
    """Return the state's effective rank over the number of tokens read."""
    return _quartiles(state.times + 1, state.effective_rank)


def state_sizes(state: StateSpectrum) -> Curve:
    """Return the singular values of the last state, as shares of the largest, over their index."""
    logs = state.log_singular_values[-1]
    relative = (logs - logs[..., :1]).nan_to_num(-math.inf)  # NaN for a zero state
    return _quartiles(_index(logs), relative.movedim(-1, 0), exp=True)


def key_spread(keys: KeyOverlap) -> Curve:
    """Return N times the eigenvalues of the keys' Gram matrix: all 1 for orthogonal keys."""
    values = keys.spectrum * keys.spectrum.shape[-1]
    return _quartiles(_index(values), values.movedim(-1, 0))


def reach_distance(reach: Reach) -> Curve:
    """Return the mean distance looked back, in tokens, over the number of tokens read."""
    return _quartiles(reach.times + 1, reach.distance)


def reach_width(reach: Reach) -> Curve:
    """Return exp(entropy), the number of tokens looked at, over the number of tokens read."""
    return _quartiles(reach.times + 1, reach.entropy, exp=True)


def gain_size(gain: Tensor) -> Curve:
    """Return the size of a gain `[B, L]` over all tokens: a single point."""
    return _quartiles(torch.ones(1), torch.linalg.vector_norm(gain, dim=-1)[None])


def _index(values: Tensor) -> Tensor:
    return torch.arange(1, values.shape[-1] + 1)


def _quartiles(x: Tensor, y: Tensor, *, exp: bool = False) -> Curve:
    """Take quartiles over all axes of y but the first; each is one of y's values, inf too."""
    flat = y.flatten(1).cpu().numpy()
    low, middle, high = np.quantile(flat, (0.25, 0.5, 0.75), axis=1, method="inverted_cdf")
    if exp:
        low, middle, high = (np.exp(q.clip(max=200)) for q in (low, middle, high))
    return Curve(x.cpu().numpy(), low, middle, high)


# ------------------------------------------------------------------ figures


def figures(diagnoses: dict[str, Diagnosis]) -> dict[str, Figure]:
    """Draw every figure that has something to show.

    Args:
        diagnoses: By the runs' names, in the order of the legend.

    Raises:
        ConfigError: There are more runs than can be told apart.
    """
    looks = lines(list(diagnoses))
    depth = max(len(d.layers) for d in diagnoses.values())
    rows = [{name: d.layers[i] for name, d in diagnoses.items() if i < len(d.layers)} for i in range(depth)]
    found = {}
    with style():
        if any(layer.tokens for row in rows for layer in row.values()):
            found["eigenvalues"] = _eigenvalues(rows)
        if any(_integrated(layer) for row in rows for layer in row.values()):
            found["exactness"] = _exactness(rows)
        for name, every in (("forgetting", _FORGETTING), ("state", _STATE)):
            panels = [p for p in every if any(p.parts(row) for row in rows)]
            if panels:
                figure, grid = _page(len(panels), depth)
                _draw(figure, grid, panels, rows, looks)
                _explain(figure, _drawn(panels, rows, looks), _lines(looks))
                found[name] = figure
        found["reach"] = _reach(rows, diagnoses, looks)
    return found


def overview(name: str, diagnosis: Diagnosis) -> Figure | None:
    """Draw the most telling of these for one run; None where its mixers have nothing to show."""
    looks, rows = lines([name]), [{name: layer} for layer in diagnosis.layers]
    panels = [p for p in _OVERVIEW if any(p.parts(row) for row in rows)]
    strips = any(layer.tokens for layer in diagnosis.layers)
    if not panels:
        return None
    with style():
        figure, grid = _page(len(panels), len(rows), wide=strips)
        figure.set_figwidth(_ROOM * max(2, len(panels) + strips))
        _draw(figure, grid, panels, rows, looks)
        if strips:
            _strip_column(figure, grid, len(panels), diagnosis)
        figure.suptitle(name, fontsize="medium", weight="bold")
        rings = any(layer.kind == "attention" for layer in diagnosis.layers)
        _note(figure, [*_lines(looks), *(["rings: attention, by its own weights"] * rings)])
    return figure


def _strip_column(figure: Figure, grid: GridSpec, column: int, diagnosis: Diagnosis) -> None:
    tokens = [layer.tokens for layer in diagnosis.layers]
    centres = _centres([t for t in tokens if t is not None])
    for i, own in enumerate(tokens):
        ax = figure.add_subplot(grid[i, column])
        if own is not None:
            _strips(ax, own, centres)
            ax.set_ylabel("head")
        else:
            _nothing(ax)
            ax.set_yticks([])
        if i == 0:
            ax.set_title("eigenvalues\nalong the key", loc="left", pad=9)
        ax.tick_params(labelbottom=i == len(tokens) - 1)
    ax.set_xlabel("eigenvalue\n(dark: many tokens)")


class Drawn(NamedTuple):
    """What a panel shows of a run: the layer's kind, what was measured, its curve and look."""

    kind: str
    part: Any
    curve: Curve
    look: Line


class Panel(NamedTuple):
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
    curve: Callable[[Any], Curve]
    frame: Callable[[Axes, list[Drawn]], None]

    def parts(self, row: dict[str, LayerDiagnosis]) -> dict[str, Any]:
        """Return what there is to draw of the runs."""
        found = {name: self.part(layer) for name, layer in row.items()}
        return {name: part for name, part in found.items() if part is not None}


def _page(columns: int, rows: int, *, wide: int = 0) -> tuple[Figure, GridSpec]:
    """Open a figure across the page."""
    width = PAGE * min(1, (columns + wide) / 3 + 0.1)
    figure = Figure(figsize=(width, 1.2 + 1.35 * rows))
    return figure, figure.add_gridspec(rows, columns + wide)


def _draw(
    figure: Figure, grid: GridSpec, panels: list[Panel], rows: list[dict[str, LayerDiagnosis]], looks: dict[str, Line]
) -> None:
    """Draw panels in columns and layers in rows; a column has the same axes everywhere."""
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
                _nothing(ax)
            ax.tick_params(labelbottom=ax is cells[-1][0])
        cells[0][0].set_title(panel.title, loc="left")
        cells[-1][0].set_xlabel(panel.x)


def _drawn(panels: list[Panel], rows: list[dict[str, LayerDiagnosis]], looks: dict[str, Line]) -> dict[str, Line]:
    """Return the looks of the runs that appear in some panel."""
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


def _explain(figure: Figure, looks: dict[str, Line], notes: list[str]) -> None:
    """Put the legend above, and below what lines and shades are."""
    handles = [Line2D([], [], color=x.color, dashes=x.dashes, label=n) for n, x in looks.items()]
    across = int(figure.get_figwidth() * 15) // (max(map(len, looks)) + 7)
    figure.legend(handles=handles, loc="outside upper center", ncols=max(1, across))
    _note(figure, notes)


def _note(figure: Figure, notes: list[str]) -> None:
    text = textwrap.fill("; ".join(notes), int(figure.get_figwidth() * 23))
    figure.supxlabel(text, fontsize=_SMALL, color=_GREY, x=0.99, ha="right")


def _lines(looks: dict[str, Line]) -> list[str]:
    shades = ["shades: quartiles"] if len(looks) <= _WITH_QUARTILES else []
    return ["lines: medians over heads and sequences", *shades]


def _mark(ax: Axes, y: float, text: str, side: Literal["left", "right"] = "right") -> None:
    """Draw a level across a panel, and its name at one end."""
    ax.axhline(y, color=_GREY, linewidth=0.7, linestyle=":", zorder=0)
    ax.annotate(
        text,
        (side == "right", y),
        xycoords=("axes fraction", "data"),
        xytext=(0 if side == "right" else 3, 1),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=_SMALL,
        color=_GREY,
    )


# ------------------------------------------------------------------ eigenvalues


def _eigenvalues(rows: list[dict[str, LayerDiagnosis]]) -> Figure:
    """Draw a strip per head: where the eigenvalues of its tokens lie."""
    runs = list(dict.fromkeys(n for row in rows for n, x in row.items() if x.tokens))
    centres = _centres([x.tokens for row in rows for x in row.values() if x.tokens])
    figure, cells = _by_run(rows, runs)
    shown = None
    for ax, name, i in cells:
        tokens = rows[i][name].tokens if name in rows[i] else None
        if tokens is not None:
            shown = _strips(ax, tokens, centres)
        else:
            _nothing(ax)
            ax.set_yticks([])
        if ax.get_ylabel():
            ax.set_ylabel(f"layer {i}, head")
    figure.supxlabel("eigenvalue of the transition along the token's key", fontsize="medium")
    if shown is not None:
        bar = figure.colorbar(shown, ax=figure.axes, shrink=0.6, aspect=30, pad=0.02)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
        bar.set_label("tokens of a head in a bin")
    return figure


def _by_run(
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


def _centres(tokens: list[PerToken]) -> np.ndarray:
    """Return the middles of bins that hold all eigenvalues; one of them is 0."""
    least = min(float(t.eigenvalue.min()) for t in tokens)
    first = -1.1 if least < -_BIN / 2 else -0.1
    return np.arange(round(first / _BIN), round(1.1 / _BIN) + 1) * _BIN


def _nothing(ax: Axes) -> None:
    ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center", color=_GREY)


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
            ax.axvline(mark, color=_GREY, linewidth=0.7, linestyle=":")
    ax.set_xticks([mark for mark in (-1, -0.5, 0, 0.5, 1) if centres[0] <= mark])
    _plain(ax.xaxis)
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
            fontsize=_SMALL,
        )
    return image


# ------------------------------------------------------------------ exactness


def _integrated(layer: LayerDiagnosis) -> PerToken | None:
    """Return the tokens of a layer of the delta family, whose x a step is taken over."""
    return layer.tokens if layer.tokens and layer.tokens.beta is not None else None


def _exactness(rows: list[dict[str, LayerDiagnosis]]) -> Figure:
    """Draw a panel per run and layer: on how many tokens each step errs by how much."""
    runs = list(dict.fromkeys(n for row in rows for n, x in row.items() if _integrated(x)))
    figure, cells = _by_run(rows, runs, around=0.9)
    looks = lines(list(_STEPS))
    for ax, name, i in cells:
        tokens = _integrated(rows[i][name]) if name in rows[i] else None
        ax.set_xscale("log")
        ax.set_xlim(*_ERRORS)
        ax.set_xticks([1e-6, 1e-3, 1])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
        if tokens is None or tokens.x is None:
            _nothing(ax)
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
            fontsize=_SMALL,
            color=_GREY,
        )
    figure.supxlabel("error along the key,\n|factor of the step - exp(-x)|", fontsize="medium")
    figure.supylabel("tokens with a larger error", fontsize="medium")
    handles = [Line2D([], [], color=look.color, dashes=look.dashes, label=_STEPS[step]) for step, look in looks.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4 if len(runs) > 1 else 2)
    return figure


# ------------------------------------------------------------------ forgetting


def _frame_x(ax: Axes, drawn: list[Drawn]) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    if any(run.part.beta is not None for run in drawn):
        ax.set_xlim(right=max(10, ax.get_xlim()[1]))
        for at, text, shift in ((EULER_LIMIT, "Euler's limit", -6), (SATURATED, "saturated", 2)):
            ax.axvline(at, color=_GREY, linewidth=0.7, linestyle=":", zorder=0)
            ax.annotate(
                f"{text}, {at:g}",
                (at, 0.04),
                xycoords=("data", "axes fraction"),
                rotation=90,
                xytext=(shift, 0),
                textcoords="offset points",
                va="bottom",
                fontsize=_SMALL,
                color=_GREY,
            )


def _frame_products(ax: Axes, drawn: list[Drawn]) -> None:
    ax.set_xscale("log")
    _plain(ax.xaxis)
    _fall(ax)
    _mark(ax, 1 / math.e, "1/e", "left")


def _frame_remembering(ax: Axes, drawn: list[Drawn]) -> None:
    ax.set_xscale("log")
    ax.margins(x=0)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    _plain(ax.xaxis)
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
            fontsize=_SMALL,
            color=run.look.color,
        )


def _fall(ax: Axes) -> None:
    """Scale for what starts at about 1 and falls, or does not."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(min(max(low, _FLOOR), 0.09), max(high, 1.3))
    _plain(ax.yaxis)


def _plain(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


_FORGETTING = [
    Panel(
        "tokens with at most this x",
        "x: beta |k|², or -log decay",
        lambda layer: layer.tokens if layer.tokens and layer.tokens.x is not None else None,
        x_shares,
        _frame_x,
    ),
    Panel(
        "median singular value of\nproducts of transitions",
        "lag, tokens",
        lambda layer: layer.products,
        products_left,
        _frame_products,
    ),
    Panel(
        "heads with a longer horizon",
        "lag, tokens\n(numbers: beyond the longest)",
        lambda layer: layer.products,
        remembering,
        _frame_remembering,
    ),
]


# ------------------------------------------------------------------ state


def _frame_rank(ax: Axes, drawn: list[Drawn]) -> None:
    sizes = sorted({run.part.log_singular_values.shape[-1] for run in drawn})
    ax.set_ylim(0, max(1.12 * sizes[-1], ax.get_ylim()[1]))
    for size in sizes:
        _mark(ax, size, f"capacity {size}")


def _frame_sizes(ax: Axes, drawn: list[Drawn]) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _fall(ax)


def _frame_keys(ax: Axes, drawn: list[Drawn]) -> None:
    _frame_sizes(ax, drawn)
    _mark(ax, 1, "orthogonal keys")


_STATE = [
    Panel("effective rank\nof the state", "tokens read", lambda layer: layer.state, rank_over_time, _frame_rank),
    Panel(
        "singular values of the last state,\nshare of the largest",
        "index",
        lambda layer: layer.state,
        state_sizes,
        _frame_sizes,
    ),
    Panel(
        "Gram eigenvalues of the keys,\ntimes their width", "index", lambda layer: layer.keys, key_spread, _frame_keys
    ),
]


# ------------------------------------------------------------------ reach and gain


def _frame_distance(ax: Axes, drawn: list[Drawn]) -> None:
    _evenly(ax, drawn, lambda read: (read - 1) / 2)


def _frame_width(ax: Axes, drawn: list[Drawn]) -> None:
    _evenly(ax, drawn, lambda read: read)


def _evenly(ax: Axes, drawn: list[Drawn], of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Draw what looking at all tokens alike gives."""
    read = np.array([1.0, max(run.curve.x[-1] for run in drawn)])
    ax.plot(read, of(read), color=_GREY, linewidth=0.7, linestyle=":", zorder=0)
    ax.annotate(
        "all alike",
        (read[1], of(read)[1]),
        xytext=(-2, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=_SMALL,
        color=_GREY,
    )


_REACH = [
    Panel(
        "mean distance looked back,\ntokens", "tokens read", lambda layer: layer.reach, reach_distance, _frame_distance
    ),
    Panel("tokens looked at,\nexp(entropy)", "tokens read", lambda layer: layer.reach, reach_width, _frame_width),
]


def _reach(rows: list[dict[str, LayerDiagnosis]], diagnoses: dict[str, Diagnosis], looks: dict[str, Line]) -> Figure:
    """Draw reach, where there is any, and gain beside it."""
    panels = [p for p in _REACH if any(p.parts(row) for row in rows)]
    figure, grid = _page(len(panels), len(rows), wide=1)
    _draw(figure, grid, panels, rows, looks)
    _gains(figure.add_subplot(grid[:, -1]), diagnoses, looks)
    notes = _lines(looks) if panels else []
    if any(layer.kind == "attention" for row in rows for layer in row.values()):
        notes.append("rings: attention, by its own weights")
    _explain(figure, looks, [*notes, "points and bars: medians and quartiles over sequences"])
    return figure


def _gains(ax: Axes, diagnoses: dict[str, Diagnosis], looks: dict[str, Line]) -> None:
    """Draw the gain of each layer and of the model, a row each; the runs one under the other."""
    depth = max(len(d.layers) for d in diagnoses.values())
    apart = 0.12 / len(diagnoses)
    for n, (name, found) in enumerate(diagnoses.items()):
        shift = ((n + 0.5) / len(diagnoses) - 0.5) * 0.8
        places = [*enumerate(layer.gain for layer in found.layers), (depth, found.gain)]
        for i, gain in places:
            for size, y, face in (
                (gain_size(gain.token), i + shift - apart, looks[name].color),
                (gain_size(gain.noise), i + shift + apart, "white"),
            ):
                ax.hlines(y, size.low, size.high, color=looks[name].color, linewidth=1)
                ax.plot(
                    size.middle,
                    [y],
                    "D",
                    color=looks[name].color,
                    markerfacecolor=face,
                    markersize=3.5,
                    markeredgewidth=0.8,
                )
    ax.axvline(1, color=_GREY, linewidth=0.7, linestyle=":", zorder=0)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    if high < 32 * low:
        ax.set_xscale("log", base=2)
    _plain(ax.xaxis)
    ax.set_yticks(range(depth + 1), [*(f"layer {i}" for i in range(depth)), "model"])
    ax.set_ylim(depth + 0.5, -0.5)
    for i in range(depth):
        ax.axhline(i + 0.5, color="0.85", linewidth=0.6, zorder=0)
    ax.tick_params("y", length=0)
    ax.set_title("gain of a change of its input,\nruns in the legend's order", loc="left")
    ax.set_xlabel("out over in, both relative\n(filled: a token, hollow: noise)")


_OVERVIEW = [_FORGETTING[1], _STATE[0], _REACH[0]]
