"""A renderer per format: terminal, Markdown, HTML, LaTeX, CSV. Equal tables give equal text."""

import csv
import io
import re
import textwrap
from dataclasses import replace

import rich.box
import rich.table
from markupsafe import Markup, escape
from rich.text import Text

from mad_efla.analysis.statistics import Interval
from mad_efla.reporting.table import Column, Table, text

_NARROW, _WIDE = 10, 32  # letters: of a heading's line at least, of a value that is not broken
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def cells(table: Table) -> list[list[str]]:
    """Write every value of a table."""
    return [[text(value, column.form) for value, column in zip(row, table.columns, strict=True)] for row in table.rows]


def terminal(table: Table, width: int | None = None) -> rich.table.Table:
    """Lay a table out for a terminal.

    Args:
        table: What to show.
        width: Letters in a line; columns that may be spared are left out until the table fits. None for no bound.
    """
    table, spared = _fitting(table, width)
    note = "\n".join(filter(None, [table.note, f"no room for {', '.join(spared)}" if spared else ""])) or None
    drawn = rich.table.Table(
        title=table.title or None,
        title_justify="left",
        title_style="bold",
        caption=note,
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    written = cells(table)
    for x, column in enumerate(table.columns):
        widest = max((len(row[x]) for row in written), default=0)
        justify = "left" if column.form == "text" else "right"
        drawn.add_column("\n".join(_heading(column, widest)), justify=justify, no_wrap=widest <= _WIDE)
    before = None
    for y, row in enumerate(written):
        first, row = row[0], list(row)
        if table.grouped and y and first != before:
            drawn.add_section()
        if table.grouped and first == before:
            row[0] = ""
        before = first
        bold = [("bold" if (y, x) in table.best else "") for x in range(len(row))]
        drawn.add_row(*(Text(word, style) for word, style in zip(row, bold, strict=True)))
    return drawn


def _fitting(table: Table, width: int | None) -> tuple[Table, list[str]]:
    """Leave out what may be spared until a table fits; name what was left out."""
    written, spared = cells(table), []
    widths = []
    for x, column in enumerate(table.columns):
        widest = max((len(row[x]) for row in written), default=0)
        widths.append(max(min(widest, _WIDE), *map(len, _heading(column, widest))) + 2)
    kept = list(range(len(widths)))
    while width is not None and sum(widths[x] for x in kept) > width:
        last = max(kept, key=lambda x: table.columns[x].spare)
        if not table.columns[last].spare:
            break
        kept.remove(last)
        spared.append(table.columns[last].name)
    rows = [[row[x] for x in kept] for row in table.rows]
    best = {(y, kept.index(x)) for y, x in table.best if x in kept}
    return replace(table, columns=[table.columns[x] for x in kept], rows=rows, best=best), spared


def _heading(column: Column, widest: int) -> list[str]:
    return textwrap.wrap(column.name, max(widest, _NARROW), break_long_words=False) or [""]


def markdown(table: Table) -> str:
    """Write a table as Markdown; its title is a line of its own."""
    lines = [[column.name for column in table.columns], ["---"] * len(table.columns)]
    for y, row in enumerate(cells(table)):
        lines.append([f"**{w}**" if (y, x) in table.best else w for x, w in enumerate(row)])
    body = "\n".join("| " + " | ".join(_markdown(word) for word in line) + " |" for line in lines)
    if table.folded:
        summary = f"<details><summary>{table.title}</summary>"
        return "\n\n".join(filter(None, [summary, body, table.note, "</details>"]))
    return "\n\n".join(filter(None, [table.title, body, table.note]))


def _markdown(word: str) -> str:
    return word.replace("|", r"\|").replace("\n", "<br>")


def html(table: Table) -> Markup:
    """Write a table as an element of a page; an interval stands under its number."""
    parts = ["<table>" if any(c.name for c in table.columns) else '<table class="facts">']
    if any(column.name for column in table.columns):
        heads = "".join(f'<th scope="col">{escape(c.name)}</th>' for c in table.columns)
        parts.append(f"<thead><tr>{heads}</tr></thead>")
    parts.append("<tbody>")
    for y, row in enumerate(cells(table)):
        words = [_html(word, bold=(y, x) in table.best) for x, word in enumerate(row)]
        rest = "".join(f"<td>{word}</td>" for word in words[1:])
        parts.append(f'<tr><th scope="row">{words[0]}</th>{rest}</tr>')
    return Markup("\n".join([*parts, "</tbody>", "</table>"]))


def _html(word: str, *, bold: bool) -> Markup:
    number, bracket, rest = word.partition(" [")
    shown = escape(number if bracket and rest.endswith("]") else word)
    shown = Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(shown)))
    shown = Markup("<br>").join(shown.split("\n"))
    if bold:
        shown = Markup("<b>{}</b>").format(shown)
    if bracket and rest.endswith("]"):
        shown += Markup(" <small>[{}</small>").format(rest)
    return shown


def latex(table: Table) -> str:
    """Write a booktabs table; title and note are comments."""
    forms = "".join("l" if column.form == "text" else "c" for column in table.columns)
    lines = [f"% {line}" for line in table.title.splitlines()]
    lines += [rf"\begin{{tabular}}{{{forms}}}", r"\toprule"]
    lines += [" & ".join(_escape(column.name) for column in table.columns) + r" \\", r"\midrule"]
    for y, row in enumerate(cells(table)):
        words = [_latex(word, bold=(y, x) in table.best) for x, word in enumerate(row)]
        lines.append(" & ".join(words) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, *(f"% {line}" for line in table.note.splitlines()), ""])


def _latex(word: str, *, bold: bool) -> str:
    found = re.fullmatch(r"(\S+) (\[.*\])", word)
    number, interval = found.groups() if found else (word, "")
    number = rf"\textbf{{{_escape(number)}}}" if bold else _escape(number)
    return number + (rf" {{\scriptsize {_escape(interval)}}}" if interval else "")


def _escape(word: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in word)


def csv_rows(table: Table, *, heads: bool = True) -> str:
    """Write raw values, an interval as three columns: itself, low, high.

    Args:
        table: What to write.
        heads: Begin with a row of the columns' names.
    """
    wide = [
        column.form in ("share", "points") and any(isinstance(row[x], Interval) for row in table.rows)
        for x, column in enumerate(table.columns)
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if heads:
        names = []
        for column, three in zip(table.columns, wide, strict=True):
            names += [column.name] + [f"{column.name} {end}" for end in ("low", "high")] * three
        writer.writerow(names)
    for row in table.rows:
        words: list[object] = []
        for value, three in zip(row, wide, strict=True):
            if three:
                words += list(value) if isinstance(value, Interval) else ["", "", ""]
            else:
                words.append("" if value is None else value)
        writer.writerow(words)
    return out.getvalue()
