"""The results page: one section per plan, written from run files.

A section holds what was run (commands, commit, machine, time), the leaderboards, and every setting
with its interval. With a folder of readings, `<plan>.md` is set under the plan's heading: what a
person concludes, the only part that is written. Equal run files give equal bytes.
"""

import datetime
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mad_efla.analysis import corruption
from mad_efla.analysis.leaderboard import leaderboard
from mad_efla.reporting import renderers, tables
from mad_efla.reporting.table import Column, Table
from mad_efla.runs.read import Group, load

_PLACES = ("--out", "--tracking-uri", "--data-dir")  # options that name places of a machine
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
_HEAD = """# Results

Sections are written by `mad-efla results`, from run files; edit nothing in them. Accuracies are per
token, in percent, on the test split. [low, high] are 95 % intervals over seeds: tasks and settings
are fixed, the grid point is chosen on validation, and a single seed has no interval.
"""


def sections(out: Path, readings: Path | None = None) -> dict[str, str]:
    """Write a Markdown section for every plan that was swept under a folder, by the plan's name.

    Args:
        out: The folder of run folders.
        readings: A folder with `<plan>.md`, what a person concludes from these very figures.

    Raises:
        ConfigError: The folder holds no sweep.
    """
    plans: dict[str, list[Group]] = {}
    for group in load(out):
        plans.setdefault(group.plan, []).append(group)
    return {plan: _section(plan, groups, readings) for plan, groups in sorted(plans.items())}


def page(found: dict[str, str], previous: str = "") -> str:
    """Put sections on a page, in the place of those with the same heading; keep every other byte.

    Args:
        found: Sections by plan.
        previous: The page as it was; empty for none.
    """
    text = previous or _HEAD
    for plan, section in sorted(found.items()):
        section = section.strip() + "\n"
        heading = re.compile(rf"^## {re.escape(plan)}[ \t\r]*$", re.M)
        start = next((m for m in heading.finditer(text) if not _in_code(text, m.start())), None)
        if start is None:
            gap = "\n" if text.endswith("\n") else "\n\n"
            text += gap + section
            continue
        ends = re.compile(r"^(?:#{1,2}\s|[^\s>|].*\n=+[ \t\r]*$)", re.M).finditer(text, start.end())
        end = next((m.start() for m in ends if not _in_code(text, m.start())), len(text))
        rest = text[end:]
        text = text[: start.start()] + section + ("\n" + rest if rest else "")
    return text


def _in_code(text: str, at: int) -> bool:
    """Tell whether a place lies in a fenced block, where `#` begins no heading."""
    return len(re.findall(r"^```", text[:at], re.M)) % 2 == 1


def _section(plan: str, groups: list[Group], readings: Path | None) -> str:
    parts = [f"## {plan}"]
    parts += list(dict.fromkeys(group.about for group in groups if group.about))
    reading = readings / f"{plan}.md" if readings else None
    if reading and reading.exists():
        parts.append(reading.read_text(encoding="utf-8").strip())
    for group in groups:
        parts += _of_group(group)
    return "\n\n".join(parts) + "\n"


def _of_group(group: Group) -> list[str]:
    board = leaderboard(group)
    parts = [renderers.markdown(facts(group))]
    if not board.cells:
        return parts
    parts.append(f"### Scores, protocol {group.protocol}")
    parts.append(renderers.markdown(tables.mixers(board)))
    if board.pairs:
        parts.append(renderers.markdown(tables.pairs(board)))
    arms = corruption.arms(board.cells)
    for task in dict.fromkeys(cell.task for cell in board.cells):
        parts += [f"### {task}", renderers.markdown(tables.settings(board, task))]
        probed = [arm for arm in arms if arm.task == task]
        parts += [renderers.markdown(table) for table in tables.corruption(probed)]
    return parts


def facts(group: Group) -> Table:
    """Tell how the runs of a group were made: commands, seeds, protocol, time, versions."""
    done, runs = list(group.results.values()), list(group.runs.values())
    commands = dict.fromkeys(public_command(r.command) for r in group.records)
    diverged = sum(r.status == "diverged" for r in done)
    rows: list[list[Any]] = [
        ["command", "<br>".join(f"`{command}`" for command in commands)],
        ["runs", f"{len(done)} of {len(group.folders)} done, {diverged} diverged"],
        ["seeds", _distinct(p.seed for p in group.planned if not p.chooses)],
    ]
    if choosing := _distinct(p.seed for p in group.planned if p.chooses):
        rows.append(["chosen on seeds", choosing])
    for field in _FIELDS:
        section, key = field.split(".")
        rows.append([field, _distinct(getattr(getattr(run, section), key) for run in runs)])
    if done:
        hours = sum(r.seconds for r in done) / 3600
        days = " to ".join(dict.fromkeys(day(f(r.ended for r in done)) for f in (min, max)))
        rows.append(["time", f"{hours:.2f} hours of one worker, {days}"])
        for name in sorted({name for r in done for name in r.environment}):
            values = _distinct(r.environment[name] for r in done if r.environment.get(name))
            rows.append([name.replace("git_", ""), values])
    if group.unreadable:
        rows.append(["unreadable", f"{len(group.unreadable)} runs"])
    return Table([Column(""), Column("")], rows)


def day(milliseconds: int) -> str:
    """Write the day of a time."""
    return f"{datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC):%Y-%m-%d}"


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


def _distinct(values: Iterable[Any]) -> str:
    ordered = sorted(set(values), key=lambda v: (str(type(v)), 0 if v is None else v))
    return ", ".join(str(v) for v in ordered)
