"""One typed table: what is shown, and nothing of how. `renderers.py` has a renderer per format.

A column's form says how its values are written, everywhere alike:

    text      as it is                            count    12,800
    share     an accuracy in [0, 1], in percent with its interval: 92.4 [90.1, 94.7]
    points    a difference of accuracies, with a sign: +3.1 [-0.2, 6.4]
    number    four significant digits             loss     four digits behind the point
    p         three significant digits            seconds  whole
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mad_efla.analysis.statistics import Interval

Form = Literal["text", "count", "share", "points", "number", "loss", "p", "seconds"]
Value = str | int | float | Interval | None


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: Its heading.
        form: How its values are written.
        spare: A terminal that is too narrow leaves out the columns with the largest number first; 0 always stays.
    """

    name: str
    form: Form = "text"
    spare: int = 0


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: From left to right.
        rows: A value for each column; None where there is none.
        title: Over it; may be empty.
        note: Below it, in whole sentences; may be empty.
        best: Rows and columns of values that are set off.
        grouped: Whether equal values of the first column are written once, with a line between.
        folded: Whether a page shows the title alone until it is opened.
    """

    columns: Sequence[Column]
    rows: list[list[Value]]
    title: str = ""
    note: str = ""
    best: set[tuple[int, int]] = field(default_factory=set)
    grouped: bool = False
    folded: bool = False


def text(value: Value, form: Form) -> str:
    """Write a value as its column says; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Interval):
        return _interval(value, "+" if form == "points" else "")
    match form:
        case "count":
            return f"{value:,}"
        case "share":
            return f"{100 * value:.1f}"
        case "points":
            return f"{100 * value:+.1f}"
        case "number":
            return f"{value:.4g}"
        case "loss":
            return f"{value:.4f}"
        case "p":
            return "< 0.0001" if value < 1e-4 else f"{value:.3g}"
        case "seconds":
            return f"{value:.0f}"
    return str(value)


def _interval(value: Interval, sign: str) -> str:
    mean = f"{100 * value.mean:{sign}.1f}"
    if value.low is None or value.high is None:
        return f"{mean} [-]"
    return f"{mean} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
