"""The tables that the terminal shows."""

import math
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from mad_efla.analysis.scores import Interval, Line
from mad_efla.contract import Finding
from mad_efla.plan.run import RunConfig
from mad_efla.spectrum.causes import Account

if TYPE_CHECKING:  # a second of scipy that a sweep does without
    from mad_efla.analysis.leaderboard import Leaderboard
_MOST_ROWS = 100  # of runs one by one

_ACCOUNTED = (
    "accuracy", "lambda_mean", "beta_mean", "x_mean", "erase_mean", "wiped", "saturated",
    "state_log_norm_max", "state_effective_rank", "keys_square_cosine", "gain_noise",
)  # fmt: skip
_ROLES = {"key": "bold cyan", "value": "green"}
_ROLES |= dict.fromkeys(("copy", "insert", "compress"), "bold magenta")
_ROLES |= dict.fromkeys(("noise", "blank", "pad", "filler"), "dim")


def results(lines: list[Line], title: str) -> Table:
    """Draw the table of a sweep, best first within each setting."""
    table = Table(title=title, title_justify="left", title_style="bold")
    point = any(line.point for line in lines)
    missing = any(line.missing for line in lines)
    for heading in ("setting", "mixer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("test accuracy %", "95 % interval", "seeds", "loss", "parameters", "state",
                    "steps to 90 %", "seconds"):  # fmt: skip
        table.add_column(heading, justify="right")
    for heading in ["chosen"] * point + ["not counted"] * missing:
        table.add_column(heading)
    previous = None
    for line in lines:
        if previous not in (None, line.setting):
            table.add_section()
        setting = "" if previous == line.setting else line.setting
        previous = line.setting
        table.add_row(setting, *_cells(line), *[_point(line)] * point, *[line.missing] * missing)
    return table


def accounts(found: list[Account]) -> list[Table]:
    """Draw what layers do over the severities of a corruption, and which parts are to blame."""
    first = found[0]
    tables = []
    for account in found:
        title = f"{account.mixer} under {account.corruption}"
        table = Table("mean over seeds", title=title, title_justify="left")
        for severity in account.severities:
            table.add_column(f"{severity:g}", justify="right")
        for name, values in account.scalars.items():
            if name in _ACCOUNTED:
                table.add_row(name, *(f"{value:.3g}" for value in values))
        tables.append(table)
    blamed = [account for account in found if account.blames]
    if blamed:
        title = f"test accuracy % at {first.corruption} {first.severity:g}: with only this part "
        table = Table("part", title=title + "corrupted / set back", title_justify="left")
        for account in blamed:
            table.add_column(account.mixer, justify="right")
        for part in blamed[0].blames:
            cells = [account.blames[part] for account in blamed]
            table.add_row(part, *(f"{100 * a.mean:.1f} / {100 * m.mean:.1f}" for a, m in cells))
        tables.append(table)
    return tables


def _cells(line: Line) -> list[str]:
    steps = "" if line.steps_to_90 is None else f"{line.steps_to_90:g}"
    return [
        line.mixer,
        "diverged" if line.accuracy is None else f"{100 * line.accuracy.mean:.2f}",
        _interval(line.accuracy),
        str(line.seeds),
        "" if line.loss is None else f"{line.loss:.4f}",
        f"{line.parameters:,}",
        f"{line.state_size:,}",
        steps or "not reached",
        f"{line.seconds:.0f}",
    ]


def _interval(accuracy: Interval | None) -> str:
    if accuracy is None or accuracy.low is None or accuracy.high is None:
        return "one seed" if accuracy else ""
    return f"{100 * accuracy.low:.1f} .. {100 * accuracy.high:.1f}"


def _point(line: Line) -> str:
    return ", ".join(f"{k.split('.')[-1]}={v}" for k, v in line.point.items())


def runs(found: list[RunConfig], columns: dict[str, list[Any]], sizes: dict) -> Table:
    """Draw the runs that a sweep would make, with what differs between them.

    A long sweep has a row per setting and mixer, with all the values of its runs in a cell.
    """
    rows: dict[Any, list[int]] = {}
    mixers = columns.get("mixer", [""] * len(found))
    for index, run in enumerate(found):
        row = index if len(found) <= _MOST_ROWS else (run.setting, mixers[index])
        rows.setdefault(row, []).append(index)
    table = Table(title_justify="left")
    table.add_column("run" if len(found) <= _MOST_ROWS else "runs", justify="right")
    for heading in columns:
        table.add_column(heading.split(".")[-1], justify="right")
    for heading in ("steps", "parameters", "state"):
        table.add_column(heading, justify="right")
    for indices in rows.values():
        cells = [
            ", ".join(str(v) for v in dict.fromkeys(column[i] for i in indices))
            for column in columns.values()
        ]
        run = found[indices[0]]
        parameters, state = sizes[run.fingerprint]
        first = run.fingerprint if len(found) <= _MOST_ROWS else str(len(indices))
        table.add_row(first, *cells, str(run.steps), f"{parameters:,}", f"{state:,}")
    return table


def leaderboard(board: "Leaderboard") -> list[Table]:
    """Draw the scores of one protocol: per task, over all tasks, and mixer against mixer."""
    tasks = Table(title=f"protocol {board.protocol}: tasks", title_justify="left")
    for heading in ("task", "mixer"):
        tasks.add_column(heading, no_wrap=True)
    for heading in ("accuracy %", "95 % interval", "of what can be known %", "best on test %",
                    "settings"):  # fmt: skip
        tasks.add_column(heading, justify="right")
    tasks.add_column("not counted")
    previous = None
    for t in sorted(board.tasks, key=lambda t: (t.task, -(t.accuracy or (-1.0,))[0])):
        if previous not in (None, t.task):
            tasks.add_section()
        name = "" if previous == t.task else t.task
        previous = t.task
        row = (_percent(t.accuracy), _interval(t.accuracy), _percent(t.of_ceiling),
               _percent(t.best_on_test), str(t.settings), t.missing)  # fmt: skip
        tasks.add_row(name, t.mixer, *row)
    mixers = Table(title="mean over tasks", title_justify="left")
    mixers.add_column("mixer", no_wrap=True)
    for heading in ("score %", "95 % interval", "mean rank"):
        mixers.add_column(heading, justify="right")
    mixers.add_column("")
    for m in board.mixers:
        rank = "" if m.rank is None else f"{m.rank:.2f}"
        state = "" if m.complete else "incomplete"
        mixers.add_row(m.mixer, _percent(m.average), _interval(m.average), rank, state)
    return [tasks, mixers, _differences(board)] if board.differences else [tasks, mixers]


def _differences(board: "Leaderboard") -> Table:
    table = Table(title="same tasks, settings and seeds, paired", title_justify="left")
    table.add_column("first minus second", no_wrap=True)
    for heading in ("points", "95 % interval", "pairs", "Wilcoxon p", "corrected p"):
        table.add_column(heading, justify="right")
    for d in board.differences:
        table.add_row(
            f"{d.first} - {d.second}", f"{100 * d.mean.mean:+.2f}", _interval(d.mean),
            str(d.pairs), f"{d.p:.3g}", f"{d.p_corrected:.3g}",
        )  # fmt: skip
    return table


def _percent(value: Interval | float | None) -> str:
    mean = value.mean if isinstance(value, Interval) else value
    return "" if mean is None else f"{100 * mean:.2f}"


def spectra(found: dict[str, dict[str, float]], against: str | None) -> Table:
    """Draw the scalars of diagnoses: a row per quantity, a column per run, layer after layer.

    Args:
        found: Scalars of `spectrum.Diagnosis`, by the runs' names.
        against: The run from which the others' differences are shown beside them.
    """
    title = "layer by layer, then their means; the last gains are the model's own"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for run in found:
        table.add_column(run, justify="right", min_width=10, overflow="fold")
        if against not in (None, run):
            table.add_column("difference", justify="right", min_width=10)
    rows = {key.removeprefix("spectrum/"): None for scalars in found.values() for key in scalars}
    layers = sorted({_layer(row) for row in rows})
    for layer in layers:
        for row in (row for row in rows if _layer(row) == layer):
            cells = []
            base = None if against is None else found[against].get(f"spectrum/{row}")
            for run, scalars in found.items():
                value = scalars.get(f"spectrum/{row}")
                cells.append("" if value is None else f"{value:z.4g}")
                if against not in (None, run):
                    cells.append(_difference(value, base))
            table.add_row(row, *cells)
        table.add_section()
    return table


def _difference(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value - base:+z.3g}"


def _layer(row: str) -> float:
    """Return the number in `layer0/x_mean`; the model's own rows come last."""
    first, _, rest = row.partition("/")
    return int(first.removeprefix("layer")) if rest else math.inf


def findings(title: str, found: list[Finding]) -> Table:
    """Draw what holds and what fails of a contract."""
    table = Table("", "promise", "how it is broken", title=title, title_justify="left")
    for promise, broken in found:
        table.add_row("FAILS" if broken else "holds", Text(promise), Text(broken))
    return table


def example(
    inputs: list[int] | list[float], roles: list[str], targets: list[int],
    answers: list[int] | None, columns: int,
) -> list[Text]:  # fmt: skip
    """Draw one sequence in blocks of lines: tokens by role, what is scored, what the solver says.

    Args:
        inputs: Token ids, or rounded numbers.
        roles: A word for each.
        targets: The answer at scored positions, negative elsewhere.
        answers: The solver's; None where there is no solver.
        columns: Width to fill.
    """
    width = max(len(str(t)) for t in (*inputs, *targets))
    per_line = max((columns - 8) // (width + 1), 1)
    lines = []
    for start in range(0, len(inputs), per_line):
        block = slice(start, start + per_line)
        tokens = [(f"{t:>{width}} ", _ROLES.get(r, "")) for t, r in
                  zip(inputs[block], roles[block], strict=True)]  # fmt: skip
        wanted = [_cell(t, t >= 0, width, "bold yellow") for t in targets[block]]
        lines.append(Text.assemble(("tokens  ", "dim"), *tokens))
        lines.append(Text.assemble(("scored  ", "dim"), *wanted))
        if answers is not None:
            solved = [
                _cell(a, t >= 0, width, "bold green" if a == t else "bold red")
                for t, a in zip(targets[block], answers[block], strict=True)
            ]
            lines.append(Text.assemble(("solver  ", "dim"), *solved))
        lines.append(Text(""))
    return lines


def _cell(token: int, scored: bool, width: int, style: str) -> tuple[str, str]:
    text = "" if not scored else "?" if token < 0 else str(token)
    return f"{text:>{width}} ", style
