"""A picture of a task: sequences as rows of cells, and below each scored token its answer, as SVG.

Colour is the token's role; a role of one letter is a sign, and stands in its cell instead of an id.
Keys, values and the rest differ in lightness too, so that a print without colour tells them apart.
It is text, not a plot: the reader's machine brings the font.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from mad_efla.config import ConfigError
from mad_efla.reporting.catalogue import Block
from mad_efla.runs.files import write_bytes
from mad_efla.tasks import IGNORE

_PER_LINE = 24
_HEIGHT, _GAP = 26, 3  # of a cell and between cells, pixels
_MARGIN, _LABELS = 10, 62  # around the picture, and for the words on the left
_LETTER = 7.5  # of digits and of the legend
_FADED = ("blank", "pad", "filler", "idle")  # one id, and nothing to read in it


class Look(NamedTuple):
    """How the cell of a role is drawn."""

    fill: str
    text: str
    border: str


# Okabe and Ito's colours, https://jfly.uni-koeln.de/color/.
_PALE = Look("#f4f4f4", "#6b6b6b", "#b5b5b5")
_MARKER = Look("#3a3a3a", "#ffffff", "#3a3a3a")
_LOOKS = {
    **dict.fromkeys(("key", "stack"), Look("#0072b2", "#ffffff", "#0072b2")),
    "value": Look("#f0b73c", "#111111", "#f0b73c"),
    **dict.fromkeys(("token", "bit", "digit", "element"), Look("#8ecdf0", "#111111", "#8ecdf0")),
    "pixel": Look("#8a8a8a", "", "#6b6b6b"),
    **dict.fromkeys(("copy", "insert", "compress", "mark"), _MARKER),
    **dict.fromkeys(("noise", *_FADED), _PALE),
}
_OTHER = Look("#ffffff", "#111111", "#6b6b6b")  # roles of a user's own task
_ANSWER = Look("#ffffff", "#111111", "#d55e00")


def picture(task: str, examples: Iterable[Block]) -> str:
    """Draw examples one under the other, and a legend of the roles that occur.

    Args:
        task: Its name, for readers who do not see.
        examples: As `catalogue.examples` gives them; negative targets are not scored.
    """
    examples = list(examples)
    shown = [x for inputs, _, targets, _ in examples for x in (*inputs, *targets) if x != IGNORE]
    longest = max(len(str(x)) for x in shown if isinstance(x, int))
    wide = max(_HEIGHT + 2, round(_LETTER * longest) + 12)
    parts: list[str] = []
    y = _MARGIN
    for inputs, roles, targets, _ in examples:
        for start in range(0, len(inputs), _PER_LINE):
            line = slice(start, start + _PER_LINE)
            parts += _line(inputs[line], roles[line], targets[line], y, wide)
            y += 2 * _HEIGHT + 28
    columns = min(_PER_LINE, max(len(inputs) for inputs, *_ in examples))
    width = _LABELS + 2 * _MARGIN + columns * (wide + _GAP)
    legend, y = _legend([r for _, roles, *_ in examples for r in roles], y + 2, width)
    return "\n".join([*_opening(task, width, y + _MARGIN), *parts, *legend, "</svg>\n"])


def save(picture: str, path: Path) -> None:
    """Write a picture; folders are made.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, picture.encode())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; name another file") from None


def _opening(task: str, width: int, height: int) -> list[str]:
    label = f"{task}: examples; below each scored token stands its answer"
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(label)}" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]


def _line(inputs: Sequence[float], roles: list[str], targets: list[int], y: int, wide: int) -> list[str]:
    """Draw tokens, and a row lower the answers, each hanging from the token that is to give it.

    That is the scored one, unless there is one into which all is compressed.
    """
    below = y + _HEIGHT + 11
    left = [_MARGIN + _LABELS + i * (wide + _GAP) for i in range(len(inputs))]
    parts = [_words("reads", _MARGIN, y), _words("answers", _MARGIN, below)]
    scored = [i for i, target in enumerate(targets) if target >= 0]
    middle = [x + wide / 2 for x in left]
    if "compress" in roles:
        rail = below - 5
        parts.append(_path(f"M{middle[roles.index('compress')]:g} {y + _HEIGHT}V{rail}"))
        parts.append(_path(f"M{middle[scored[0]]:g} {rail}H{middle[scored[-1]]:g}"))
        parts += [_path(f"M{middle[i]:g} {rail}V{below}") for i in scored]
    else:
        parts += [_path(f"M{middle[i]:g} {y + _HEIGHT}V{below}") for i in scored]
    for x, token, role, target in zip(left, inputs, roles, targets, strict=True):
        if role == "pixel":
            parts += _cell(x, y, wide, "", _ink(token))
        else:
            shown = role if len(role) == 1 else str(token)
            parts += _cell(x, y, wide, "" if role in _FADED else shown, _look(role))
        if target >= 0:
            parts += _cell(x, below, wide, str(target), _ANSWER)
    return parts


def _path(d: str) -> str:
    return f'<path d="{d}" fill="none" stroke="{_ANSWER.border}" stroke-width="2"/>'


def _legend(roles: list[str], y: int, width: int) -> tuple[list[str], int]:
    """Draw a cell and a word for each role, and for answers; return where they end, too."""
    entries = [(role, _look(role)) for role in dict.fromkeys(roles) if len(role) > 1]
    entries.append(("answer, scored", _ANSWER))
    parts: list[str] = []
    x = left = _MARGIN + _LABELS
    for word, look in entries:
        needed = 22 + round(_LETTER * len(word)) + 18
        if x > left and x + needed > width:
            x, y = left, y + 22
        parts += _cell(x, y, 16, "", look, height=16)
        parts.append(_words(word, x + 22, y, height=16))
        x += needed
    return parts, y + 16


def _look(role: str) -> Look:
    return _LOOKS.get(role, _OTHER)


def _ink(value: float) -> Look:
    """Show a real number of [0, 1] as a grey, 1 as black."""
    grey = round(255 * (1 - min(max(value, 0.0), 1.0)))
    return Look(f"#{grey:02x}{grey:02x}{grey:02x}", "", _OTHER.border)


def _cell(x: int, y: int, wide: int, text: str, look: Look, height: int = _HEIGHT) -> list[str]:
    border = f'stroke="{look.border}" stroke-width="1.5"'
    place = f'x="{x}" y="{y}" width="{wide}" height="{height}" rx="4"'
    parts = [f'<rect {place} fill="{look.fill}" {border}/>']
    if text:
        parts.append(
            f'<text x="{x + wide / 2:g}" y="{y + height / 2 + 4.5:g}" text-anchor="middle" '
            f'fill="{look.text}">{escape(text)}</text>'
        )
    return parts


def _words(text: str, x: int, y: int, height: int = _HEIGHT) -> str:
    return f'<text x="{x}" y="{y + height / 2 + 4.5:g}" fill="#444444">{escape(text)}</text>'
