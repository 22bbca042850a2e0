"""Figures that belong to a run or a sweep, in its folder; MLflow shows them as artifacts.

    runs/<fingerprint>/figures/spectrum.png     a run's memory on a page
    runs/<fingerprint>/figures/spectrum.json    all scalars of its diagnosis, layer by layer
    runs/sweeps/<id>/leaderboard.png            mixers by settings

Drawing takes most of a second, and a sweep may have thousands of runs. So a sweep has drawn, of
each mixer in each setting, the run that is best on validation at the chosen grid point, and no run
twice.
"""

import io
from pathlib import Path

from matplotlib.figure import Figure

from mad_efla import spectrum
from mad_efla.analysis.cells import Cell, cells
from mad_efla.reporting.figures import spectra, style, sweeps
from mad_efla.runs.archive import ArchivedRun
from mad_efla.runs.files import read_json, write_bytes, write_json
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import of_record
from mad_efla.runs.schema import SweepRecord
from mad_efla.runs.sweeps import sweep_figures
from mad_efla.spectrum import Diagnosis

_EXAMPLES = 4  # sequences of the test split that are looked at
_DPI = 200


def of_sweep(out: Path, record: SweepRecord) -> list[Path]:
    """Draw a sweep's leaderboard, and the spectra of its best runs that have none yet.

    Returns:
        What was written.
    """
    group = of_record(record, out)
    found = cells(group)
    lines = [cell for cell in found if cell.accuracy]
    if not lines:
        return []
    to = sweep_figures(out, record.id) / "leaderboard.png"
    written = [_write(to, _leaderboard(lines))]
    for run in filter(None, (cell.best_run for cell in found)):
        folder = group.folders[run.fingerprint]
        looked = isinstance(read_json(folder.figures / "spectrum.json"), dict)  # a file that is cut is drawn anew
        if not looked and (folder.path / "model.pt").exists():
            written += of_run(folder)
    return written


def of_run(folder: RunFolder | ArchivedRun, found: Diagnosis | None = None) -> list[Path]:
    """Draw what a finished run does with its memory.

    Args:
        folder: Of the run.
        found: Its diagnosis; None makes one.

    Returns:
        What was written.

    Raises:
        ConfigError: The run has no weights to look at.
    """
    run = folder.run()
    found = found or spectra.diagnose(folder, _EXAMPLES, 0)
    name = f"{run.mixer}, {run.task.name}, {run.setting}, seed {run.seed}"
    written = []
    if figure := spectra.overview(name, found):
        written.append(_write(folder.figures / "spectrum.png", figure))
    table = folder.figures / "spectrum.json"
    table.parent.mkdir(parents=True, exist_ok=True)
    write_json(table, spectrum.finite(found.scalars()))  # last: it says that all is drawn
    return [*written, table]


def _leaderboard(lines: list[Cell]) -> Figure:
    """Draw mixers by settings, the mixer with the highest mean first."""
    own: dict[str, list[float]] = {}
    for line in lines:
        if line.accuracy:
            own.setdefault(line.mixer, []).append(line.accuracy.mean)
    order = sorted(own, key=lambda mixer: -sum(own[mixer]) / len(own[mixer]))
    return sweeps.heat_map(
        {
            (line.mixer, line.setting): line.accuracy
            for mixer in order
            for line in lines
            if line.mixer == mixer and line.accuracy
        },
        x_label="test accuracy, %\n(95 % intervals over seeds)",
    )


def _write(path: Path, figure: Figure) -> Path:
    raw = io.BytesIO()
    with style():
        figure.savefig(raw, format="png", dpi=_DPI, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, raw.getvalue())
    return path
