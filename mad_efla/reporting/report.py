"""The report: a page of HTML that needs no other file, and its figures beside it, from run files.

A chapter per plan and protocol, which are never mixed; in it a section for all that the runs can
tell and nothing for what they cannot. The numbers are those of `mad-efla score` and of a sweep's
own table. Equal run files give equal bytes: no clock is read, and dates are those of the runs.

Every figure is drawn twice, for a page and for a phone, and the browser shows the one that fits.
"""

import datetime
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from mad_efla import config
from mad_efla.analysis import corruption
from mad_efla.analysis.cells import Cell
from mad_efla.analysis.leaderboard import Leaderboard, leaderboard
from mad_efla.analysis.statistics import interval
from mad_efla.config import ConfigError
from mad_efla.plan.expand import flatten
from mad_efla.plan.run import RunConfig
from mad_efla.reporting import figures, renderers, results, tables
from mad_efla.reporting.figures import robustness as corrupted
from mad_efla.reporting.figures import spectra, sweeps
from mad_efla.reporting.figures.sweeps import Curve, Panel, Point
from mad_efla.reporting.table import Column, Table, text
from mad_efla.runs.files import write_bytes
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import Group, load
from mad_efla.runs.schema import Result

_PHONE = 3.6  # inches
_EVALUATIONS = 60  # points of a learning curve drawn at most
_FIELDS = (
    "optim.schedule",
    "optim.lr",
    "optim.weight_decay",
    "train.batch_size",
    "train.loss",
    "train.select_split",
    "train.stop_at",
    "train.precision",
)
_SETTINGS = (
    "Test accuracy by setting in percent, the highest of each in bold; Student's intervals over "
    "seeds, a diverged run counts as zero."
)
_PANELS = 12  # in one figure for all tasks; beyond, each task has its own
_PAIRS = 15  # differences drawn at most; beyond, those to the first mixer
_LOOKED_AT = 4  # mixers whose spectra are drawn
_EXAMPLES = 8  # sequences that spectra are taken over


class Picture(NamedTuple):
    """A figure, drawn for a page and, if it can be, for a phone."""

    caption: str
    page: Markup
    phone: Markup | None


class Section(NamedTuple):
    """A heading and what stands under it; no blocks for what the runs cannot tell."""

    title: str
    blocks: list[Picture | Table]
    note: str = ""


class Chapter(NamedTuple):
    """One plan under one protocol; `summary` is its result in a sentence."""

    title: str
    summary: str
    sections: list[Section]


def write(out: Path, to: Path) -> list[Path]:
    """Write the page to `to`, and every figure as PNG and SVG to `figures/` beside it.

    Returns:
        The page, then the figures.

    Raises:
        ConfigError: There is no sweep, or the page cannot be written.
    """
    parts = _parts(out)
    pictures = _Pictures(to.parent / "figures")
    chapters = [_chapter(part, pictures, i) for i, part in enumerate(parts)]
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.render(chapters=chapters, about=_about(parts), html=renderers.html)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(to, page.encode())
    except OSError as error:
        raise ConfigError(f"{to}: {error.strerror or error}; name another file") from None
    return [to, *pictures.written]


# ------------------------------------------------------------------ what there is


class _Part(NamedTuple):
    """One plan under one protocol.

    Attributes:
        out: The folder of run folders.
        group: Its runs.
        board: Its numbers.
        names: Mixers that curves are drawn of, best first: as many as can be told apart.
    """

    out: Path
    group: Group
    board: Leaderboard
    names: list[str]

    @property
    def results(self) -> dict[str, Result]:
        """Results by fingerprint."""
        return self.group.results

    @property
    def runs(self) -> list[RunConfig]:
        """Runs that can be read, in the order of the plan."""
        planned = self.group.planned
        return [run for p in planned if (run := self.group.runs.get(p.fingerprint))]

    def by_task(self) -> dict[str, list[Cell]]:
        """Return the cells of each task."""
        found: dict[str, list[Cell]] = {}
        for cell in self.board.cells:
            found.setdefault(cell.task, []).append(cell)
        return found

    def folder(self, run: RunConfig) -> RunFolder:
        """Return where a run is."""
        return self.group.folders[run.fingerprint]


def _parts(out: Path) -> list[_Part]:
    return [_part(out, group) for group in load(out)]


def _part(out: Path, group: Group) -> _Part:
    board = leaderboard(group)
    scored = {cell.mixer for cell in board.cells}
    names = [m.mixer for m in board.mixers if m.mixer in scored][: figures.MANY]
    return _Part(out, group, board, names)


# ------------------------------------------------------------------ chapters


def _chapter(part: _Part, pictures: "_Pictures", number: int) -> Chapter:
    pictures.prefix = f"{part.group.plan}-{part.group.protocol}".replace("/", "-")
    found = [
        Section("Scores", _scores(part, pictures)),
        Section("Settings", _settings(part), _SETTINGS),
        Section("Difficulty", _difficulty(part, pictures)),
        Section("Corruption", _corruption(part, pictures)),
        Section("Learning", _learning(part, pictures)),
        Section("Memory", _memory(part, pictures)),
        Section("Learning rate", _learning_rate(part, pictures)),
        Section("Paired differences", _differences(part, pictures)),
        Section("Spectra", _spectra(part, pictures)),
        Section("Failed and diverged", _failures(part)),
        Section("Protocol and versions", _facts(part)),
    ]
    title = f"{part.group.plan}, protocol {part.group.protocol}"
    return Chapter(title, _summary(part), [s for s in found if s.blocks])


def _summary(part: _Part) -> str:
    done = f"{len(part.results)} of {len(part.group.folders)} runs are done."
    ranked = [m for m in part.board.mixers if m.rank and m.average]
    if not ranked or ranked[0].average is None:
        return done
    first = ranked[0]
    tasks = list(part.by_task())
    where = f"over {len(tasks)} tasks" if len(tasks) > 1 else f"on {tasks[0]}"
    return f"Highest mean {where}: {first.mixer}, {text(first.average, 'share')} %. {done}"


def _about(parts: list[_Part]) -> str:
    done = [r for part in parts for r in part.results.values()]
    if not done:
        return "No run is done yet."
    first, last = (_day(f(r.ended for r in done)) for f in (min, max))
    days = first if first == last else f"{first} to {last}"
    versions = ", ".join(_distinct(r.environment.get("mad-efla", "") for r in done))
    return f"{len({r.fingerprint for r in done})} runs, {days}, mad-efla {versions}".strip()


def _scores(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    board = part.board
    if not board.cells:
        return []
    several = len(part.by_task()) > 1
    averages = {m.mixer: m.average for m in board.mixers if m.average}
    blocks: list[Picture | Table] = []
    if len(averages) > 1:
        over = "mean over tasks" if several else next(iter(part.by_task()))
        blocks.append(
            pictures.draw(
                "scores",
                "Mean test accuracy and its 95 % interval over seeds, the highest first.",
                lambda width: sweeps.rows(averages, x_label=f"test accuracy, {over}, %", width=width),
            )
        )
    blocks.append(tables.mixers(board))
    if several:
        heat = {(t.mixer, t.task): t.accuracy for t in board.tasks if t.accuracy}
        blocks.append(
            pictures.draw(
                "mixers-by-tasks", "The same, mixers by tasks.", lambda width: sweeps.heat_map(heat, width=width)
            )
        )
    return blocks


def _settings(part: _Part) -> list[Picture | Table]:
    blocks: list[Picture | Table] = []
    for task in part.by_task():
        table = tables.settings(part.board, task)
        blocks.append(replace(table, title=task, columns=[Column(task), *table.columns[1:]]))
    title = "What was chosen, sizes and times"
    found = [replace(tables.sweep(own), title=f"{title}: {task}", folded=True) for task, own in part.by_task().items()]
    return [*blocks, *found]


# ------------------------------------------------------------------ curves


def _corruption(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    """Draw what becomes of accuracy under corruption, for tasks that score it."""
    found = corruption.arms(part.board.cells)
    blocks: list[Picture | Table] = []
    for task, setting in dict.fromkeys((arm.task, arm.setting) for arm in found):
        own = [arm for arm in found if (arm.task, arm.setting) == (task, setting)]
        groups = corrupted.chunks([arm.mixer for arm in own])
        for i, names in enumerate(groups):
            drawn = [arm for arm in own if arm.mixer in names]
            where = f"{task}, {setting}" + (f", part {i + 1} of {len(groups)}" * (len(groups) > 1))
            blocks.append(
                pictures.draw(
                    f"corruption-{task}-{setting}-{i}",
                    f"{where}: test accuracy over the severity of each corruption, means over seeds "
                    "and 95 % intervals; weights and learning rate chosen on clean validation data.",
                    lambda width, drawn=drawn: corrupted.curves(drawn, width=width),
                )
            )
    if found:
        blocks += tables.corruption(found)
    return blocks


def _difficulty(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    found: dict[str, list[Panel]] = {}
    for task, lines in part.by_task().items():
        at = {(line.setting, line.mixer): line.accuracy for line in lines}
        for title, field, settings in _axes({c.setting: c.runs[0] for c in lines}):
            own = []
            for name in part.names:
                points = [(x, y) for x, s in settings if (y := at.get((s, name)))]
                if points:
                    own.append(Curve(name, [x for x, _ in points], [y for _, y in points]))
            if any(len(c.x) > 1 for c in own):
                found.setdefault(task, []).append(Panel(title, field.split(".")[-1], own))
    caption = (
        "Test accuracy as one thing changes and the rest stays. Bars are Student's "
        f"intervals over seeds{_single(part)}.{_left_out(part)}"
    )
    return _by_task(
        "difficulty", caption, found, pictures, lambda panels, width: sweeps.curves(panels, part.names, width=width)
    )


def _by_task(
    name: str,
    caption: str,
    panels: dict[str, list[Panel]],
    pictures: "_Pictures",
    draw: Callable[[list[Panel], float], Figure],
) -> list[Picture | Table]:
    """Draw the panels of all tasks in one figure if they are few, else in one for each task."""
    together = [
        panel._replace(title=": ".join(filter(None, (task, panel.title))))
        for task, own in panels.items()
        for panel in own
    ]
    if not together:
        return []
    if len(together) <= _PANELS:
        return [pictures.draw(name, caption, lambda width: draw(together, width))]
    return [
        pictures.draw(f"{name}-{task}", f"{task}. {caption}", lambda width, own=own: draw(own, width))
        for task, own in panels.items()
    ]


def _axes(settings: dict[str, RunConfig]) -> Iterator[tuple[str, str, list[tuple[Any, str]]]]:
    """Find fields of task and data along which settings differ in nothing else.

    Yields a title, the field, and its values with the settings that have them, rising.
    """
    flat = {label: _condition_fields(run) for label, run in settings.items()}
    for field in dict.fromkeys(f for fields in flat.values() for f in fields):
        groups: dict[str, dict[Any, str]] = {}
        for label, fields in flat.items():
            if field.split(".")[0] in ("task", "data") and field in fields:
                rest = config.canonical_json({k: v for k, v in fields.items() if k != field})
                groups.setdefault(rest, {})[_plain(fields[field])] = label
        axes = [group for group in groups.values() if len(group) > 1]
        for group in axes:
            here = flat[next(iter(group.values()))]
            others = [flat[next(iter(other.values()))] for other in axes]
            apart = [f for f in here if f != field and any(o.get(f) != here[f] for o in others)]
            title = ", ".join(f"{f.split('.')[-1]}={here[f]}" for f in apart)
            yield title, field, sorted(group.items(), key=lambda item: _rising(item[0]))


def _condition_fields(run: RunConfig) -> dict[str, Any]:
    sections = ("task.", "data.", "model.", "train.")
    return {name: value for name, value in flatten(run).items() if name.startswith(sections)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _rising(value: Any) -> tuple[bool, Any]:
    return (isinstance(value, str), value)


def _learning(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    found: dict[str, list[Panel]] = {}
    for task, lines in part.by_task().items():
        settings: dict[str, list[Curve]] = {}
        for line in lines:
            if line.mixer in part.names and (curve := _curve(line, part)):
                settings.setdefault(line.setting, []).append(curve)
        if settings:
            found[task] = [Panel(setting, "step", own) for setting, own in settings.items()]
    caption = (
        "Accuracy on validation while training, at the chosen grid point. Bands are Student's "
        f"intervals over seeds{_single(part)}. A run that stopped early keeps its last accuracy, "
        "one that diverged has none left; a line ends where all its seeds have stopped."
        f"{_left_out(part)}"
    )
    return _by_task(
        "learning",
        caption,
        found,
        pictures,
        lambda panels, width: sweeps.curves(
            panels, part.names, marks=False, y_label="validation accuracy, %", width=width
        ),
    )


def _curve(line: Cell, part: _Part) -> Curve | None:
    """Average validation accuracy over seeds, at the steps at which some run has one."""
    tracks = []
    for run in line.runs:
        rows, _ = part.folder(run).rows()
        track = {r.step: v for r in rows if (v := r.metrics.get("val/token_accuracy")) is not None}
        result = part.results.get(run.fingerprint)
        if result and result.status == "diverged":
            track[result.steps] = 0.0
        if result and track:
            tracks.append(track)
    if not tracks:
        return None
    first = max(min(track) for track in tracks)
    steps = sorted({step for track in tracks for step in track if step >= first})
    every = math.ceil(len(steps) / _EVALUATIONS)
    steps = steps[::-1][::every][::-1]
    means = [interval([track[max(s for s in track if s <= at)] for track in tracks]) for at in steps]
    return Curve(line.mixer, [float(step) for step in steps], means)


def _memory(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    panels = []
    for task, lines in part.by_task().items():
        points = []
        for t in part.board.tasks:
            sizes = [line.state_size for line in lines if line.mixer == t.mixer]
            if t.task == task and t.accuracy and t.mixer in part.names:
                points.append(Point(t.mixer, (min(sizes), max(sizes)), t.accuracy))
        if len({p.states for p in points}) > 1:
            panels.append(Panel(task, "state, numbers", points))
    if not panels:
        return []
    caption = (
        "Test accuracy of a task against the numbers carried from token to token, all layers, "
        "windows of convolutions included; attention's grow with the sequence, and a bar across "
        f"spans the settings.{_left_out(part)}"
    )
    return [pictures.draw("memory", caption, lambda width: sweeps.memory(panels, part.names, width=width))]


def _learning_rate(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    by_rate = {rate: leaderboard(_at_rate(part.group, rate)).tasks for rate in sorted({r.optim.lr for r in part.runs})}
    panels = []
    for task in part.by_task():
        found = []
        for name in part.names:
            points = [
                (rate, t.accuracy)
                for rate, tasks in by_rate.items()
                for t in tasks
                if (t.task, t.mixer) == (task, name) and t.accuracy
            ]
            if len(points) > 1:
                found.append(Curve(name, [x for x, _ in points], [y for _, y in points]))
        if found:
            panels.append(Panel(task, "learning rate", found))
    if not panels:
        return []
    caption = (
        "Test accuracy at each learning rate, mean over settings; what else the grid varies is "
        f"chosen on validation. A diverged run counts as zero.{_left_out(part)}"
    )
    return [pictures.draw("learning-rate", caption, lambda width: sweeps.curves(panels, part.names, width=width))]


def _at_rate(group: Group, rate: float) -> Group:
    """Return the runs of a group at one learning rate, those that only choose among them."""
    kept = [
        p.model_copy(update={"chooses": False})
        for p in group.planned
        if p.fingerprint in group.runs and group.runs[p.fingerprint].optim.lr == rate
    ]
    return group._replace(planned=kept)


# ------------------------------------------------------------------ differences, spectra


def _differences(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    pairs = part.board.pairs
    if not pairs:
        return []
    drawn, what = pairs, ""
    if len(pairs) > _PAIRS:
        first = part.board.mixers[0].mixer
        drawn = [p for p in pairs if first in (p.first, p.second)][: 2 * _PAIRS]
        what = f" Drawn are those to {first}; the table has all."
    shown = {f"{p.first} - {p.second}": p.difference.mean for p in drawn}
    caption = f"Means of the differences, in points of accuracy, on the same settings and seeds.{what}"
    return [
        pictures.draw(
            "differences",
            caption,
            lambda width: sweeps.rows(shown, x_label="difference, points", around="zero", width=width),
        ),
        tables.pairs(part.board),
    ]


def _spectra(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    """Draw the best run of each mixer where the mixers' scores lie farthest apart."""
    chosen = max(((_apart(own), task, own) for task, own in _by_setting(part)), key=lambda item: item[0], default=None)
    if chosen is None:
        return []
    _, task, lines = chosen
    found = {c.mixer: part.folder(run) for c in lines if (run := c.best_run)}
    found = {n: folder for n, folder in found.items() if (folder.path / "model.pt").exists()}
    best = {n: found[n] for n in [n for n in part.names if n in found][:_LOOKED_AT]}
    if not best:
        return []
    looked = {mixer: spectra.diagnose(folder, _EXAMPLES, 0) for mixer, folder in best.items()}
    said = f"{task}, {lines[0].setting}, where the scores lie farthest apart; the run of each "
    said += f"mixer that is best on validation{'' if len(lines) <= _LOOKED_AT else ', four mixers'}"
    return [
        pictures.draw(f"spectra-{name}", f"{name.capitalize()}: {said}.", figure)
        for name, figure in spectra.figures(looked).items()
    ]


def _by_setting(part: _Part) -> Iterator[tuple[str, list[Cell]]]:
    for task, lines in part.by_task().items():
        for setting in dict.fromkeys(line.setting for line in lines):
            own = [x for x in lines if x.setting == setting and x.mixer in part.names]
            yield task, [x for x in own if x.accuracy]


def _apart(lines: list[Cell]) -> float:
    means = [line.accuracy.mean for line in lines if line.accuracy]
    return max(means, default=0) - min(means, default=1)


# ------------------------------------------------------------------ failures, facts


def _failures(part: _Part) -> list[Picture | Table]:
    rows: list[list[Any]] = []
    waiting: dict[str, int] = {}
    for run in part.runs:
        folder, result = part.folder(run), part.results.get(run.fingerprint)
        failure = None if result else folder.failure()
        if result and result.status == "diverged":
            status, why = "diverged", result.stopped or ""
        elif failure:
            status, why = failure.kind, failure.reason
        else:
            waiting[run.mixer] = waiting.get(run.mixer, 0) + (result is None)
            continue
        rows.append([status, run.task.name, run.setting, run.mixer, run.optim.lr, run.seed, run.fingerprint, why])
    rows += [["unreadable", "", "", "", None, None, u.path.name, u.reason] for u in part.group.unreadable]
    blocks: list[Picture | Table] = []
    if rows:
        rows.sort(key=lambda row: row[0] != "failed")
        heads = [Column(n) for n in ("", "task", "setting", "mixer")]
        heads += [Column("learning rate", "number"), Column("seed", "count")]
        heads += [Column("run"), Column("why")]
        blocks.append(Table(heads, rows, "Runs that ended without a score."))
    left: list[list[Any]] = [[mixer, n] for mixer, n in sorted(waiting.items()) if n]
    gone = len(part.group.folders) - len(part.runs) - len(part.group.unreadable)
    left += [["without a folder", gone]] * (gone > 0)
    if left:
        heads = [Column("mixer"), Column("runs", "count")]
        blocks.append(Table(heads, left, "Runs that are still to be made."))
    return blocks


def _facts(part: _Part) -> list[Picture | Table]:
    return [results.facts(part.group)]


# ------------------------------------------------------------------ words


def _single(part: _Part) -> str:
    return "; a single seed has none" if any(len(c.seeds) == 1 for c in part.board.cells) else ""


def _left_out(part: _Part) -> str:
    mixers = len(part.board.mixers)
    return f" The best {len(part.names)} of {mixers} mixers." if mixers > len(part.names) else ""


def _day(milliseconds: int) -> str:
    return f"{datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC):%Y-%m-%d}"


def _distinct(values: Iterable[Any]) -> list[str]:
    return [str(v) for v in sorted(set(values), key=lambda v: (str(type(v)), 0 if v is None else v))]


# ------------------------------------------------------------------ pictures


class _Pictures:
    """Draws figures, writes them, and sets them into the page.

    Attributes:
        prefix: Names of files begin with it.
        written: Files, in order.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.prefix = ""
        self.written: list[Path] = []
        self._count = 0

    def draw(self, name: str, caption: str, figure: Figure | Callable[[float], Figure]) -> Picture:
        """Set a figure into the page; if it is a function of its width in inches, for both."""
        page = figure if isinstance(figure, Figure) else figure(figures.PAGE)
        phone = None if isinstance(figure, Figure) else self._inline(figure(_PHONE), caption)
        file = re.sub(r"[^\w.-]+", "-", f"{self.prefix}-{name}")
        self.written += figures.save(page, self.folder / file)
        return Picture(caption, self._inline(page, caption), phone)

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
