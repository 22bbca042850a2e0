"""The look of all figures, and how they are written.

Colours tell apart for the colour-blind and dashes in print without colour; sizes are those of a
page with two columns of text. No window system is needed, and equal data give equal files.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import seaborn
from matplotlib.figure import Figure

from mad_efla.config import ConfigError

PAGE = 6.75
"""Inches of text across a page of two columns."""
MANY = 8
"""Lines that colour and dash tell apart in one panel."""

_DASHES = ((None, None), (4, 1.5), (1, 1), (3, 1.2, 1.2, 1.2), (7, 2), (5, 1, 1, 1, 1, 1), (2, 1), (7, 1.2, 2, 1.2))
_COLOURS = (0, 1, 2, 3, 4, 5, 7, 9)  # of seaborn's ten; its pink and its yellow are too pale


class Line(NamedTuple):
    """What one subject is drawn with in every panel, as `Axes.plot` takes it."""

    color: str
    dashes: tuple[float | None, ...]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in our style while inside; the caller's settings of matplotlib come back after it."""
    settings: dict[Any, Any] = seaborn.axes_style("ticks") | seaborn.plotting_context("paper", font_scale=0.85)
    settings |= {
        "axes.linewidth": 0.6,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlepad": 4,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.06,
        "figure.constrained_layout.w_pad": 0.06,
        "legend.frameon": False,
        "legend.handlelength": 2.6,
        "lines.linewidth": 1.3,
        "lines.scale_dashes": True,
        "savefig.dpi": 300,
        "svg.fonttype": "path",  # a reader's machine need not have the font
        "svg.hashsalt": "mad-efla",
        "text.hinting": "none",  # or letters are as wide as pixels allow, and layout depends on dpi
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
    }
    with matplotlib.rc_context(settings):
        yield


def lines(names: list[str]) -> dict[str, Line]:
    """Give each subject a colour and dashes of its own, the same in every panel.

    Raises:
        ConfigError: There are more than can be told apart.
    """
    if len(names) > MANY:
        raise ConfigError(f"{len(names)} runs in one figure: {MANY} can be told apart; name fewer")
    palette = seaborn.color_palette("colorblind").as_hex()
    return {n: Line(palette[c], d) for n, c, d in zip(names, _COLOURS, _DASHES, strict=False)}


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and as SVG, equal bytes for equal figures.

    Args:
        figure: Drawn in our style.
        path: Where, without an ending; folders are made.

    Raises:
        ConfigError: It cannot be written.
    """
    written = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with style():
            figure.savefig(written[0], metadata={"Software": None})
            figure.savefig(written[1], metadata={"Date": None})
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; name another folder") from None
    return written
