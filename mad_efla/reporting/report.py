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
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from mad_efla import config
from mad_efla.analysis import corruption, leaderboard, scores
from mad_efla.analysis.leaderboard import Difference, Leaderboard
from mad_efla.analysis.scores import Interval, Line
from mad_efla.config import ConfigError
from mad_efla.plan.expand import flatten
from mad_efla.plan.run import PROTOCOLS, RunConfig
from mad_efla.reporting import figures, results
from mad_efla.reporting.figures import robustness as corrupted
from mad_efla.reporting.figures import spectra, sweeps
from mad_efla.reporting.figures.sweeps import Curve, Panel, Point
from mad_efla.runs.files import write_bytes
from mad_efla.runs.folder import RunFolder, finished
from mad_efla.runs.schema import Result, SweepRecord
from mad_efla.runs.sweeps import read_sweeps

_PHONE = 3.6  # inches
_EVALUATIONS = 60  # points of a learning curve drawn at most
_FIELDS = (
    "optim.schedule", "optim.lr", "optim.weight_decay", "train.batch_size", "train.loss",
    "train.select_split", "train.stop_at", "train.precision",
)  # fmt: skip
_SETTINGS = (
    "Test accuracy by setting in percent, the best of each in bold; Student's intervals over "
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


class Table(NamedTuple):
    """Cells of text or markup.

    Attributes:
        caption: What is in it; may be empty.
        header: Over the columns; empty for rows of a name and its value.
        rows: The first cell of each names it.
        folded: Shows the caption alone until it is opened.
    """

    caption: str
    header: list[str]
    rows: list[list[Any]]
    folded: bool = False


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
    ).from_string(Path(__file__).with_name("report.html").read_text())
    page = template.render(chapters=chapters, about=_about(parts))
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
        runs: Those whose folder is there; unlike settings have unlike labels.
        cells: The same by task, setting and mixer.
        lines: Rows of the sweep's table by task.
        names: Mixers that curves are drawn of, best first: as many as can be told apart.
    """

    out: Path
    plan: str
    protocol: str
    records: list[SweepRecord]
    runs: list[RunConfig]
    cells: dict[tuple[str, str, str], list[RunConfig]]
    results: dict[str, Result]
    board: Leaderboard
    lines: dict[str, list[Line]]
    names: list[str]


def _parts(out: Path) -> list[_Part]:
    found: dict[tuple[str, str], list[SweepRecord]] = {}
    for record in read_sweeps(out):
        found.setdefault((record.plan, record.protocol), []).append(record)
    if not found:
        raise ConfigError(f"{out}: holds no sweep; run `mad-efla sweep` first, or name its folder")
    return [_part(out, *key, records) for key, records in sorted(found.items())]


def _part(out: Path, plan: str, protocol: str, records: list[SweepRecord]) -> _Part:
    fingerprints = _fingerprints(records)
    runs = [f.run() for x in fingerprints if (f := RunFolder(out, x)).path.exists()]
    runs = _told_apart(runs)
    cells: dict[tuple[str, str, str], list[RunConfig]] = {}
    for run in runs:
        cells.setdefault((run.task.name, run.setting, run.mixer), []).append(run)
    done = finished(out, fingerprints)
    boards = leaderboard.leaderboards(runs, done)
    board = boards[0] if boards else Leaderboard(protocol, [], [], [])
    tasks = sorted({r.task.name for r in runs})
    lines = {task: scores.table([r for r in runs if r.task.name == task], done) for task in tasks}
    scored = {line.mixer for own in lines.values() for line in own}
    names = [m.mixer for m in board.mixers if m.mixer in scored][: figures.MANY]
    return _Part(out, plan, protocol, records, runs, cells, done, board, lines, names)


def _fingerprints(records: list[SweepRecord]) -> list[str]:
    return list(dict.fromkeys(f for r in records for f in r.fingerprints))


def _told_apart(runs: list[RunConfig]) -> list[RunConfig]:
    """Give unlike settings of one label labels of their own, as the leaderboard does."""
    known: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        known.setdefault((run.task.name, run.setting), set()).add(leaderboard.condition(run))
    return [
        run.model_copy(update={"setting": f"{run.setting} [{leaderboard.condition(run)[:4]}]"})
        if len(known[run.task.name, run.setting]) > 1
        else run
        for run in runs
    ]


def _of(line: Line, part: _Part, task: str) -> list[RunConfig]:
    """Return the runs that a row of the table is made of: the chosen point, all seeds."""
    own = part.cells[task, line.setting, line.mixer]
    chosen = line.point.items()
    return [r for r in own if all(flatten(r)[name] == value for name, value in chosen)]


# ------------------------------------------------------------------ chapters


def _chapter(part: _Part, pictures: "_Pictures", number: int) -> Chapter:
    pictures.prefix = f"{part.plan}-{part.protocol}"
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
    title = f"{part.plan}, protocol {part.protocol}"
    return Chapter(title, _summary(part), [s for s in found if s.blocks])


def _summary(part: _Part) -> str:
    planned = len(_fingerprints(part.records))
    done = f"{len(part.results)} of {planned} runs are done."
    ranked = [m for m in part.board.mixers if m.average]
    if not ranked:
        return done
    first = max(ranked, key=lambda m: m.average.mean if m.average else 0)
    tasks = len(part.lines)
    where = f"over {tasks} tasks" if tasks > 1 else f"on {next(iter(part.lines))}"
    return f"Highest score {where}: {first.mixer}, {_text(first.average)} %. {done}"


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
    if not part.results:
        return []
    tasks = list(part.lines)
    cells = {(t.mixer, t.task): t for t in board.tasks}
    averages = {m.mixer: m.average for m in board.mixers if m.average}
    blocks: list[Picture | Table] = []
    if len(averages) > 1:
        over = "mean over tasks" if len(tasks) > 1 else tasks[0]
        blocks.append(pictures.draw(
            "scores", "Mean test accuracy and its 95 % interval, best mean rank first.",
            lambda width: sweeps.rows(averages, x_label=f"test accuracy, {over}, %", width=width),
        ))  # fmt: skip
    best = {
        task: max(
            (t.accuracy.mean for t in board.tasks if t.task == task and t.accuracy), default=2
        )
        for task in tasks
    }
    rows = []
    for m in board.mixers:
        own = [cells.get((m.mixer, task)) for task in tasks]
        row = [m.mixer]
        if len(tasks) > 1:
            average = _cell(m.average) if m.complete else _noted(_cell(m.average), "incomplete")
            row += [average, "" if m.rank is None else f"{m.rank:.2f}"]
        row += [_noted(_cell(t.accuracy, best[t.task]), t.missing) if t else "" for t in own]
        rows.append(row)
    over_tasks = ["mean", "rank"] if len(tasks) > 1 else []
    blocks.append(Table(
        "Test accuracy per token in percent. The grid point is chosen on validation; intervals "
        "are bootstrapped over settings and seeds, a diverged run counts as zero.",
        ["mixer", *over_tasks, *tasks], rows,
    ))  # fmt: skip
    heat = {
        (m.mixer, task): t.accuracy
        for m in board.mixers
        for task in tasks
        if (t := cells.get((m.mixer, task))) and t.accuracy
    }
    if len(tasks) > 1:
        blocks.append(pictures.draw(
            "mixers-by-tasks", "The same, mixers by tasks.",
            lambda width: sweeps.heat_map(heat, width=width),
        ))  # fmt: skip
    return blocks


def _settings(part: _Part) -> list[Picture | Table]:
    blocks: list[Picture | Table] = []
    for task, lines in part.lines.items():
        if not lines:
            continue
        scored = {line.mixer for line in lines}
        mixers = [m.mixer for m in part.board.mixers if m.mixer in scored]
        settings = list(dict.fromkeys(line.setting for line in lines))
        cells = {(line.setting, line.mixer): line for line in lines}
        best = {
            setting: max(
                (x.accuracy.mean for x in lines if x.setting == setting and x.accuracy), default=2
            )
            for setting in settings
        }
        grid = [
            [_line_cell(cells.get((setting, mixer)), best[setting]) for mixer in mixers]
            for setting in settings
        ]
        across, down = (mixers, settings) if len(mixers) <= len(settings) else (settings, mixers)
        rows = grid if down is settings else [list(row) for row in zip(*grid, strict=True)]
        table = [[name, *row] for name, row in zip(down, rows, strict=True)]
        blocks.append(Table("", [task, *across], table))
    return [*blocks, _sizes(part)] if blocks else []


def _line_cell(line: Line | None, best: float) -> str | Markup:
    return _noted(_cell(line.accuracy, best), line.missing) if line else ""


def _sizes(part: _Part) -> Table:
    rows = [
        [
            task, line.setting, line.mixer, str(line.seeds),
            ", ".join(f"{k.split('.')[-1]}={v}" for k, v in line.point.items()),
            "" if line.loss is None else f"{line.loss:.4f}", f"{line.parameters:,}",
            f"{line.state_size:,}",
            "not reached" if line.steps_to_90 is None else f"{line.steps_to_90:g}",
            f"{line.seconds:.0f}",
        ]
        for task, lines in part.lines.items()
        for line in lines
    ]  # fmt: skip
    header = ["task", "setting", "mixer", "seeds", "chosen", "test loss", "parameters", "state",
              "steps to 90 %", "seconds"]  # fmt: skip
    return Table("What was chosen, sizes and times", header, rows, folded=True)


# ------------------------------------------------------------------ curves


def _corruption(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    """Draw what becomes of accuracy under corruption, for tasks that score it."""
    found = corruption.arms(part.runs, part.results)
    blocks: list[Picture | Table] = []
    for task, setting in dict.fromkeys((arm.task, arm.setting) for arm in found):
        own = [arm for arm in found if (arm.task, arm.setting) == (task, setting)]
        groups = corrupted.chunks([arm.mixer for arm in own])
        for i, names in enumerate(groups):
            drawn = [arm for arm in own if arm.mixer in names]
            where = f"{task}, {setting}" + (f", part {i + 1} of {len(groups)}" * (len(groups) > 1))
            blocks.append(pictures.draw(
                f"corruption-{task}-{setting}-{i}",
                f"{where}: test accuracy over the severity of each corruption, means over seeds "
                "and 95 % intervals; weights and learning rate chosen on clean validation data.",
                lambda width, drawn=drawn: corrupted.curves(drawn, width=width),
            ))  # fmt: skip
    if found:
        for note, header, rows in results.corruption_tables(found):
            blocks.append(Table(note, header, [[_stacked(cell) for cell in row] for row in rows]))
    return blocks


def _difficulty(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    found: dict[str, list[Panel]] = {}
    for task, lines in part.lines.items():
        at = {(line.setting, line.mixer): line.accuracy for line in lines}
        for title, field, settings in _axes([r for r in part.runs if r.task.name == task]):
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
        "difficulty", caption, found, pictures,
        lambda panels, width: sweeps.curves(panels, part.names, width=width),
    )  # fmt: skip


def _by_task(
    name: str, caption: str, panels: dict[str, list[Panel]], pictures: "_Pictures",
    draw: Callable[[list[Panel], float], Figure],
) -> list[Picture | Table]:  # fmt: skip
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
        pictures.draw(
            f"{name}-{task}", f"{task}. {caption}", lambda width, own=own: draw(own, width)
        )
        for task, own in panels.items()
    ]


def _axes(runs: list[RunConfig]) -> Iterator[tuple[str, str, list[tuple[Any, str]]]]:
    """Find fields of task and data along which settings differ in nothing else.

    Yields a title, the field, and its values with the settings that have them, rising.
    """
    settings = {run.setting: run for run in runs}
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
    for task, lines in part.lines.items():
        settings: dict[str, list[Curve]] = {}
        for line in lines:
            if line.mixer in part.names and (curve := _curve(line, part, task)):
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
        "learning", caption, found, pictures,
        lambda panels, width: sweeps.curves(
            panels, part.names, marks=False, y_label="validation accuracy, %", width=width
        ),
    )  # fmt: skip


def _curve(line: Line, part: _Part, task: str) -> Curve | None:
    """Average validation accuracy over seeds, at the steps at which some run has one."""
    tracks = []
    for run in _of(line, part, task):
        rows, _ = RunFolder(part.out, run.fingerprint).rows()
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
    means = [scores.interval([track[max(s for s in track if s <= at)] for track in tracks])
             for at in steps]  # fmt: skip
    return Curve(line.mixer, [float(step) for step in steps], means)


def _memory(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    panels = []
    for task, lines in part.lines.items():
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
    return [pictures.draw(
        "memory", caption, lambda width: sweeps.memory(panels, part.names, width=width)
    )]  # fmt: skip


def _learning_rate(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    drawn = [r for r in part.runs if r.mixer in part.names]
    by_rate = {
        rate: board[0].tasks
        for rate in sorted({r.optim.lr for r in drawn})
        if (
            board := leaderboard.leaderboards(
                [r for r in drawn if r.optim.lr == rate], part.results
            )
        )
    }
    panels = []
    for task in part.lines:
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
        "chosen on validation. Intervals are bootstrapped over settings and seeds; a diverged run "
        f"counts as zero.{_left_out(part)}"
    )
    return [pictures.draw(
        "learning-rate", caption, lambda width: sweeps.curves(panels, part.names, width=width)
    )]  # fmt: skip


# ------------------------------------------------------------------ differences, spectra


def _differences(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    pairs = [_upward(d) for d in part.board.differences]
    if not pairs:
        return []
    pairs.sort(key=lambda d: -d.mean.mean)
    drawn, what = pairs, ""
    if len(pairs) > _PAIRS:
        first = part.board.mixers[0].mixer
        drawn = [d for d in pairs if first in (d.first, d.second)][: 2 * _PAIRS]
        what = f" Drawn are those to {first}; the table has all."
    shown = {f"{d.first} - {d.second}": d.mean for d in drawn}
    caption = (
        "Means of the differences on the same tasks, settings and seeds, in points of accuracy, "
        f"the higher mixer first.{what}"
    )
    rows: list[list[Any]] = [
        [f"{d.first} - {d.second}", _cell(d.mean), str(d.pairs), f"{d.p:.3g}",
         f"{d.p_corrected:.3g}"]
        for d in pairs
    ]  # fmt: skip
    return [
        pictures.draw(
            "differences", caption,
            lambda width: sweeps.rows(
                shown, x_label="difference, points", around="zero", width=width
            ),
        ),
        Table(
            "Intervals are bootstrapped over pairs; p of Wilcoxon's signed-rank test, corrected "
            "after Benjamini and Hochberg over all pairs of mixers.",
            ["first minus second", "points", "pairs", "p", "corrected p"], rows,
            folded=len(rows) > 2 * _PAIRS,
        ),
    ]  # fmt: skip


def _upward(d: Difference) -> Difference:
    """Put the higher mixer first."""
    if d.mean.mean >= 0:
        return d
    low, high = (None if end is None else -end for end in (d.mean.high, d.mean.low))
    return d._replace(first=d.second, second=d.first, mean=Interval(-d.mean.mean, low, high))


def _spectra(part: _Part, pictures: "_Pictures") -> list[Picture | Table]:
    """Draw the best run of each mixer where the mixers' scores lie farthest apart."""
    chosen = max(
        ((_apart(own), task, own) for task, own in _by_setting(part)),
        key=lambda item: item[0], default=None,
    )  # fmt: skip
    if chosen is None:
        return []
    _, task, lines = chosen
    runs = [r for line in lines for r in _of(line, part, task)]
    whole = [r for r in runs if (part.out / r.fingerprint / "model.pt").exists()]
    found = {run.mixer: run.fingerprint for run in scores.best_runs(whole, part.results).values()}
    best = {n: found[n] for n in [n for n in part.names if n in found][:_LOOKED_AT]}
    if not best:
        return []
    looked = {
        mixer: spectra.diagnose(RunFolder(part.out, fingerprint), _EXAMPLES, 0)
        for mixer, fingerprint in best.items()
    }
    said = f"{task}, {lines[0].setting}, where the scores lie farthest apart; the run of each "
    said += f"mixer that is best on validation{'' if len(lines) <= _LOOKED_AT else ', four mixers'}"
    return [
        pictures.draw(f"spectra-{name}", f"{name.capitalize()}: {said}.", figure)
        for name, figure in spectra.figures(looked).items()
    ]


def _by_setting(part: _Part) -> Iterator[tuple[str, list[Line]]]:
    for task, lines in part.lines.items():
        for setting in dict.fromkeys(line.setting for line in lines):
            own = [x for x in lines if x.setting == setting and x.mixer in part.names]
            yield task, [x for x in own if x.accuracy]


def _apart(lines: list[Line]) -> float:
    means = [line.accuracy.mean for line in lines if line.accuracy]
    return max(means, default=0) - min(means, default=1)


# ------------------------------------------------------------------ failures, facts


def _failures(part: _Part) -> list[Picture | Table]:
    rows: list[list[Any]] = []
    waiting: dict[str, int] = {}
    for run in part.runs:
        folder, result = RunFolder(part.out, run.fingerprint), part.results.get(run.fingerprint)
        failure = None if result else folder.failure()
        if result and result.status == "diverged":
            status, why = "diverged", result.stopped or ""
        elif failure:
            status, why = failure.kind, failure.reason
        else:
            waiting[run.mixer] = waiting.get(run.mixer, 0) + (result is None)
            continue
        rows.append([
            status, run.task.name, run.setting, run.mixer, f"{run.optim.lr:g}", str(run.seed),
            run.fingerprint, why,
        ])  # fmt: skip
    header = ["", "task", "setting", "mixer", "learning rate", "seed", "run", "why"]
    gone = len(_fingerprints(part.records)) - len(part.runs)
    left = [[mixer, str(n)] for mixer, n in sorted(waiting.items()) if n]
    left += [["without a folder", str(gone)]] * bool(gone)
    blocks: list[Picture | Table] = []
    if rows:
        rows.sort(key=lambda row: row[0] != "failed")
        blocks.append(Table("Runs that ended without a score.", header, rows))
    if left:
        blocks.append(Table("Runs that are still to be made.", ["mixer", "runs"], left))
    return blocks


def _facts(part: _Part) -> list[Picture | Table]:
    done = list(part.results.values())
    diverged = sum(r.status == "diverged" for r in done)
    commands = dict.fromkeys(results.public_command(r.command) for r in part.records)
    lines = [Markup("<code>{}</code>").format(command) for command in commands]
    rows: list[list[Any]] = [
        ["command", Markup("<br>").join(lines)],
        ["runs", f"{len(done)} of {len(_fingerprints(part.records))} done, {diverged} diverged"],
        ["seeds", ", ".join(_distinct(r.seed for r in part.runs))],
    ]
    fixed = PROTOCOLS.get(part.protocol, {})
    if fixed:
        rows.append([f"fixed by {part.protocol}", "; ".join(
            f"{name} {' or '.join(map(str, values))}" for name, values in fixed.items()
        )])  # fmt: skip
    for field in _FIELDS:
        section, key = field.split(".")
        values = _distinct(getattr(getattr(run, section), key) for run in part.runs)
        rows.append([field, ", ".join(values)])
    if done:
        hours = sum(r.seconds for r in done) / 3600
        days = " to ".join(dict.fromkeys(_day(f(r.ended for r in done)) for f in (min, max)))
        rows.append(["time", f"{hours:.2f} hours of one worker, {days}"])
        for name in sorted({name for r in done for name in r.environment}):
            values = _distinct(r.environment[name] for r in done if r.environment.get(name))
            rows.append([name.replace("git_", ""), ", ".join(values)])
    return [Table("", [], rows)]


# ------------------------------------------------------------------ words


def _cell(value: Interval | None, best: float | None = None) -> str | Markup:
    """Write an accuracy in percent over its interval; bold if it is the best."""
    if value is None:
        return "-"
    form = "<b>{}</b>" if value.mean == best else "{}"
    mean = Markup(form).format(f"{100 * value.mean:.1f}")
    if value.low is None or value.high is None:
        return mean
    ends = f"[{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return mean + Markup(" <small>{}</small>").format(ends)


def _stacked(text: str) -> str | Markup:
    """Set an interval under its number."""
    number, bracket, interval = text.partition(" [")
    return Markup("{} <small>[{}</small>").format(number, interval) if bracket else text


def _noted(cell: str | Markup, note: str) -> str | Markup:
    return escape(cell) + Markup(" <em>{}</em>").format(note) if note else cell


def _text(value: Interval | None) -> str:
    return "" if value is None else str(Markup(_cell(value)).striptags())


def _single(part: _Part) -> str:
    lines = [line for own in part.lines.values() for line in own]
    return "; a single seed has none" if any(line.seeds == 1 for line in lines) else ""


def _left_out(part: _Part) -> str:
    mixers = len(part.board.mixers)
    return f" The best {len(part.names)} of {mixers} mixers." if mixers > len(part.names) else ""


def _day(milliseconds: int) -> str:
    return f"{datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC):%Y-%m-%d}"


def _distinct(values: Iterable[Any]) -> list[str]:
    return [
        str(v) for v in sorted(set(values), key=lambda v: (str(type(v)), 0 if v is None else v))
    ]


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
