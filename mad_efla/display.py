"""What the terminal shows: tables on stdout, one live display on stderr."""

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from mad_efla.bench import StepTime
from mad_efla.causes import Account
from mad_efla.contract import Finding
from mad_efla.estimate import Costs
from mad_efla.execute import Event
from mad_efla.run import RunConfig
from mad_efla.scores import Interval, Line
from mad_efla.status import Standing
from mad_efla.store import RunFolder
from mad_efla.sweep import Match

if TYPE_CHECKING:  # a second of scipy that a sweep does without
    from mad_efla.leaderboard import Leaderboard

PLAIN_WIDTH = 140  # columns, where stdout is no terminal
_MOST_ROWS = 100  # of runs one by one
_PLAIN_SECONDS = 15.0  # between lines about running runs, where stderr is no terminal

_ACCOUNTED = (
    "accuracy", "lambda_mean", "beta_mean", "x_mean", "erase_mean", "wiped", "saturated",
    "state_log_norm_max", "state_effective_rank", "keys_square_cosine", "gain_noise",
)  # fmt: skip
_ROLES = {"key": "bold cyan", "value": "green"}
_ROLES |= dict.fromkeys(("copy", "insert", "compress"), "bold magenta")
_ROLES |= dict.fromkeys(("noise", "blank", "pad", "filler"), "dim")


def stdout() -> Console:
    """Return the console for results."""
    return Console() if sys.stdout.isatty() else _plain()


def stderr() -> Console:
    """Return the console for progress and warnings."""
    return Console(stderr=True) if sys.stderr.isatty() else _plain(stderr=True)


def _plain(*, stderr: bool = False) -> Console:
    """Write text alone, also where FORCE_COLOR asks for more, as notebooks do of all they call."""
    return Console(width=PLAIN_WIDTH, stderr=stderr, no_color=True, force_terminal=False)


class Follow:
    """The live display of a sweep: a bar for the whole, and below it one per running run.

    Use as a context manager and hand `update` to `execute`.

    Args:
        runs: All runs of the sweep.
        waiting: Those that are to be made.
        costs: What they cost, as far as is known; told the pace of what runs.
        workers: How many run at a time.
        total: How many there will be, if runs are proposed on the way.
    """

    def __init__(
        self, runs: list[RunConfig], waiting: list[RunConfig], costs: Costs, workers: int,
        total: int | None = None,
    ):  # fmt: skip
        self.console = stderr()
        self.costs, self.workers = costs, workers
        self.waiting = {r.fingerprint for r in waiting}
        self.total, self.proposed = total or len(runs), total is not None
        self.ended, self.made = len(runs) - len(waiting), 0
        self.running: dict[str, tuple[RunConfig, int, dict[str, float]]] = {}
        self.offsets: dict[str, int] = {}
        self.said = time.monotonic()
        self.whole, self.cells = _bars(), _bars()
        self.tokens = sum(costs.tokens(r.fingerprint) for r in waiting)
        if self.proposed:
            self.tokens = self.total - self.ended
        self.bar = self.whole.add_task("sweep", total=self.tokens, note="starting workers")
        self.bars: dict[str, TaskID] = {}
        self.live: Live | None = None

    def __enter__(self) -> "Follow":
        if self.console.is_terminal:
            self.live = Live(Group(self.whole, self.cells), console=self.console, transient=True)
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def update(self, events: list[Event]) -> None:
        """Take in what happens."""
        for event in events:
            if event.status == "running":
                self._moved(event)
            else:
                self._ended(event)
        if self.live:
            self._draw()
        elif time.monotonic() - self.said > _PLAIN_SECONDS:
            self.said = time.monotonic()
            for run, step, metrics in self.running.values():
                self._say(f"{name(run)}: step {step}/{run.steps} {_figures(metrics)}")
            self._say(f"sweep {self._count()}")

    def _moved(self, event: Event) -> None:
        key = event.run.fingerprint
        if key not in self.running and not self.live:
            self._say(f"{name(event.run)}: started ({key})")
        _, step, metrics = self.running.get(key, (event.run, 0, {}))
        rows, self.offsets[key] = event.folder.rows(self.offsets.get(key, 0))
        for row in rows:
            step, metrics = row.step, metrics | row.metrics
        if rows and "train/tokens_per_second" in metrics:
            self.costs.notice(key, metrics["train/tokens_per_second"])
        self.running[key] = (event.run, step, metrics)

    def _ended(self, event: Event) -> None:
        key = event.run.fingerprint
        self.running.pop(key, None)
        if key in self.bars:
            self.cells.remove_task(self.bars.pop(key))
        self.waiting.discard(key)
        self.ended += 1
        self.made += 1
        result, failure = event.folder.result(), event.folder.failure()
        if result and result.test:
            text = f"test accuracy {result.test.token_accuracy:.4f}, loss {result.test.loss:.4f}"
            text += f", {result.seconds:.0f} s" + (f" ({result.stopped})" if result.stopped else "")
        else:
            text = result.stopped if result else failure.reason if failure else ""
        self._say(f"{name(event.run)}: {event.status}: {text}")

    def _draw(self) -> None:
        lines = self.console.height - 4  # a longer display would be cut at its end
        for key, (run, step, metrics) in list(self.running.items())[:lines]:
            if key not in self.bars:
                self.bars[key] = self.cells.add_task(f"  {name(run)}", total=run.steps, note="")
            note = f"{step}/{run.steps} {_figures(metrics)}"
            self.cells.update(self.bars[key], completed=step, note=note)
        hidden = len(self.running) - lines
        note = self._count() + (f" ({hidden} of the running not shown)" if hidden > 0 else "")
        self.whole.update(self.bar, completed=self._done(), note=note)

    def _done(self) -> float:
        """Tokens that this call has made; runs, where they are proposed on the way."""
        shares = self._shares()
        if self.proposed:
            return self.made + sum(shares.values())
        left = sum(self.costs.tokens(f) * (1 - shares.get(f, 0.0)) for f in self.waiting)
        return self.tokens - left

    def _shares(self) -> dict[str, float]:
        return {key: step / run.steps for key, (run, step, _) in self.running.items()}

    def _count(self) -> str:
        if self.proposed:
            return f"{self.ended}/{self.total} trials"
        left = self.costs.left(self.waiting - self.running.keys(), self._shares(), self.workers)
        when = "time left not known yet" if left is None else f"{duration(left)} left"
        return f"{self.ended}/{self.total} runs, {when}"

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _bars() -> Progress:
    note = TextColumn("{task.fields[note]}")
    return Progress(TextColumn("{task.description}"), BarColumn(30), note)


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


def results(lines: list[Line], title: str) -> Table:
    """Draw the table of a sweep, best first within each setting."""
    table = Table(title=title, title_justify="left", title_style="bold")
    point = any(line.point for line in lines)
    missing = any(line.missing for line in lines)
    for heading in ("setting", "mixer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("test accuracy %", "95 % interval", "seeds", "loss", "parameters", "state",
                    "steps to 90 %", "seconds"):  # fmt: skip
        table.add_column(heading, justify="right")
    for heading in ["chosen"] * point + ["not counted"] * missing:
        table.add_column(heading)
    previous = None
    for line in lines:
        if previous not in (None, line.setting):
            table.add_section()
        setting = "" if previous == line.setting else line.setting
        previous = line.setting
        table.add_row(setting, *_cells(line), *[_point(line)] * point, *[line.missing] * missing)
    return table


def accounts(found: list[Account]) -> list[Table]:
    """Draw what layers do over the severities of a corruption, and which parts are to blame."""
    first = found[0]
    tables = []
    for account in found:
        title = f"{account.mixer} under {account.corruption}"
        table = Table("mean over seeds", title=title, title_justify="left")
        for severity in account.severities:
            table.add_column(f"{severity:g}", justify="right")
        for name, values in account.scalars.items():
            if name in _ACCOUNTED:
                table.add_row(name, *(f"{value:.3g}" for value in values))
        tables.append(table)
    blamed = [account for account in found if account.blames]
    if blamed:
        title = f"test accuracy % at {first.corruption} {first.severity:g}: with only this part "
        table = Table("part", title=title + "corrupted / set back", title_justify="left")
        for account in blamed:
            table.add_column(account.mixer, justify="right")
        for part in blamed[0].blames:
            cells = [account.blames[part] for account in blamed]
            table.add_row(part, *(f"{100 * a.mean:.1f} / {100 * m.mean:.1f}" for a, m in cells))
        tables.append(table)
    return tables


def _cells(line: Line) -> list[str]:
    steps = "" if line.steps_to_90 is None else f"{line.steps_to_90:g}"
    return [
        line.mixer,
        "diverged" if line.accuracy is None else f"{100 * line.accuracy.mean:.2f}",
        _interval(line.accuracy),
        str(line.seeds),
        "" if line.loss is None else f"{line.loss:.4f}",
        f"{line.parameters:,}",
        f"{line.state_size:,}",
        steps or "not reached",
        f"{line.seconds:.0f}",
    ]


def _interval(accuracy: Interval | None) -> str:
    if accuracy is None or accuracy.low is None or accuracy.high is None:
        return "one seed" if accuracy else ""
    return f"{100 * accuracy.low:.1f} .. {100 * accuracy.high:.1f}"


def _point(line: Line) -> str:
    return ", ".join(f"{k.split('.')[-1]}={v}" for k, v in line.point.items())


def runs(found: list[RunConfig], columns: dict[str, list[Any]], sizes: dict) -> Table:
    """Draw the runs that a sweep would make, with what differs between them.

    A long sweep has a row per setting and mixer, with all the values of its runs in a cell.
    """
    rows: dict[Any, list[int]] = {}
    mixers = columns.get("mixer", [""] * len(found))
    for index, run in enumerate(found):
        row = index if len(found) <= _MOST_ROWS else (run.setting, mixers[index])
        rows.setdefault(row, []).append(index)
    table = Table(title_justify="left")
    table.add_column("run" if len(found) <= _MOST_ROWS else "runs", justify="right")
    for heading in columns:
        table.add_column(heading.split(".")[-1], justify="right")
    for heading in ("steps", "parameters", "state"):
        table.add_column(heading, justify="right")
    for indices in rows.values():
        cells = [
            ", ".join(str(v) for v in dict.fromkeys(column[i] for i in indices))
            for column in columns.values()
        ]
        run = found[indices[0]]
        parameters, state = sizes[run.fingerprint]
        first = run.fingerprint if len(found) <= _MOST_ROWS else str(len(indices))
        table.add_row(first, *cells, str(run.steps), f"{parameters:,}", f"{state:,}")
    return table


def matches(found: list[Match]) -> list[str]:
    """Say by how much each mixer misses the equal terms of a plan."""
    lines = []
    for match in found:
        what = "state per mixer layer" if match.kind == "state" else "parameters"
        verdict = "as asked for" if not match.miss else f"{100 * match.miss:+,.1f} %"
        lines.append(f"match {what} {match.wanted:,}: {match.mixer} has {match.found:,}, {verdict}")
    return lines


def leaderboard(board: "Leaderboard") -> list[Table]:
    """Draw the scores of one protocol: per task, over all tasks, and mixer against mixer."""
    tasks = Table(title=f"protocol {board.protocol}: tasks", title_justify="left")
    for heading in ("task", "mixer"):
        tasks.add_column(heading, no_wrap=True)
    for heading in ("accuracy %", "95 % interval", "of what can be known %", "best on test %",
                    "settings"):  # fmt: skip
        tasks.add_column(heading, justify="right")
    tasks.add_column("not counted")
    previous = None
    for t in sorted(board.tasks, key=lambda t: (t.task, -(t.accuracy or (-1.0,))[0])):
        if previous not in (None, t.task):
            tasks.add_section()
        name = "" if previous == t.task else t.task
        previous = t.task
        row = (_percent(t.accuracy), _interval(t.accuracy), _percent(t.of_ceiling),
               _percent(t.best_on_test), str(t.settings), t.missing)  # fmt: skip
        tasks.add_row(name, t.mixer, *row)
    mixers = Table(title="mean over tasks", title_justify="left")
    mixers.add_column("mixer", no_wrap=True)
    for heading in ("score %", "95 % interval", "mean rank"):
        mixers.add_column(heading, justify="right")
    mixers.add_column("")
    for m in board.mixers:
        rank = "" if m.rank is None else f"{m.rank:.2f}"
        state = "" if m.complete else "incomplete"
        mixers.add_row(m.mixer, _percent(m.average), _interval(m.average), rank, state)
    return [tasks, mixers, _differences(board)] if board.differences else [tasks, mixers]


def _differences(board: "Leaderboard") -> Table:
    table = Table(title="same tasks, settings and seeds, paired", title_justify="left")
    table.add_column("first minus second", no_wrap=True)
    for heading in ("points", "95 % interval", "pairs", "Wilcoxon p", "corrected p"):
        table.add_column(heading, justify="right")
    for d in board.differences:
        table.add_row(
            f"{d.first} - {d.second}", f"{100 * d.mean.mean:+.2f}", _interval(d.mean),
            str(d.pairs), f"{d.p:.3g}", f"{d.p_corrected:.3g}",
        )  # fmt: skip
    return table


def _percent(value: Interval | float | None) -> str:
    mean = value.mean if isinstance(value, Interval) else value
    return "" if mean is None else f"{100 * mean:.2f}"


def step_times(times: list[StepTime]) -> Table:
    """Draw the times of training steps, beside their matrix products and the setting's first."""
    table = Table("setting", "mixer")
    for heading in (
        "ms per step", "spread", "of it products", "ratio", "tokens per second",
        "ratio to the first",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    first: dict[str, float] = {}
    for run, seconds, spread, products, *_ in times:
        reference = first.setdefault(run.setting, seconds)
        tokens = run.train.batch_size * run.task.input_length
        table.add_row(
            run.setting, run.mixer, f"{1e3 * seconds:.0f}", f"{100 * spread:.0f} %",
            f"{1e3 * products:.0f}", f"{seconds / products:.2f}", f"{tokens / seconds:,.0f}",
            f"{seconds / reference:.2f}",
        )  # fmt: skip
    return table


def spectra(found: dict[str, dict[str, float]], against: str | None) -> Table:
    """Draw the scalars of diagnoses: a row per quantity, a column per run, layer after layer.

    Args:
        found: Scalars of `spectrum.Diagnosis`, by the runs' names.
        against: The run from which the others' differences are shown beside them.
    """
    title = "layer by layer, then their means; the last gains are the model's own"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for run in found:
        table.add_column(run, justify="right", min_width=10, overflow="fold")
        if against not in (None, run):
            table.add_column("difference", justify="right", min_width=10)
    rows = {key.removeprefix("spectrum/"): None for scalars in found.values() for key in scalars}
    layers = sorted({_layer(row) for row in rows})
    for layer in layers:
        for row in (row for row in rows if _layer(row) == layer):
            cells = []
            base = None if against is None else found[against].get(f"spectrum/{row}")
            for run, scalars in found.items():
                value = scalars.get(f"spectrum/{row}")
                cells.append("" if value is None else f"{value:z.4g}")
                if against not in (None, run):
                    cells.append(_difference(value, base))
            table.add_row(row, *cells)
        table.add_section()
    return table


def _difference(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value - base:+z.3g}"


def _layer(row: str) -> float:
    """Return the number in `layer0/x_mean`; the model's own rows come last."""
    first, _, rest = row.partition("/")
    return int(first.removeprefix("layer")) if rest else math.inf


def findings(title: str, found: list[Finding]) -> Table:
    """Draw what holds and what fails of a contract."""
    table = Table("", "promise", "how it is broken", title=title, title_justify="left")
    for promise, broken in found:
        table.add_row("FAILS" if broken else "holds", Text(promise), Text(broken))
    return table


def example(
    inputs: list[int] | list[float], roles: list[str], targets: list[int],
    answers: list[int] | None, columns: int,
) -> list[Text]:  # fmt: skip
    """Draw one sequence in blocks of lines: tokens by role, what is scored, what the solver says.

    Args:
        inputs: Token ids, or rounded numbers.
        roles: A word for each.
        targets: The answer at scored positions, negative elsewhere.
        answers: The solver's; None where there is no solver.
        columns: Width to fill.
    """
    width = max(len(str(t)) for t in (*inputs, *targets))
    per_line = max((columns - 8) // (width + 1), 1)
    lines = []
    for start in range(0, len(inputs), per_line):
        block = slice(start, start + per_line)
        tokens = [(f"{t:>{width}} ", _ROLES.get(r, "")) for t, r in
                  zip(inputs[block], roles[block], strict=True)]  # fmt: skip
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


def _figures(metrics: dict[str, float]) -> str:
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


def standing(found: Standing) -> list[str]:
    """Say how a sweep stands: counts, what runs, what failed and why."""
    record, total = found.record, len(found.record.fingerprints)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(found.counts.items()))
    lines = [f"{record.task}, plan {record.plan}: {total} runs: {counts}"]
    for run, row in found.running:
        step = f"step {row.step}/{run.steps} {_figures(row.metrics)}" if row else "starting"
        lines.append(f"  running: {run.fingerprint} {name(run)}: {step}")
    for run, failed in found.failed:
        lines.append(f"  failed: {run.fingerprint} {name(run)}: {failed.reason}")
    return lines


def left(found: list[Standing], costs: Costs) -> str:
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
            costs.notice(key, row.metrics["train/tokens_per_second"])
    under_way = {key: row.step / r.steps if row else 0.0 for key, (r, row) in running.items()}
    seconds, workers = costs.left(waiting, under_way, len(running)), len(running)
    if seconds is None:
        return "time left: not known yet"
    on = f"on the {workers} that run" if workers else "of one worker, and none runs"
    return f"time left: {duration(seconds)} {on}"


def log(folder: RunFolder) -> list[str]:
    """Return what a run has logged, and how it ended."""
    run, result, failed = folder.run(), folder.result(), folder.failure()
    lines = [f"{folder.fingerprint} {name(run)}: {folder.status()}"]
    for row in folder.rows()[0]:
        figures = " ".join(f"{key}={value:.5g}" for key, value in row.metrics.items())
        lines.append(f"step {row.step}: {figures}")
    written = folder.path / "log.txt"
    if written.exists():
        lines += written.read_text(errors="replace").splitlines()
    if result and result.test:
        lines.append(f"test accuracy {result.test.token_accuracy:.4f}, loss {result.test.loss:.4f}")
    if result and result.stopped:
        lines.append(result.stopped)
    if failed and not result:
        lines += [f"{failed.kind}: {failed.reason}", *failed.traceback.splitlines()]
    return lines
