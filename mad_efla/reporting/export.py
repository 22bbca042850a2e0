"""Leaderboards as text for other programs: JSON, CSV, LaTeX. Equal scores give equal bytes."""

import json

from mad_efla.analysis.cells import Cell
from mad_efla.analysis.leaderboard import Leaderboard
from mad_efla.reporting import renderers, tables


def as_json(boards: list[Leaderboard]) -> str:
    """Write everything, fields by name."""

    def plain(value: object) -> object:
        if isinstance(value, Cell):
            return _cell(value)
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return {k: plain(v) for k, v in value._asdict().items()}  # type: ignore[attr-defined]
        return [plain(v) for v in value] if isinstance(value, list) else value

    return json.dumps([plain(board) for board in boards], indent=1) + "\n"


def _cell(cell: Cell) -> dict[str, object]:
    accuracy = cell.accuracy
    return {
        "task": cell.task,
        "setting": cell.setting,
        "mixer": cell.mixer,
        "point": cell.point,
        "seeds": cell.seeds,
        "values": list(cell.values().values()),
        "accuracy": accuracy._asdict() if accuracy else None,
        "macro_accuracy": cell.macro_accuracy,
        "sequence_accuracy": cell.sequence_accuracy,
        "loss": cell.loss,
        "missing": cell.missing,
        "note": cell.note,
        "runs": [run.fingerprint for run in cell.runs],
    }


def as_csv(boards: list[Leaderboard]) -> str:
    """Write one row per task and mixer, plan and protocol in front."""
    return "".join(renderers.csv_rows(tables.scores(board), heads=not i) for i, board in enumerate(boards))


def as_latex(boards: list[Leaderboard]) -> str:
    """Write a booktabs table per protocol: mixers by tasks, in percent, the best in bold."""
    return "\n".join(renderers.latex(tables.mixers(board)) for board in boards)
