"""The figures of a chapter, by the names that `page.Charts` has; those of what runs cannot tell are none.

Each is a function of the width in inches, so that a page and a phone both have one that fits.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from matplotlib.figure import Figure

from mad_efla.analysis import curves
from mad_efla.analysis.cells import Cell
from mad_efla.config import ConfigError
from mad_efla.reporting import figures
from mad_efla.reporting.figures import robustness, spectra, sweeps
from mad_efla.reporting.figures.sweeps import Curve, Panel, StatePoint
from mad_efla.reporting.page import Chapter

_PANELS = 12  # in one figure for all tasks; beyond, each task has its own
_PAIRS = 15  # differences drawn at most; beyond, those to the first mixer
_DIAGNOSED = 4  # mixers whose spectra are drawn
_EXAMPLES = 8  # sequences that spectra are taken over

Drawn = Callable[[float], Figure]


class Picture(NamedTuple):
    """A figure that can be drawn.

    Attributes:
        name: Of its file, beside the chapter's.
        caption: What it shows.
        draw: Draws it, so many inches wide.
        narrow: Whether it can be drawn for a phone, too.
    """

    name: str
    caption: str
    draw: Drawn
    narrow: bool = True


def _scores(chapter: Chapter) -> list[Picture]:
    averages = {m.mixer: m.average for m in chapter.board.mixers if m.average}
    if len(averages) < 2:
        return []
    tasks = list(chapter.by_task())
    label = f"test accuracy, {'mean over tasks' if len(tasks) > 1 else tasks[0]}, %"
    caption = "Mean test accuracy and its 95 % interval over seeds, the highest first."
    return [Picture("scores", caption, lambda width: sweeps.rows(averages, x_label=label, width=width))]


def _mixers_by_tasks(chapter: Chapter) -> list[Picture]:
    if len(chapter.by_task()) < 2:
        return []
    heat = {(t.mixer, t.task): t.accuracy for t in chapter.board.tasks if t.accuracy}
    caption = "Mean test accuracy, mixers by tasks."
    return [Picture("mixers-by-tasks", caption, lambda width: sweeps.heat_map(heat, width=width))]


def _corruption(chapter: Chapter) -> list[Picture]:
    """Draw what becomes of accuracy under corruption, for tasks that score it."""
    found = []
    for task, setting in dict.fromkeys((arm.task, arm.setting) for arm in chapter.arms):
        own = [arm for arm in chapter.arms if (arm.task, arm.setting) == (task, setting)]
        groups = robustness.chunks([arm.mixer for arm in own])
        for i, names in enumerate(groups):
            drawn = [arm for arm in own if arm.mixer in names]
            where = f"{task}, {setting}" + (f", part {i + 1} of {len(groups)}" * (len(groups) > 1))
            caption = (
                f"{where}: test accuracy over the severity of each corruption, means over seeds "
                "and 95 % intervals; weights and learning rate chosen on clean validation data."
            )
            name = f"corruption-{task}-{setting}-{i}"
            found.append(Picture(name, caption, lambda width, drawn=drawn: robustness.curves(drawn, width=width)))
    return found


def _difficulty(chapter: Chapter) -> list[Picture]:
    names = _names(chapter)
    found: dict[str, list[Panel]] = {}
    for task, own in chapter.by_task().items():
        at = {(cell.setting, cell.mixer): cell.accuracy for cell in own}
        for axis in curves.axes({cell.setting: cell.runs[0] for cell in own}):
            drawn = []
            for name in names:
                points = [(x, y) for x, setting in axis.settings if (y := at.get((setting, name)))]
                if points:
                    drawn.append(Curve(name, [x for x, _ in points], [y for _, y in points]))
            if any(len(c.x) > 1 for c in drawn):
                found.setdefault(task, []).append(Panel(axis.others, axis.field.split(".")[-1], drawn))
    caption = (
        "Test accuracy as one thing changes and the rest stays. Bars are Student's "
        f"intervals over seeds{_single(chapter)}.{_left_out(chapter)}"
    )
    return _by_task("difficulty", caption, found, lambda panels, width: sweeps.curves(panels, names, width=width))


def _learning(chapter: Chapter) -> list[Picture]:
    names = _names(chapter)
    found: dict[str, list[Panel]] = {}
    for task, own in chapter.by_task().items():
        settings: dict[str, list[Curve]] = {}
        for cell in own:
            if cell.mixer in names and (track := curves.validation(cell, chapter.group)):
                curve = Curve(cell.mixer, [float(step) for step in track], list(track.values()))
                settings.setdefault(cell.setting, []).append(curve)
        if settings:
            found[task] = [Panel(setting, "step", drawn) for setting, drawn in settings.items()]
    caption = (
        "Accuracy on validation while training, at the chosen grid point. Bands are Student's "
        f"intervals over seeds{_single(chapter)}. A run that stopped early keeps its last accuracy, "
        "one that diverged has none left; a line ends where all its seeds have stopped."
        f"{_left_out(chapter)}"
    )

    def draw(panels: list[Panel], width: float) -> Figure:
        return sweeps.curves(panels, names, marks=False, y_label="validation accuracy, %", width=width)

    return _by_task("learning", caption, found, draw)


def _by_task(
    name: str, caption: str, panels: dict[str, list[Panel]], draw: Callable[[list[Panel], float], Figure]
) -> list[Picture]:
    """Draw the panels of all tasks in one figure if they are few, else in one for each task."""
    together = [
        panel._replace(title=": ".join(filter(None, (task, panel.title))))
        for task, own in panels.items()
        for panel in own
    ]
    if not together:
        return []
    if len(together) <= _PANELS:
        return [Picture(name, caption, lambda width: draw(together, width))]
    return [
        Picture(f"{name}-{task}", f"{task}. {caption}", lambda width, own=own: draw(own, width))
        for task, own in panels.items()
    ]


def _memory(chapter: Chapter) -> list[Picture]:
    names, panels, unknown = _names(chapter), [], set()
    for task, own in chapter.by_task().items():
        points = []
        for score in chapter.board.tasks:
            sizes = [cell.state_size for cell in own if cell.mixer == score.mixer and cell.state_size is not None]
            if score.task == task and score.accuracy and score.mixer in names:
                if not sizes:
                    unknown.add(score.mixer)
                    continue
                points.append(StatePoint(score.mixer, (min(sizes), max(sizes)), score.accuracy))
        if len({p.states for p in points}) > 1:
            panels.append(Panel(task, "state, numbers", points))
    caption = (
        "Test accuracy of a task against the numbers carried from token to token, all layers, "
        "windows of convolutions included; attention's grow with the sequence, and a bar across "
        f"spans the settings.{_left_out(chapter)}"
    )
    if unknown:
        caption += f" Not shown, for their state is unknown: {', '.join(sorted(unknown))}."
    drawn = Picture("memory", caption, lambda width: sweeps.memory(panels, names, width=width))
    return [drawn] if panels else []


def _learning_rate(chapter: Chapter) -> list[Picture]:
    names, panels = _names(chapter), []
    by_rate = curves.by_learning_rate(chapter.group)
    for task in chapter.by_task():
        found = []
        for name in names:
            points = [
                (rate, score.accuracy)
                for rate, scores in by_rate.items()
                for score in scores
                if (score.task, score.mixer) == (task, name) and score.accuracy
            ]
            if len(points) > 1:
                found.append(Curve(name, [x for x, _ in points], [y for _, y in points]))
        if found:
            panels.append(Panel(task, "learning rate", found))
    caption = (
        "Test accuracy at each learning rate, mean over settings; what else the grid varies is "
        f"chosen on validation. A diverged run counts as zero.{_left_out(chapter)}"
    )
    drawn = Picture("learning-rate", caption, lambda width: sweeps.curves(panels, names, width=width))
    return [drawn] if panels else []


def _differences(chapter: Chapter) -> list[Picture]:
    drawn, what = chapter.board.pairs, ""
    if len(drawn) > _PAIRS:
        first = chapter.board.mixers[0].mixer
        drawn = [p for p in drawn if first in (p.first, p.second)][: 2 * _PAIRS]
        what = f" Drawn are those to {first}; the table has all."
    shown = {f"{p.first} - {p.second}": p.difference.mean for p in drawn}
    caption = f"Means of the differences, in points of accuracy, on the same settings and seeds.{what}"

    def draw(width: float) -> Figure:
        return sweeps.rows(shown, x_label="difference, points", around="zero", width=width)

    return [Picture("differences", caption, draw)]


def _spectra(chapter: Chapter) -> list[Picture]:
    """Draw the best run of each mixer where the mixers' scores lie farthest apart."""
    chosen = max(_by_setting(chapter), key=_apart, default=[])
    found = {cell.mixer: chapter.group.folders[run.fingerprint] for cell in chosen if (run := cell.best_run)}
    found = {name: folder for name, folder in found.items() if (folder.path / "model.pt").exists()}
    best = {name: found[name] for name in [n for n in _names(chapter) if n in found][:_DIAGNOSED]}
    if not best:
        return []
    diagnoses = {}
    for mixer, folder in best.items():
        with contextlib.suppress(ConfigError):  # weights that are cut, or of other code: the others are drawn
            diagnoses[mixer] = spectra.diagnose(folder, _EXAMPLES, 0)
    if not diagnoses:
        return []
    said = f"{chosen[0].task}, {chosen[0].setting}, where the scores lie farthest apart; the run of each "
    said += f"mixer that is best on validation{'' if len(chosen) <= _DIAGNOSED else ', four mixers'}"
    return [
        Picture(f"spectra-{name}", f"{name.capitalize()}: {said}.", lambda _, figure=figure: figure, narrow=False)
        for name, figure in spectra.figures(diagnoses).items()
    ]


def _by_setting(chapter: Chapter) -> Iterator[list[Cell]]:
    for cells in chapter.by_task().values():
        for setting in dict.fromkeys(cell.setting for cell in cells):
            own = [cell for cell in cells if cell.setting == setting and cell.mixer in _names(chapter)]
            yield [cell for cell in own if cell.accuracy]


def _apart(cells: list[Cell]) -> float:
    means = [cell.accuracy.mean for cell in cells if cell.accuracy]
    return max(means, default=0) - min(means, default=1)


def _names(chapter: Chapter) -> list[str]:
    """Name the mixers that curves are drawn of, best first: as many as can be told apart."""
    scored = {cell.mixer for cell in chapter.board.cells}
    return [m.mixer for m in chapter.board.mixers if m.mixer in scored][: figures.MANY]


def _single(chapter: Chapter) -> str:
    return "; a single seed has none" if any(len(c.seeds) == 1 for c in chapter.board.cells) else ""


def _left_out(chapter: Chapter) -> str:
    mixers, drawn = len(chapter.board.mixers), len(_names(chapter))
    return f" The best {drawn} of {mixers} mixers." if mixers > drawn else ""


DRAW: dict[str, Callable[[Chapter], list[Picture]]] = {
    "scores": _scores,
    "mixers by tasks": _mixers_by_tasks,
    "difficulty": _difficulty,
    "corruption": _corruption,
    "learning": _learning,
    "memory": _memory,
    "learning rate": _learning_rate,
    "differences": _differences,
    "spectra": _spectra,
}
"""By the names that `page.Charts` has."""
