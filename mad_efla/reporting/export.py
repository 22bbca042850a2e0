"""Leaderboards as text for other programs: JSON, CSV, LaTeX. Equal scores give equal bytes."""

import csv
import io
import json

from mad_efla.analysis.leaderboard import Leaderboard, TaskScore
from mad_efla.analysis.scores import Interval

_COLUMNS = (
    "protocol", "mixer", "task", "accuracy", "low", "high", "best_on_test", "of_ceiling",
    "settings", "missing",
)  # fmt: skip


def as_json(boards: list[Leaderboard]) -> str:
    """Write everything, fields by name."""

    def plain(value: object) -> object:
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return {k: plain(v) for k, v in value._asdict().items()}  # type: ignore[attr-defined]
        return [plain(v) for v in value] if isinstance(value, list) else value

    return json.dumps([plain(board) for board in boards], indent=1) + "\n"


def as_csv(boards: list[Leaderboard]) -> str:
    """Write one row per protocol, mixer and task; the task `average` is the mean over tasks."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for board in boards:
        for t in board.tasks:
            rest = (t.best_on_test, t.of_ceiling, t.settings, t.missing)
            writer.writerow([board.protocol, t.mixer, t.task, *_three(t.accuracy), *rest])
        for m in board.mixers:
            missing = "" if m.complete else "incomplete"
            row = [board.protocol, m.mixer, "average", *_three(m.average), "", "", "", missing]
            writer.writerow(row)
    return text.getvalue()


def as_latex(boards: list[Leaderboard]) -> str:
    """Write a booktabs table per protocol: mixers by tasks, in percent, the best in bold."""
    return "\n".join(_latex(board) for board in boards)


def _latex(board: Leaderboard) -> str:
    tasks = list(dict.fromkeys(t.task for t in board.tasks))
    scores = {(t.mixer, t.task): t for t in board.tasks}
    lines = [
        f"% protocol {board.protocol}; 95 % bootstrap intervals over settings and seeds",
        r"\begin{tabular}{l" + "c" * (len(tasks) + 1) + "}",
        r"\toprule",
        " & ".join(["mixer", *(_escape(t) for t in tasks), "average"]) + r" \\",
        r"\midrule",
    ]
    best = {task: _best([s for (_, t), s in scores.items() if t == task]) for task in tasks}
    for mixer in board.mixers:
        cells = [_escape(mixer.mixer)]
        for task in tasks:
            score = scores.get((mixer.mixer, task))
            star = "$^{*}$" if score and score.missing else ""
            cells.append(_percent(score.accuracy if score else None, best[task]) + star)
        cells.append(_percent(mixer.average, None) + ("" if mixer.complete else "$^{*}$"))
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", "% * incomplete or diverged runs", ""]
    return "\n".join(lines)


def _best(scores: list[TaskScore]) -> float | None:
    return max((s.accuracy.mean for s in scores if s.accuracy), default=None)


def _percent(interval: Interval | None, best: float | None) -> str:
    if interval is None:
        return "--"
    mean = f"{100 * interval.mean:.1f}"
    mean = rf"\textbf{{{mean}}}" if interval.mean == best else mean
    low, high = (100 * (x if x is not None else interval.mean) for x in interval[1:])
    return rf"{mean} {{\scriptsize [{low:.1f}, {high:.1f}]}}"


def _three(interval: Interval | None) -> list[object]:
    return list(interval) if interval else [""] * 3


def _escape(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%")
