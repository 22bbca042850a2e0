"""What a page tells about sweeps: chapters of sections of blocks, the same for every format.

    chapters(out) -> [Chapter] -> report.py    HTML, with figures
                               -> results.py   Markdown, tables alone

A chapter is a plan under a protocol, since protocols are never mixed. Every number that stands on
both pages comes from the one `Table` that is made here. Figures are only named, by `Charts`; who
can show them draws them. A section that ends up without a block is left out.
"""

import datetime
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mad_efla.analysis import corruption, verdict
from mad_efla.analysis.cells import Cell
from mad_efla.analysis.corruption import Arm
from mad_efla.analysis.leaderboard import Leaderboard, leaderboard
from mad_efla.plan.run import RunConfig
from mad_efla.reporting import tables
from mad_efla.reporting.table import Column, Table, text
from mad_efla.runs.archive import public_command
from mad_efla.runs.read import Group, load

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


class Charts(NamedTuple):
    """Figures that stand here on a page that has figures, by their name in `charts.DRAW`."""

    name: str


class Section(NamedTuple):
    """A heading and what stands under it.

    Attributes:
        title: The heading.
        blocks: Tables and figures, in order; none where the runs have nothing to tell.
        note: What the reader has to know of all blocks.
        lead: Sentences above the first block: what the blocks say.
    """

    title: str
    blocks: list[Table | Charts]
    note: str = ""
    lead: tuple[str, ...] = ()


class Chapter(NamedTuple):
    """One plan under one protocol, and its numbers.

    Attributes:
        group: The runs.
        board: Their scores.
        arms: The mixers that were probed under corruption; mostly none.
    """

    group: Group
    board: Leaderboard
    arms: list[Arm]

    @property
    def runs(self) -> list[RunConfig]:
        """Runs that can be read, in the order of the plan."""
        return [run for p in self.group.planned if (run := self.group.runs.get(p.fingerprint))]

    def by_task(self) -> dict[str, list[Cell]]:
        """Return the cells of each task."""
        found: dict[str, list[Cell]] = {}
        for cell in self.board.cells:
            found.setdefault(cell.task, []).append(cell)
        return found

    @property
    def summary(self) -> str:
        """The result in a sentence, and how much of the plan is done."""
        done = f"{len(self.group.results)} of {len(self.group.folders)} runs are done."
        first = next((m for m in self.board.mixers if m.rank), None)
        if first is None or first.average is None:
            return done
        tasks = list(self.by_task())
        where = f"over {len(tasks)} tasks" if len(tasks) > 1 else f"on {tasks[0]}"
        return f"Highest mean {where}: {first.mixer}, {text(first.average, 'share')} %. {done}"

    def sections(self) -> list[Section]:
        """Describe what stands in the chapter."""
        probed = [Charts("corruption"), *tables.corruption(self.arms)] if self.arms else []
        pairs = [Charts("differences"), tables.pairs(self.board)] if self.board.pairs else []
        scores = [Charts("scores"), tables.mixers(self.board), Charts("mixers by tasks")] if self.board.cells else []
        return [
            Section("Scores", scores, lead=tuple(verdict.sentences(self.board))),
            Section("Settings", _settings(self), _SETTINGS),
            Section("Difficulty", [Charts("difficulty")]),
            Section("Corruption", probed),
            Section("Learning", [Charts("learning")]),
            Section("Memory", [Charts("memory")]),
            Section("Learning rate", [Charts("learning rate")]),
            Section("Paired differences", pairs),
            Section("Spectra", [Charts("spectra")]),
            Section("Failed and diverged", [*_unscored(self), *_unmade(self)]),
            Section("Protocol and versions", [facts(self.group)]),
        ]


def chapters(out: Path) -> list[Chapter]:
    """Read the sweeps under a folder and describe each plan and protocol, by name.

    Raises:
        ConfigError: The folder holds no sweep.
    """
    found = []
    for group in load(out):
        board = leaderboard(group)
        found.append(Chapter(group, board, corruption.arms(board.cells)))
    return found


def _settings(chapter: Chapter) -> list[Table | Charts]:
    tasks = chapter.by_task()
    title = "What was chosen, sizes and times"
    blocks: list[Table | Charts] = [replace(tables.settings(chapter.board, task), title=task) for task in tasks]
    for task, own in tasks.items():
        own = [*own, *(cell for cell in chapter.board.checks if cell.task == task)]
        blocks.append(replace(tables.sweep(own), title=f"{title}: {task}", folded=True))
    return blocks


def _unscored(chapter: Chapter) -> list[Table]:
    """Name the runs that failed, diverged or cannot be read, and why."""
    rows: list[list[Any]] = []
    for run in chapter.runs:
        result = chapter.group.results.get(run.fingerprint)
        failure = None if result else chapter.group.folders[run.fingerprint].failure()
        if result and result.status == "diverged":
            status, why = "diverged", result.stopped or ""
        elif failure:
            status, why = failure.kind, failure.reason
        else:
            continue
        rows.append([status, run.task.name, run.setting, run.mixer, run.optim.lr, run.seed, run.fingerprint, why])
    rows += [["unreadable", "", "", "", None, None, u.path.name, u.reason] for u in chapter.group.unreadable]
    rows.sort(key=lambda row: row[0] != "failed")
    heads = [Column(n) for n in ("", "task", "setting", "mixer")]
    heads += [Column("learning rate", "number"), Column("seed", "count"), Column("run"), Column("why")]
    return [Table(heads, rows, "Runs that ended without a score")] if rows else []


def _unmade(chapter: Chapter) -> list[Table]:
    """Count the runs that are still to be made, by mixer."""
    group, waiting = chapter.group, dict[str, int]()
    for run in chapter.runs:
        if run.fingerprint not in group.results and not group.folders[run.fingerprint].failure():
            waiting[run.mixer] = waiting.get(run.mixer, 0) + 1
    rows: list[list[Any]] = [[mixer, n] for mixer, n in sorted(waiting.items())]
    gone = len(group.folders) - len(chapter.runs) - len(group.unreadable)
    rows += [["without a folder", gone]] * (gone > 0)
    heads = [Column("mixer"), Column("runs", "count")]
    return [Table(heads, rows, "Runs that are still to be made")] if rows else []


def facts(group: Group) -> Table:
    """Tell how the runs of a group were made: commands, seeds, protocol, time, versions."""
    done, runs = list(group.results.values()), list(group.runs.values())
    commands = dict.fromkeys(public_command(r.command) for r in group.records)
    diverged = sum(r.status == "diverged" for r in done)
    rows: list[list[Any]] = [
        ["command", "\n".join(f"`{command}`" for command in commands)],
        ["runs", f"{len(done)} of {len(group.folders)} done, {diverged} diverged"],
        ["seeds", distinct(p.seed for p in group.planned if not p.chooses)],
    ]
    if choosing := distinct(p.seed for p in group.planned if p.chooses):
        rows.append(["chosen on seeds", choosing])
    for field in _FIELDS:
        section, key = field.split(".")
        rows.append([field, distinct(getattr(getattr(run, section), key) for run in runs)])
    if done:
        hours = sum(r.seconds for r in done) / 3600
        rows.append(["time", f"{hours:.2f} hours of one worker, {days(r.ended for r in done)}"])
        for name in sorted({name for r in done for name in r.environment}):
            values = distinct(r.environment[name] for r in done if r.environment.get(name))
            rows.append([name.replace("git_", ""), values])
    if group.unreadable:
        rows.append(["unreadable", f"{len(group.unreadable)} runs"])
    return Table([Column(""), Column("")], rows)


# ------------------------------------------------------------------ words


def days(milliseconds: Iterable[int]) -> str:
    """Write the first and the last day of some times: `2026-11-24 to 2026-11-25`."""
    found = list(milliseconds)
    ends = (datetime.datetime.fromtimestamp(f(found) / 1000, datetime.UTC) for f in (min, max))
    return " to ".join(dict.fromkeys(f"{end:%Y-%m-%d}" for end in ends))


def distinct(values: Iterable[Any]) -> str:
    """Write each value once, in order."""
    ordered = sorted(set(values), key=lambda v: (str(type(v)), 0 if v is None else v))
    return ", ".join(str(v) for v in ordered)
