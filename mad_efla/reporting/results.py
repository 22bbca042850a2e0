"""The results page: one section per plan, written from run files.

A section holds what was run (commands, commit, machine, time), the leaderboards, and every setting
with its interval. With a folder of readings, `<plan>.md` is set under the plan's heading: what a
person concludes, the only part that is written. Equal run files give equal bytes.
"""

import contextlib
import datetime
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mad_efla import config
from mad_efla.analysis import corruption, leaderboard, scores
from mad_efla.analysis.corruption import Arm
from mad_efla.analysis.leaderboard import Leaderboard
from mad_efla.analysis.scores import Interval, Line
from mad_efla.config import ConfigError
from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder, finished
from mad_efla.runs.schema import Result, SweepRecord
from mad_efla.runs.sweeps import read_sweeps

_PLACES = ("--out", "--tracking-uri", "--data-dir")  # options that name places of a machine
_HEAD = """# Results

Written by `mad-efla results`, from run files; edit nothing here. Accuracies are per token, in
percent, on the test split; [low, high] are 95 % intervals. Over a task's settings and over tasks
they are bootstrapped over settings and seeds, at one setting they are Student's over its seeds.
"""


def sections(out: Path, readings: Path | None = None) -> dict[str, str]:
    """Write a Markdown section for every plan that was swept under a folder, by the plan's name.

    Args:
        out: The folder of run folders.
        readings: A folder with `<plan>.md`, what a person concludes from these very figures.

    Raises:
        ConfigError: The folder holds no sweep.
    """
    plans: dict[str, list[SweepRecord]] = {}
    for record in read_sweeps(out):
        plans.setdefault(record.plan, []).append(record)
    if not plans:
        raise ConfigError(f"{out}: holds no sweep; run `mad-efla sweep` first, or name its folder")
    return {plan: _section(plan, plans[plan], out, readings) for plan in sorted(plans)}


def page(found: dict[str, str], previous: str = "") -> str:
    """Put sections on a page, in the place of those with the same heading on the page before.

    Args:
        found: Sections by plan.
        previous: The page as it was; empty for none.
    """
    kept = {m[1]: m[0] for m in re.finditer(r"^## (\S+)$.*?(?=^## |\Z)", previous, re.M | re.S)}
    everything = kept | found
    return _HEAD + "".join("\n" + everything[plan].strip() + "\n" for plan in sorted(everything))


def _section(plan: str, records: list[SweepRecord], out: Path, readings: Path | None) -> str:
    fingerprints = list(dict.fromkeys(f for r in records for f in r.fingerprints))
    runs = [f.run() for x in fingerprints if (f := RunFolder(out, x)).path.exists()]
    results = finished(out, fingerprints)
    parts = [
        f"## {plan}",
        *_about(plan, readings),
        _facts(records, len(fingerprints), runs, results),
    ]
    parts += [_board(board) for board in leaderboard.leaderboards(runs, results)]
    for task in sorted({r.task.name for r in runs}):
        own = [r for r in runs if r.task.name == task]
        parts.append(f"### {task}\n\n" + _settings(scores.table(own, results)))
        for table in corruption_tables(corruption.arms(own, results)):
            parts.append(table.caption + "\n\n" + _table(table.header, table.rows))
    return "\n\n".join(parts) + "\n"


def _about(plan: str, readings: Path | None) -> list[str]:
    """Return the plan's own sentence, and the reading of its results, where there are any."""
    texts = []
    with contextlib.suppress(ConfigError):
        texts.append(str(config.read(config.find(plan, "sweeps")).data.get("about", "")))
    reading = readings / f"{plan}.md" if readings else None
    if reading and reading.exists():
        texts.append(reading.read_text().strip())
    return [text for text in texts if text]


def _facts(
    records: list[SweepRecord], planned: int, runs: list[RunConfig], results: dict[str, Result]
) -> str:
    done = list(results.values())
    seeds = sorted({r.seed for r in runs})
    commands = dict.fromkeys(public_command(r.command) for r in records)
    rows = [["command", "<br>".join(f"`{command}`" for command in commands)]]
    diverged = sum(r.status == "diverged" for r in done)
    rows.append([
        "runs", f"{len(done)} of {planned} done, {diverged} diverged; "
        f"seeds {', '.join(map(str, seeds))}",
    ])  # fmt: skip
    if done:
        day = datetime.datetime.fromtimestamp(max(r.ended for r in done) / 1000, datetime.UTC)
        hours = sum(r.seconds for r in done) / 3600
        rows.append(["time", f"{hours:.2f} hours of one worker, ended {day:%Y-%m-%d}"])
        for name in ("git_commit", "device", "torch", "numpy", "python"):
            rows.append([name.replace("git_", ""), _distinct(r.environment[name] for r in done)])
    rows.append(["precision", _distinct(r.train.precision for r in runs)])
    return _table(["", ""], rows)


def public_command(command: str) -> str:
    """Leave out where files and records went: paths of a machine, addresses with passwords."""
    words = iter(shlex.split(command))
    kept = []
    for word in words:
        if word in _PLACES:
            next(words, None)
        elif not word.startswith(tuple(f"{p}=" for p in _PLACES)) and word != "--no-tracking":
            kept.append(word)
    return shlex.join(kept)


def _board(board: Leaderboard) -> str:
    tasks = list(dict.fromkeys(t.task for t in board.tasks))
    cells = {(t.mixer, t.task): t for t in board.tasks}
    best = {
        task: max(
            (t.accuracy.mean for t in board.tasks if t.task == task and t.accuracy), default=2
        )
        for task in tasks
    }
    rows = []
    for m in board.mixers:
        found = [cells.get((m.mixer, task)) for task in tasks]
        rank = "" if m.rank is None else f"{m.rank:.2f}"
        rows.append([
            m.mixer,
            _percent(m.average) + ("" if m.complete else " (incomplete)"),
            rank,
            *(
                _percent(c.accuracy, best[c.task]) + (f" ({c.missing})" if c.missing else "")
                if c
                else ""
                for c in found
            ),
        ])  # fmt: skip
    text = f"### Scores, protocol {board.protocol}\n\n" + _table(
        ["mixer", "mean over tasks", "mean rank", *tasks], rows
    )
    if board.differences:
        table = _table(
            ["first minus second", "points", "pairs", "p", "corrected p"],
            [
                [
                    f"{d.first} - {d.second}",
                    _percent(d.mean),
                    str(d.pairs),
                    f"{d.p:.3g}",
                    f"{d.p_corrected:.3g}",
                ]
                for d in board.differences
            ],
        )
        text += (
            "\n\n<details><summary>Paired differences on the same tasks, settings and seeds, in "
            "points; p of Wilcoxon's test, corrected after Benjamini and Hochberg</summary>\n\n"
            f"{table}\n\n</details>"
        )
    return text


def _settings(lines: list[Line]) -> str:
    """Draw settings by mixers; bold is the highest mean."""
    mixers = list(dict.fromkeys(sorted(line.mixer for line in lines)))
    rows = []
    for setting in dict.fromkeys(line.setting for line in lines):
        own = {line.mixer: line for line in lines if line.setting == setting}
        best = max((line.accuracy.mean for line in own.values() if line.accuracy), default=2)
        row = [setting]
        for mixer in mixers:
            line = own.get(mixer)
            missing = f" ({line.missing})" if line and line.missing else ""
            row.append(_percent(line.accuracy, best) + missing if line else "")
        rows.append(row)
    return _table(["setting", *mixers], rows)


class Corrupted(NamedTuple):
    """A table of what corruption does: its caption, the heads of its columns, and its rows."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def corruption_tables(arms: list[Arm]) -> list[Corrupted]:
    """Tabulate areas, then halves, of the mixers that were probed; none where none was."""
    if not arms:
        return []
    names = list(dict.fromkeys(name for arm in arms for name in arm.curves))
    labels = ["task", "setting", "mixer"]
    told = [f for f in labels if f == "mixer" or len({getattr(a, f) for a in arms}) > 1]
    areas, halves = [], []
    for arm in arms:
        label = [getattr(arm, field) for field in told]
        found = [arm.curves.get(name) for name in names]
        scored = [arm.clean, arm.mean_area, *(c.area if c else None for c in found)]
        cells = [_percent(score) for score in scored]
        areas.append([*label, f"{arm.runs[0].optim.lr:g}", *cells])
        halves.append([*label, *(halved(c) if c else "" for c in found)])
    return [
        Corrupted(
            "Accuracy in percent on the clean test split, and its mean over the range of each "
            "corruption's severity (the area under its curve), before them the mean of these. The "
            "learning rate is the one chosen on clean validation data.",
            [*told, "learning rate", "clean", "mean area", *names],
            areas,
        ),
        Corrupted(
            "Severity at which accuracy is half of what it is without the corruption: median "
            "[least, largest] over seeds.",
            [*told, *names],
            halves,
        ),
    ]


def halved(curve: corruption.Curve) -> str:
    """Write the severity at which a curve halves; beyond the grid it is `> 10`."""
    last = curve.severities[-1]
    median, least, largest = (f"{h:.3g}" if h <= last else f"> {last:g}" for h in curve.half)
    return median if least == largest else f"{median} [{least}, {largest}]"


def _percent(value: Interval | None, best: float | None = None) -> str:
    if value is None:
        return "-"
    mean = f"{100 * value.mean:.1f}"
    mean = f"**{mean}**" if value.mean == best else mean
    if value.low is None or value.high is None:
        return mean
    return f"{mean} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
