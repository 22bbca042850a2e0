"""The report: `page.py`'s chapters as a page of HTML that needs no other file, and its figures beside it.

Equal run files give equal bytes: no clock is read, and dates are those of the runs. Every figure is
drawn twice, for a page and for a phone, and the browser shows the one that fits.
"""

import io
import re
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from mad_efla.config import ConfigError
from mad_efla.reporting import charts, figures, renderers
from mad_efla.reporting.charts import Picture
from mad_efla.reporting.page import Chapter, Charts, Section, chapters, days, distinct
from mad_efla.reporting.table import Table
from mad_efla.runs.files import write_bytes

_PHONE = 3.6  # inches


class Inlined(NamedTuple):
    """A figure as part of the page, drawn for a page and, if it can be, for a phone."""

    caption: str
    page: Markup
    phone: Markup | None


def write(out: Path, to: Path) -> list[Path]:
    """Write the page to `to`, and every figure as PNG and SVG to `figures/` beside it.

    Args:
        out: The folder of run folders.
        to: The file; its folder is made.

    Returns:
        The page, then the figures.

    Raises:
        ConfigError: There is no sweep, or the page cannot be written.
    """
    found, drawer = chapters(out), _Drawer(to.parent / "figures")
    shown = [(chapter, _filled(chapter, drawer)) for chapter in found]
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.render(chapters=shown, about=_about(found), html=renderers.html)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(to, page.encode())
    except OSError as error:
        raise ConfigError(f"{to}: {error.strerror or error}; name another file") from None
    return [to, *drawer.written]


def _about(found: list[Chapter]) -> str:
    done = [r for chapter in found for r in chapter.group.results.values()]
    if not done:
        return "No run is done yet."
    versions = distinct(v for r in done if (v := r.environment.get("mad-efla")))
    runs = f"{len({r.fingerprint for r in done})} runs, {days(r.ended for r in done)}"
    return f"{runs}, mad-efla {versions}" if versions else runs


def _filled(chapter: Chapter, drawer: "_Drawer") -> list[tuple[Section, list[Table | Inlined]]]:
    """Draw the figures of a chapter, and leave out sections without a block."""
    prefix = f"{chapter.group.plan}-{chapter.group.protocol}".replace("/", "-")
    found = []
    for section in chapter.sections():
        blocks: list[Table | Inlined] = []
        for block in section.blocks:
            if isinstance(block, Charts):
                blocks += [drawer.draw(prefix, picture) for picture in charts.DRAW[block.name](chapter)]
            else:
                blocks.append(block)
        if blocks:
            found.append((section, blocks))
    return found


class _Drawer:
    """Draws figures, writes them, and sets them into the page.

    Attributes:
        written: Files, in order.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: list[Path] = []
        self._count = 0

    def draw(self, prefix: str, picture: Picture) -> Inlined:
        """Draw a picture for a page and, if it can be, for a phone; write the former."""
        page = picture.draw(figures.PAGE)
        phone = self._inline(picture.draw(_PHONE), picture.caption) if picture.narrow else None
        file = re.sub(r"[^\w.-]+", "-", f"{prefix}-{picture.name}")
        self.written += figures.save(page, self.folder / file)
        return Inlined(picture.caption, self._inline(page, picture.caption), phone)

    def _inline(self, figure: Figure, caption: str) -> Markup:
        """Return a figure as an element of the page, its ids like those of no other."""
        text = io.StringIO()
        with figures.style():
            figure.savefig(text, format="svg", metadata={"Date": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
        self._count += 1
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{self._count}-", svg)
        wide = round(96 * figure.get_figwidth())
        opening = f'<svg role="img" aria-label="{escape(caption)}" style="--width: {wide}px"'
        return Markup(svg.replace("<svg", opening, 1))
