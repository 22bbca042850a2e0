"""Every table that people see: its columns, and the values in them; `renderers.py` writes them."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mad_efla.analysis.statistics import Interval
from mad_efla.contract import Finding
from mad_efla.plan.run import RunConfig
from mad_efla.reporting.table import Column, Table, Value

if TYPE_CHECKING:  # a second of scipy that a sweep does without
    from mad_efla.analysis.cells import Cell
    from mad_efla.analysis.corruption import Arm, CorruptionCurve
    from mad_efla.analysis.leaderboard import Leaderboard
    from mad_efla.spectrum.causes import Account

_MOST_ROWS = 100  # of runs one by one
_ACCOUNTED = (
    "accuracy",
    "lambda_mean",
    "beta_mean",
    "x_mean",
    "erase_mean",
    "wiped",
    "saturated",
    "state_log_norm_max",
    "state_effective_rank",
    "keys_square_cosine",
    "gain_noise",
)


# ------------------------------------------------------------------ scores


def sweep(found: "Sequence[Cell]", title: str = "") -> Table:
    """A row per cell: what a sweep's end, its page in MLflow and a report show of it."""
    columns = [
        Column("setting"),
        Column("mixer"),
        Column("test accuracy %", "share"),
        Column("seeds", "count"),
        Column("least, largest", spare=2),
        Column("per class %", "share", spare=7),
        Column("per sequence %", "share", spare=3),
        Column("loss", "loss", spare=6),
        Column("parameters", "count", spare=4),
        Column("state", "count", spare=1),
        Column("steps to 90 %", "count", spare=5),
        Column("seconds", "seconds", spare=8),
        Column("chosen"),
        Column("note"),
    ]
    rows: list[list[Value]] = [
        [
            f"{cell.setting} (check)" if cell.check else cell.setting,
            cell.mixer,
            cell.accuracy or "diverged",
            len(cell.seeds),
            _range(cell),
            cell.macro_accuracy,
            cell.sequence_accuracy,
            cell.loss,
            cell.parameters,
            _unknown(cell.state_size),
            _steps(cell.steps_to_90),
            cell.seconds,
            point(cell.point),
            _notes(cell.missing, cell.note),
        ]
        for cell in found
    ]
    return _without_empty(Table(columns, rows, title, grouped=True))


def _range(cell: "Cell") -> str:
    values = cell.values().values()
    return f"{100 * min(values):.1f}, {100 * max(values):.1f}" if len(values) > 1 else ""


def _unknown(size: int | None) -> Value:
    return "unknown" if size is None else size


def _steps(value: float | None) -> Value:
    return "-" if value is None else round(value)


def point(fields: dict[str, object]) -> str:
    """Write a grid point: `lr=0.005, weight_decay=0.1`."""
    return ", ".join(f"{key.split('.')[-1]}={value}" for key, value in fields.items())


def _notes(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def _without_empty(table: Table) -> Table:
    """Leave out columns that say nothing in any row."""
    kept = [
        x for x in range(len(table.columns)) if not table.rows or any(row[x] not in ("", None) for row in table.rows)
    ]
    columns = [table.columns[x] for x in kept]
    rows = [[row[x] for x in kept] for row in table.rows]
    best = {(y, kept.index(x)) for y, x in table.best if x in kept}
    return Table(columns, rows, table.title, table.note, best, table.grouped, table.folded)


def mixers(board: "Leaderboard") -> Table:
    """Mixers by tasks, the mean over tasks beside them; the best of each column is set off."""
    tasks = list(dict.fromkeys(t.task for t in board.tasks))
    scores = {(t.mixer, t.task): t for t in board.tasks}
    several = len(tasks) > 1
    columns = [Column("rank", "count"), Column("mixer"), *(Column(t, "share") for t in tasks)]
    columns += [Column("mean over tasks", "share")] * several + [Column("note")]
    rows: list[list[Value]] = []
    for mixer in board.mixers:
        own = [scores.get((mixer.mixer, task)) for task in tasks]
        missing = [f"{t.task}: {t.missing}" if several else t.missing for t in own if t and t.missing]
        notes = dict.fromkeys(t.note for t in own if t and t.note)
        rank = "-" if mixer.rank is None else mixer.rank
        means = [t.accuracy if t else None for t in own]
        rows.append([rank, mixer.mixer, *means, *[mixer.average] * several, _notes(*missing, *notes)])
    shown = [x for x, column in enumerate(columns) if column.form == "share"]
    return _without_empty(
        Table(
            columns,
            rows,
            best=_best(rows, shown),
            note=" ".join(f"{note[0].upper()}{note[1:]}." for note in board.notes),
        )
    )


def _best(rows: list[list[Value]], columns: Iterable[int]) -> set[tuple[int, int]]:
    """Find the highest mean of each column."""
    found = set()
    for x in columns:
        means = {y: v.mean for y, row in enumerate(rows) if isinstance(v := row[x], Interval)}
        found |= {(y, x) for y, mean in means.items() if mean == max(means.values())}
    return found


_TASKS = (
    Column("task"),
    Column("mixer"),
    Column("accuracy %", "share"),
    Column("per class %", "share"),
    Column("per sequence %", "share"),
    Column("of what can be known %", "share"),
    Column("best on test %", "share"),
    Column("settings", "count"),
    Column("seeds", "count"),
    Column("note"),
)


def tasks(board: "Leaderboard") -> Table:
    """A row per task and mixer: every accuracy, what can be known, the reference's rule."""
    order = list(dict.fromkeys(t.task for t in board.tasks))
    rows: list[list[Value]] = [
        [
            t.task,
            t.mixer,
            t.accuracy or "diverged",
            t.macro_accuracy,
            t.sequence_accuracy,
            t.of_ceiling,
            t.best_on_test,
            t.settings,
            t.seeds,
            _notes(t.missing, t.note),
        ]
        for t in sorted(board.tasks, key=lambda t: (order.index(t.task), -(t.accuracy or (-1.0,))[0]))
    ]
    title = f"plan {board.plan}, protocol {board.protocol}" if board.plan else board.protocol
    return Table(_TASKS, rows, title, grouped=True)


def scores(board: "Leaderboard") -> Table:
    """Every score as other programs want it: a row per task and mixer, then one per mixer."""
    found = tasks(board)
    columns = [Column("plan"), Column("protocol"), *_TASKS]
    rows: list[list[Value]] = [[board.plan, board.protocol, *row] for row in found.rows]
    for m in board.mixers:
        rest: list[Value] = [None] * (len(_TASKS) - 4)
        row: list[Value] = [board.plan, board.protocol, "mean over tasks", m.mixer, m.average]
        rows.append([*row, *rest, m.unranked])
    return Table(columns, rows)


def pairs(board: "Leaderboard") -> Table:
    """Differences of mixers, and both answers to whether they mean something."""
    columns = [
        Column("first minus second"),
        Column("points", "points"),
        Column("p, other seeds", "p"),
        Column("corrected p", "p"),
        Column("settings won, lost, open"),
        Column("p, settings agree", "p"),
        Column("differ?"),
        Column("note"),
    ]
    rows: list[list[Value]] = []
    for pair in board.pairs:
        d = pair.difference
        verdict = "yes" if pair.differ else "not settled"
        counts = f"{d.wins}, {d.losses}, {d.settings - d.wins - d.losses}"
        rows.append(
            [
                f"{pair.first} - {pair.second}",
                d.mean,
                "-" if d.p is None else d.p,
                "-" if pair.p_corrected is None else pair.p_corrected,
                counts,
                d.p_settings,
                verdict,
                f"without {pair.left_out}" if pair.left_out else "",
            ]
        )
    note = (
        "Same settings, seeds and weights on both sides. Other seeds: would they say the same on "
        "these settings (Student's t, corrected after Holm)? A setting is won or lost where its "
        "own interval leaves out zero; a sign test asks whether the settings agree. Two mixers "
        "differ where the corrected p is under 0.05 and no setting says the opposite."
    )
    title = "Differences in points of accuracy"
    return _without_empty(Table(columns, rows, title, note, folded=len(rows) > 30))


def settings(board: "Leaderboard", task: str) -> Table:
    """Settings by mixers of one task, in percent; the best of each setting is set off."""
    names = [m.mixer for m in board.mixers if any(t.mixer == m.mixer and t.task == task for t in board.tasks)]
    labels = list(dict.fromkeys(c.setting for c in board.cells if c.task == task))
    at = {(c.setting, c.mixer): c for c in board.cells if c.task == task}
    columns = [Column("setting"), *(Column(name, "share") for name in names)]
    rows: list[list[Value]] = []
    best = set()
    for y, label in enumerate(labels):
        own = [at.get((label, name)) for name in names]
        rows.append([label, *((c.accuracy or "diverged") if c else None for c in own)])
        means = [c.accuracy.mean if c and c.accuracy else -1.0 for c in own]
        best |= {(y, x + 1) for x, mean in enumerate(means) if mean == max(means) >= 0}
    return Table(columns, rows, best=best)


# ------------------------------------------------------------------ corruption


def corruption(arms: "list[Arm]") -> list[Table]:
    """Areas, then halves, of the mixers that were probed; none where none was."""
    if not arms:
        return []
    names = list(dict.fromkeys(name for arm in arms for name in arm.curves))
    labels = ["task", "setting", "mixer"]
    told = [f for f in labels if f == "mixer" or len({getattr(a, f) for a in arms}) > 1]
    areas: list[list[Value]] = []
    halves: list[list[Value]] = []
    for arm in arms:
        label = [getattr(arm, field) for field in told]
        found = [arm.curves.get(name) for name in names]
        scored = [arm.clean, arm.mean_area, *(c.area if c else None for c in found)]
        areas.append([*label, f"{arm.runs[0].optim.lr:g}", *scored])
        halves.append([*label, *(halved(c) if c else None for c in found)])
    heads = [Column(name) for name in told]
    shares = [Column(name, "share") for name in ("clean", "mean area", *names)]
    return [
        Table(
            [*heads, Column("learning rate", "number"), *shares],
            areas,
            note="Accuracy in percent on the clean test split, and its mean over the range of each "
            "corruption's severity (the area under its curve), before them the mean of these. The "
            "learning rate is the one chosen on clean validation data.",
        ),
        Table(
            [*heads, *(Column(name) for name in names)],
            halves,
            note="Severity at which accuracy is half of what it is without the corruption: median "
            "[least, largest] over seeds.",
        ),
    ]


def halved(curve: "CorruptionCurve") -> str:
    """Write the severity at which a curve halves; beyond the grid it is `> 10`."""
    last = curve.severities[-1]
    median, least, largest = (f"{h:.3g}" if h <= last else f"> {last:g}" for h in curve.half)
    return median if least == largest else f"{median} [{least}, {largest}]"


def accounts(found: "list[Account]") -> list[Table]:
    """What layers do over the severities of a corruption, and which parts are to blame."""
    first = found[0]
    tables = []
    for account in found:
        columns = [Column("mean over seeds")]
        columns += [Column(f"{severity:g}", "number") for severity in account.severities]
        rows: list[list[Value]] = [[name, *values] for name, values in account.scalars.items() if name in _ACCOUNTED]
        tables.append(Table(columns, rows, f"{account.mixer} under {account.corruption}"))
    if blamed := [account for account in found if account.blames]:
        title = f"test accuracy % at {first.corruption} {first.severity:g}: with only this part "
        rows = []
        for part in blamed[0].blames:
            cells = [account.blames[part] for account in blamed]
            rows.append([part, *(f"{100 * a.mean:.1f} / {100 * m.mean:.1f}" for a, m in cells)])
        columns = [Column("part"), *(Column(account.mixer) for account in blamed)]
        tables.append(Table(columns, rows, title + "corrupted / set back"))
    return tables


# ------------------------------------------------------------------ runs, spectra, contracts


def runs(found: list[RunConfig], columns: dict[str, list[Any]], sizes: dict[str, tuple[int, int | None]]) -> Table:
    """The runs that a sweep would make, with what differs between them.

    A long sweep has a row per setting and mixer, with all the values of its runs in a cell.

    Args:
        found: The runs.
        columns: What differs between them: by field, a value per run.
        sizes: Parameters and state size by fingerprint; a state may be unknown.
    """
    rows: dict[Any, list[int]] = {}
    mixers = columns.get("mixer", [""] * len(found))
    short = len(found) <= _MOST_ROWS
    for index, run in enumerate(found):
        rows.setdefault(index if short else (run.setting, mixers[index]), []).append(index)
    heads = [Column("run" if short else "runs")]
    heads += [Column(name.split(".")[-1]) for name in columns]
    heads += [Column(name, "count") for name in ("steps", "parameters", "state")]
    made: list[list[Value]] = []
    for indices in rows.values():
        cells = [", ".join(str(v) for v in dict.fromkeys(column[i] for i in indices)) for column in columns.values()]
        run = found[indices[0]]
        first = run.fingerprint if short else str(len(indices))
        parameters, state = sizes[run.fingerprint]
        made.append([first, *cells, run.steps, parameters, _unknown(state)])
    return Table(heads, made)


def spectra(found: dict[str, dict[str, float]], against: str | None) -> Table:
    """The scalars of diagnoses: a row per quantity, a column per run, layer after layer.

    Args:
        found: Scalars of `spectrum.Diagnosis`, by the runs' names.
        against: The run from which the others' differences are shown beside them.
    """
    columns = [Column("layer"), Column("")]
    for run in found:
        columns += [Column(run, "number")] + [Column("difference")] * (against not in (None, run))
    names = {key.removeprefix("spectrum/"): None for scalars in found.values() for key in scalars}
    rows: list[list[Value]] = []
    for name in sorted(names, key=_layer):
        base = None if against is None else found[against].get(f"spectrum/{name}")
        row: list[Value] = [name.rpartition("/")[0] or "all", name]
        for run, scalars in found.items():
            value = scalars.get(f"spectrum/{name}")
            row.append(value)
            if against not in (None, run):
                row.append(_difference(value, base))
        rows.append(row)
    title = "layer by layer, then their means; the last gains are the model's own"
    return Table(columns, rows, title, grouped=True)


def _difference(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value - base:+z.3g}"


def _layer(row: str) -> float:
    """Return the number in `layer0/x_mean`; the model's own rows come last."""
    first, _, rest = row.partition("/")
    return int(first.removeprefix("layer")) if rest else math.inf


def findings(title: str, found: list[Finding]) -> Table:
    """What holds and what fails of a contract, with a word on what is no fault."""
    columns = [Column(""), Column("promise"), Column("how it is broken, or what to know")]
    rows: list[list[Value]] = [["FAILS" if f.broken else "holds", f.promise, f.broken or f.word] for f in found]
    return Table(columns, rows, title)
