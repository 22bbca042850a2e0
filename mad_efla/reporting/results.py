"""The results page: `page.py`'s chapters as Markdown, a section per plan, written from run files.

With a folder of readings, `<plan>.md` is set under the plan's heading: what a person concludes, the
only part that is written by hand. Equal run files give equal bytes.
"""

import re
from pathlib import Path

from mad_efla.reporting import renderers
from mad_efla.reporting.page import Chapter, Section, chapters
from mad_efla.reporting.table import Table

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
    plans: dict[str, list[Chapter]] = {}
    for chapter in chapters(out):
        plans.setdefault(chapter.group.plan, []).append(chapter)
    return {plan: _plan(plan, own, readings) for plan, own in sorted(plans.items())}


def into(found: dict[str, str], previous: str = "") -> str:
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


def _plan(plan: str, found: list[Chapter], readings: Path | None) -> str:
    parts = [f"## {plan}"]
    parts += list(dict.fromkeys(c.group.about for c in found if c.group.about))
    reading = readings / f"{plan}.md" if readings else None
    if reading and reading.exists():
        parts.append(reading.read_text(encoding="utf-8").strip())
    for chapter in found:
        parts += [f"### Protocol {chapter.group.protocol}", chapter.summary]
        for section in chapter.sections():
            parts += _section(section)
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> list[str]:
    found = [renderers.markdown(block) for block in section.blocks if isinstance(block, Table)]
    return [f"#### {section.title}", *filter(None, [*section.lead, section.note]), *found] if found else []
