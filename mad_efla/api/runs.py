"""Runs that are there, as pandas frames, tables and models: what `load` and `sweep` return.

    runs                                  the verdict and the tables, as the terminal shows them
    runs[runs.mixer == "efla"]            some of them, filtered like a frame
    runs.frame()                          a row a run: every field, every score
    runs.scores(), runs.differences()     what is concluded, in the numbers of `mad-efla score`
    runs.best("efla").model()             one run: its weights, its data, its spectrum

Numbers come from `analysis`, the one path from runs to claims, and can't differ from a command's.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mad_efla.analysis import verdict
from mad_efla.analysis.leaderboard import Leaderboard, leaderboard
from mad_efla.config import ConfigError, suggest
from mad_efla.plan.expand import flatten
from mad_efla.plan.run import RunConfig
from mad_efla.reporting import renderers, tables
from mad_efla.reporting.table import Table
from mad_efla.runs.archive import ArchivedRun
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import Group
from mad_efla.runs.schema import Planned, Result

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from mad_efla.reporting.page import Chapter
    from mad_efla.spectrum import Diagnosis
    from mad_efla.tasks import Examples

_SCORES = ("loss", "token_accuracy", "macro_accuracy", "sequence_accuracy")


class Run:
    """One run that is there.

    Attributes:
        config: Everything that it was made from; its `fingerprint` is its name.
        result: How it ended; None where it has not, or is not done.
        folder: Where its files are.
        role: `measured`, `chooses` (a grid point is chosen by it), or `check` (no score counts it).
    """

    def __init__(self, config: RunConfig, result: Result | None, folder: RunFolder | ArchivedRun, role: str):
        self.config, self.result, self.folder, self.role = config, result, folder.path, role
        self._folder = folder

    def __repr__(self) -> str:
        c = self.config
        score = f", {100 * self.result.test.token_accuracy:.1f} %" if self.result and self.result.test else ""
        return f"<Run {c.fingerprint}: {c.task.name} {c.setting} {c.mixer} seed {c.seed}{score}>"

    def model(self) -> "nn.Module":
        """Return the model with its chosen weights, in evaluation mode, on the CPU.

        Raises:
            ConfigError: There are no weights: it is not done, or they were not kept.
        """
        from mad_efla.training import model

        found = model.build(self.config)
        found.load_state_dict(self._folder.load_model())
        return found.eval()

    def data(self, split: str = "test") -> "Examples":
        """Return the examples of a split: `train`, `validation` or `test`, as numpy arrays.

        Args:
            split: Which.
        """
        from mad_efla.tasks import Split
        from mad_efla.training import data

        known = Split.__args__  # pyright: ignore[reportAttributeAccessIssue]
        if split not in known:
            raise ConfigError(f"split={split!r} must be one of {', '.join(known)}{suggest(split, list(known))}")
        made = data.make(self.config.task, self.config.seed, self.config.data)
        return getattr(made, split)

    def spectrum(self, examples: int = 16, seed: int = 0) -> "Diagnosis":
        """Return what its mixers do with their memory; see `mad_efla.spectrum`.

        Args:
            examples: Sequences of the test split to look at.
            seed: Draws the noise and the replaced token that gains are measured with.
        """
        from mad_efla.reporting.figures import spectra

        return spectra.diagnose(self._folder, examples, seed)

    def curves(self) -> "pandas.DataFrame":
        """Return what it logged while it trained: step, metric, value, one row each."""
        import pandas

        rows = [(row.step, metric, value) for row in self._folder.rows()[0] for metric, value in row.metrics.items()]
        return pandas.DataFrame(rows, columns=["step", "metric", "value"])


class Runs:
    """A set of runs, and what is concluded from them. Made by `load` and `sweep`.

    A column of `frame()` is an attribute: `runs.mixer`, `runs["optim.lr"]`.
    """

    def __init__(self, groups: Sequence[Group]):
        self._groups = [group for group in groups if group.planned]
        self._boards: list[Leaderboard] | None = None
        self._frame: pandas.DataFrame | None = None

    # ---------------------------------------------------------------- as a set of runs

    def __len__(self) -> int:
        return sum(len(group.planned) for group in self._groups)

    def __iter__(self) -> Iterator[Run]:
        for group in self._groups:
            for entry in group.planned:
                if entry.fingerprint in group.runs:
                    yield self._run(group, entry)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        frame = self.frame()
        if name not in frame.columns:
            raise AttributeError(f"runs have no {name!r}{suggest(name, list(frame.columns))}")
        return frame[name]

    def __getitem__(self, chosen: Any) -> Any:
        """Return a column by its name, or the runs for which a boolean column of `frame()` is true."""
        frame = self.frame()
        if isinstance(chosen, str):
            return frame[chosen]
        kept = set(frame.index[chosen])
        groups = []
        for group in self._groups:
            own = [entry for entry in group.planned if entry.fingerprint in kept]
            names = {entry.fingerprint for entry in own}
            groups.append(
                group._replace(
                    planned=own,
                    runs={k: v for k, v in group.runs.items() if k in names},
                    results={k: v for k, v in group.results.items() if k in names},
                    folders={k: v for k, v in group.folders.items() if k in names},
                )
            )
        return Runs(groups)

    def _run(self, group: Group, entry: Planned) -> Run:
        folder = group.folders[entry.fingerprint]
        return Run(group.runs[entry.fingerprint], group.results.get(entry.fingerprint), folder, _role(entry))

    # ---------------------------------------------------------------- as frames

    def frame(self) -> "pandas.DataFrame":
        """Return a row a run, its fingerprint as the index: every field, and every score where it is done.

        `role` tells measured runs from those that choose a grid point and those that only check;
        `score` is the test token accuracy as tables count it, 0 where a run diverged.
        """
        import pandas

        if self._frame is None:
            rows = [
                _row(group, entry)
                for group in self._groups
                for entry in group.planned
                if entry.fingerprint in group.runs
            ]
            columns = list(dict.fromkeys(key for row in rows for key in row)) or ["fingerprint"]
            self._frame = pandas.DataFrame(rows, columns=columns).set_index("fingerprint")
        return self._frame.copy()

    def curves(self) -> "pandas.DataFrame":
        """Return what the runs logged while they trained: run, step, metric, value, one row each."""
        import pandas

        parts = [run.curves().assign(run=run.config.fingerprint) for run in self]
        return _stacked(parts, ["run", "step", "metric", "value"], pandas)

    def probes(self) -> "pandas.DataFrame":
        """Return how the runs did on further test sets: run, name, severity, accuracy, finite."""
        import pandas

        parts = [
            pandas.DataFrame([probe.model_dump() for probe in run.result.probes]).assign(run=run.config.fingerprint)
            for run in self
            if run.result and run.result.probes
        ]
        return _stacked(parts, ["run", "name", "severity", "accuracy", "finite"], pandas)

    def scores(self) -> "pandas.DataFrame":
        """Return a row for each mixer and setting: mean accuracy with its interval, seeds, chosen rate, note.

        `low` and `high` are the 95 % interval over seeds, none with a single seed.
        """
        import pandas

        rows = [
            {
                "plan": board.plan,
                "protocol": board.protocol,
                "task": cell.task,
                "setting": cell.setting,
                "mixer": cell.mixer,
                "accuracy": cell.accuracy.mean if cell.accuracy else None,
                "low": cell.accuracy.low if cell.accuracy else None,
                "high": cell.accuracy.high if cell.accuracy else None,
                "macro_accuracy": cell.macro_accuracy,
                "sequence_accuracy": cell.sequence_accuracy,
                "loss": cell.loss,
                "chance": cell.chance,
                "ceiling": cell.ceiling,
                "seeds": len(cell.seeds),
                "lr": cell.rate,
                "parameters": cell.parameters,
                "state_size": cell.state_size,
                "check": cell.check,
                "missing": cell.missing,
                "note": cell.note,
            }
            for board in self._scored()
            for cell in (*board.cells, *board.checks)
        ]
        return pandas.DataFrame(rows)

    def differences(self) -> "pandas.DataFrame":
        """Return a row for every two mixers: first minus second with its interval, p, wins and losses."""
        import pandas

        rows = []
        for board in self._scored():
            for pair in board.pairs:
                d = pair.difference
                rows.append(
                    {
                        "plan": board.plan,
                        "protocol": board.protocol,
                        "first": pair.first,
                        "second": pair.second,
                        "difference": d.mean.mean,
                        "low": d.mean.low,
                        "high": d.mean.high,
                        "p": d.p,
                        "p_corrected": pair.p_corrected,
                        "differ": pair.differ,
                        "settings": d.settings,
                        "seeds": d.seeds,
                        "wins": d.wins,
                        "losses": d.losses,
                    }
                )
        return pandas.DataFrame(rows)

    # ---------------------------------------------------------------- as conclusions

    def verdict(self) -> list[str]:
        """Return what the numbers allow to say, in sentences, and what they leave open."""
        return [sentence for board in self._scored() for sentence in verdict.sentences(board)]

    def best(self, mixer: str) -> Run:
        """Return a mixer's measured run that is best on validation.

        Args:
            mixer: Its label, as tables show it.

        Raises:
            ConfigError: There is no such mixer, or no run of it is done.
        """
        cells = [
            (group, cell) for group, board in zip(self._groups, self._scored(), strict=True) for cell in board.cells
        ]
        own = [(group, run) for group, cell in cells if cell.mixer == mixer and (run := cell.best_run)]
        if not own:
            known = list(dict.fromkeys(cell.mixer for _, cell in cells))
            raise ConfigError(f"mixer {mixer!r} has no run that is done{suggest(mixer, known)}")
        group, run = max(own, key=lambda pair: _merit(pair[0].results[pair[1].fingerprint]))
        return Run(run, group.results[run.fingerprint], group.folders[run.fingerprint], "measured")

    def chapters(self) -> "list[Chapter]":
        """Return what the report tells of them: a chapter for each plan and protocol."""
        from mad_efla.analysis import corruption
        from mad_efla.reporting.page import Chapter

        return [
            Chapter(group, board, corruption.arms(board.cells))
            for group, board in zip(self._groups, self._scored(), strict=True)
        ]

    def __repr__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        console = Console(file=text, width=140)
        for board in self._scored():
            for sentence in verdict.sentences(board):
                console.print(sentence, markup=False, highlight=False)
            for table in _tables(board):
                console.print(renderers.terminal(table, console.width))
        return text.getvalue().rstrip() or f"<Runs: {len(self)}, none is done>"

    def _repr_html_(self) -> str:
        from markupsafe import escape

        parts = []
        for board in self._scored():
            parts += [f"<p>{escape(sentence)}</p>" for sentence in verdict.sentences(board)]
            parts += [f"<p><b>{escape(t.title)}</b></p>{renderers.html(t)}" for t in _tables(board)]
        return "\n".join(parts) or f"<p>{len(self)} runs, none is done</p>"

    def _scored(self) -> list[Leaderboard]:
        if self._boards is None:
            self._boards = [leaderboard(group) for group in self._groups]
        return self._boards


def _role(entry: Planned) -> str:
    return "chooses" if entry.chooses else "check" if entry.check else "measured"


def _row(group: Group, entry: Planned) -> dict[str, Any]:
    run, result = group.runs[entry.fingerprint], group.results.get(entry.fingerprint)
    row: dict[str, Any] = {"fingerprint": entry.fingerprint, "plan": group.plan, "protocol": group.protocol}
    row |= {"task": run.task.name} | flatten(run) | {"role": _role(entry)}
    lies = group.folders.get(entry.fingerprint)
    row["status"] = result.status if result else lies.status() if lies else "waiting"
    if result:
        row["score"] = result.test.token_accuracy if result.test else 0.0
        for split in ("test", "validation"):
            scores = getattr(result, split)
            row |= {f"{split}_{name}": getattr(scores, name, None) for name in _SCORES}
        others = result.model_dump(exclude={"test", "validation", "environment", "probes", "spent", "status"})
        row |= {key: value for key, value in others.items() if key != "fingerprint"}
    return row


def _merit(result: Result) -> float:
    return result.validation.token_accuracy if result.validation else -1.0


def _tables(board: Leaderboard) -> list[Table]:
    shown = [*board.cells, *board.checks]
    found = []
    for task in dict.fromkeys(cell.task for cell in shown):
        title = f"{task}, plan {board.plan or '-'}, protocol {board.protocol}; 95 % intervals over seeds"
        found.append(tables.sweep([cell for cell in shown if cell.task == task], title))
    return found


def _stacked(parts: "list[pandas.DataFrame]", columns: list[str], pandas: Any) -> "pandas.DataFrame":
    return pandas.concat(parts, ignore_index=True)[columns] if parts else pandas.DataFrame(columns=columns)
