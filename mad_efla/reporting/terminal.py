"""What the terminal shows in lines: names, times, failures, logs; and the consoles."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from mad_efla.config import ConfigError
from mad_efla.execution.costs import Costs
from mad_efla.plan.run import RunConfig
from mad_efla.reporting import renderers
from mad_efla.reporting.table import Table
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.status import SweepStatus
from mad_efla.training.fits import Match

_ROLES = {"key": "bold cyan", "stack": "bold cyan", "value": "green"}
_ROLES |= dict.fromkeys(("copy", "insert", "compress", "mark"), "bold magenta")
_ROLES |= dict.fromkeys(("noise", "blank", "pad", "filler", "idle"), "dim")
PLAIN_WIDTH = 140  # columns, where stdout is no terminal


def stdout() -> Console:
    """Return the console for results."""
    return Console() if sys.stdout.isatty() else _plain()


def stderr() -> Console:
    """Return the console for progress and warnings."""
    return Console(stderr=True) if sys.stderr.isatty() else _plain(stderr=True)


def _plain(*, stderr: bool = False) -> Console:
    """Write text alone, also where FORCE_COLOR asks for more, as notebooks do of all they call."""
    return Console(width=PLAIN_WIDTH, stderr=stderr, no_color=True, force_terminal=False)


def show(table: Table) -> None:
    """Print a table on stdout."""
    console = stdout()
    console.print(renderers.terminal(table, console.width), soft_wrap=not sys.stdout.isatty())


def say(sentences: Iterable[str]) -> None:
    """Print sentences on stdout, a line each, wrapped by the terminal."""
    console = stdout()
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False, soft_wrap=not sys.stdout.isatty())


def name(run: RunConfig) -> str:
    """Name a run for people: task, setting, mixer, seed, and the rates that grids vary."""
    return f"{run.task.name} {run.setting} {run.mixer} lr={run.optim.lr:g} seed={run.seed}"


def duration(seconds: float) -> str:
    """Write seconds as people say them: `42 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86_400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86_400} d {s % 86_400 // 3600} h"


def matches(found: list[Match]) -> list[str]:
    """Say by how much each mixer misses the equal terms of a plan."""
    lines = []
    for match in found:
        what = "state per mixer layer" if match.kind == "state" else "parameters"
        has, verdict = "an unknown number", "which its layer would have to tell: see CONTRIBUTING.md"
        if match.found is not None:
            has, verdict = f"{match.found:,}", f"{100 * match.miss:+,.1f} %" if match.miss else "as asked for"
        lines.append(f"match {what} {match.wanted:,}: {match.mixer} has {has}, {verdict}")
    return lines


def figures_of(metrics: dict[str, float]) -> str:
    """Write the newest loss, accuracy and pace of a run."""
    parts = []
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.3f}")
    if "val/token_accuracy" in metrics:
        parts.append(f"accuracy {metrics['val/token_accuracy']:.3f}")
    return " ".join(parts)


def failure(run: RunConfig, folder: RunFolder) -> str:
    """Say why a run failed and where its traceback is."""
    found = folder.failure()
    reason = found.reason if found else "no result"
    again = "the same command" if found and found.transient else "--retry-failed"
    cure = f"traceback: mad-efla logs {run.fingerprint}, again: {again}"
    return f"failed: {name(run)}: {reason}\n  {cure}"


def standing(found: SweepStatus) -> list[str]:
    """Say how a sweep stands: counts, what runs, what failed and why."""
    record, total = found.record, len(found.record.fingerprints)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(found.counts.items()))
    lines = [f"{record.task}, plan {record.plan}: {total} runs: {counts}"]
    for run, row in found.running:
        step = f"step {row.step}/{run.steps} {figures_of(row.metrics)}" if row else "starting"
        lines.append(f"  running: {run.fingerprint} {name(run)}: {step}")
    for run, failed in found.failed:
        lines.append(f"  failed: {run.fingerprint} {name(run)}: {failed.reason}")
    return lines + [f"  unreadable: {note}" for note in found.unreadable]


def left(found: list[SweepStatus], costs: Costs) -> str:
    """Say for how much longer sweeps run, by the costs of their runs; empty if none has work.

    Runs that several sweeps share count once, and so do the workers, which sweeps of one call have
    in common.
    """
    waiting = {r.fingerprint for standing in found for r in standing.waiting}
    running = {r.fingerprint: (r, row) for standing in found for r, row in standing.running}
    if not waiting and not running:
        return ""
    for key, (_, row) in running.items():
        if row and "train/tokens_per_second" in row.metrics:
            costs.observe_rate(key, row.metrics["train/tokens_per_second"])
    under_way = {key: row.step / r.steps if row else 0.0 for key, (r, row) in running.items()}
    seconds, workers = costs.seconds_left(waiting, under_way, len(running)), len(running)
    if seconds is None:
        return "time left: not known yet"
    on = f"on the {workers} that run" if workers else "of one worker, and none runs"
    return f"time left: {duration(seconds)} {on}"


def log(folder: RunFolder) -> list[str]:
    """Return what a run has logged, and how it ended."""
    result, failed = folder.result(), folder.failure()
    try:
        lines = [f"{folder.fingerprint} {name(folder.run())}: {folder.status()}"]
    except ConfigError as error:
        lines = [f"{folder.fingerprint}: {folder.status()}", f"unreadable: {error}"]
    lines += [f"unreadable: {note}" for note in folder.notes]
    for row in folder.rows()[0]:
        figures = " ".join(f"{key}={value:.5g}" for key, value in row.metrics.items())
        lines.append(f"step {row.step}: {figures}")
    written = folder.path / "log.txt"
    if written.exists():
        lines += written.read_text(encoding="utf-8", errors="replace").splitlines()
    if result and result.test:
        lines.append(f"test accuracy {result.test.token_accuracy:.4f}, loss {result.test.loss:.4f}")
    if result and result.stopped:
        lines.append(result.stopped)
    if failed and not result:
        lines += [f"{failed.kind}: {failed.reason}", *failed.traceback.splitlines()]
    return lines


def example(
    inputs: list[int] | list[float], roles: list[str], targets: list[int], answers: list[int] | None, columns: int
) -> list[Text]:
    """Draw one sequence in blocks of lines: tokens by role, what is scored, what the solver says.

    Args:
        inputs: Token ids, or rounded numbers.
        roles: A word for each, or a sign that is shown in place of its id.
        targets: The answer at scored positions, negative elsewhere.
        answers: The solver's; None where there is no solver.
        columns: Width to fill.
    """
    width = max(len(str(t)) for t in (*inputs, *targets))
    per_line = max((columns - 8) // (width + 1), 1)
    lines = []
    for start in range(0, len(inputs), per_line):
        block = slice(start, start + per_line)
        tokens = [
            (f"{r if len(r) == 1 else t:>{width}} ", _ROLES.get(r, ""))
            for t, r in zip(inputs[block], roles[block], strict=True)
        ]
        wanted = [_cell(t, t >= 0, width, "bold yellow") for t in targets[block]]
        lines.append(Text.assemble(("tokens  ", "dim"), *tokens))
        lines.append(Text.assemble(("scored  ", "dim"), *wanted))
        if answers is not None:
            solved = [
                _cell(a, t >= 0, width, "bold green" if a == t else "bold red")
                for t, a in zip(targets[block], answers[block], strict=True)
            ]
            lines.append(Text.assemble(("solver  ", "dim"), *solved))
        lines.append(Text(""))
    return lines


def _cell(token: int, scored: bool, width: int, style: str) -> tuple[str, str]:
    text = "" if not scored else "?" if token < 0 else str(token)
    return f"{text:>{width}} ", style
