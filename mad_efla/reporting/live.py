"""The live display of a sweep, on stderr."""

import time

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from mad_efla.execution.costs import Costs
from mad_efla.execution.queue import Event
from mad_efla.plan.run import RunConfig
from mad_efla.reporting.terminal import duration, figures_of, name, stderr

_PLAIN_SECONDS = 15.0  # between lines about running runs, where stderr is no terminal


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
        self, runs: list[RunConfig], waiting: list[RunConfig], costs: Costs, workers: int, total: int | None = None
    ):
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
                self._say(f"{name(run)}: step {step}/{run.steps} {figures_of(metrics)}")
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
            self.costs.observe_rate(key, metrics["train/tokens_per_second"])
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
            note = f"{step}/{run.steps} {figures_of(metrics)}"
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
        left = self.costs.seconds_left(self.waiting - self.running.keys(), self._shares(), self.workers)
        when = "time left not known yet" if left is None else f"{duration(left)} left"
        return f"{self.ended}/{self.total} runs, {when}"

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _bars() -> Progress:
    note = TextColumn("{task.fields[note]}")
    return Progress(TextColumn("{task.description}"), BarColumn(30), note)
