"""The one place where runs become cells, and where a grid point is chosen.

A cell is a mixer at a setting: task, data, model and budget as they are, whatever they are called.
Its runs differ in the optimiser's fields, the grid point, and in the seed. One point is chosen:

    the highest mean validation accuracy over seeds, a run that diverged counting as zero;
    of equals the lowest mean validation loss; of equals the plan's first

among the points that every mixer was given at this setting and that have the most seeds done. Where
a plan chooses on seeds of its own, only those choose and only the others are measured.

Every table, figure and page takes its numbers from cells, so that they cannot disagree.
"""

import math
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from mad_efla.analysis import statistics
from mad_efla.analysis.statistics import Interval
from mad_efla.plan.expand import flatten
from mad_efla.plan.run import RunConfig
from mad_efla.runs.read import Group
from mad_efla.runs.schema import Planned, Result

_CONDITION = ("task.", "data.", "model.", "train.")


class Cell:
    """A mixer at a setting, at its chosen grid point.

    Attributes:
        task: The task's name.
        setting: The setting's label, unique within the group.
        mixer: The mixer's label, unique within the group.
        condition: See `RunConfig.condition`.
        check: Whether the setting only checks that all is well; no score counts it.
        point: Fields of the optimiser that the grid varies, at the chosen point.
        runs: The measured runs that are done, by rising seed.
        results: Theirs.
        planned: Measured runs that there are to be at one point.
        best_on_test: The reference's rule: mean test accuracy at the point that is best on test; None
            where points are chosen on seeds of their own, since the others were not measured.
        rates: Learning rates that were tried, rising.
        rate: The chosen one.
        chosen_apart: Whether the point was chosen on seeds that are not measured.
        best_validation: The highest mean validation accuracy of any point.
        missing: What is not there: `1 diverged, 2 missing`; empty if nothing.
        note: What the reader has to know of its seeds or points; mostly empty.
    """

    def __init__(self, points: "_Points", chosen: str):
        self._points = points
        self.task, self.setting, self.mixer = points.task, points.setting, points.mixer
        self.condition = points.condition
        self.check = points.check
        measured = [p for p in points.planned[chosen] if not p.chooses]
        done = sorted((p for p in measured if p.fingerprint in points.results), key=lambda p: p.seed)
        self.planned = len(measured)
        self.runs = [points.runs[p.fingerprint] for p in done]
        self.results = [points.results[p.fingerprint] for p in done]
        self.point = points.varied(chosen)
        self.best_on_test = points.best_on_test()
        self.rates, self.rate = points.rates(), points.rate(chosen)
        self.chosen_apart = points.chosen_apart()
        self.best_validation = points.best_validation()
        self.missing = points.missing(measured)

    @property
    def seeds(self) -> list[int]:
        """The seeds that are measured, rising."""
        return [run.seed for run in self.runs]

    def values(self, metric: str = "token_accuracy") -> dict[int, float]:
        """Return a test metric by seed, 0 where a run diverged; none where a run lacks it.

        Args:
            metric: A field of `Scores` that is an accuracy.
        """
        found = {
            run.seed: getattr(result.test, metric) if result.test else 0.0
            for run, result in zip(self.runs, self.results, strict=True)
        }
        return {} if None in found.values() else found

    def interval(self, metric: str) -> Interval | None:
        """Return the mean of a test accuracy with its interval; None where it was not taken."""
        found = list(self.values(metric).values())
        return statistics.interval(found) if found else None

    @cached_property
    def accuracy(self) -> Interval | None:
        """Mean test token accuracy with its interval; None where every run diverged."""
        return self.interval("token_accuracy") if any(r.test for r in self.results) else None

    @property
    def macro_accuracy(self) -> float | None:
        """Mean over the runs that ended."""
        return _mean([r.test.macro_accuracy for r in self.results if r.test])

    @property
    def sequence_accuracy(self) -> float | None:
        """Mean share of sequences with all answers right; None where it was not taken."""
        found = self.interval("sequence_accuracy")
        return found.mean if found and self.accuracy else None

    @property
    def loss(self) -> float | None:
        """Mean test loss of the runs that ended, nats per scored token."""
        return _mean([r.test.loss for r in self.results if r.test])

    @property
    def ceiling(self) -> float:
        """Mean share of the scored positions that can be answered at all."""
        return _mean([r.ceiling for r in self.results]) or 1.0

    @property
    def chance(self) -> float | None:
        """Mean share that one answer to everything gets right; None where it was not taken."""
        return _mean([r.chance for r in self.results if r.chance is not None])

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return self.results[0].parameters

    @property
    def state_size(self) -> int | None:
        """Numbers carried between tokens; None where that is unknown."""
        return self.results[0].state_size

    @property
    def steps_to_90(self) -> float | None:
        """Median step at which validation accuracy reached 0.9; None if most did not."""
        ordered = sorted(math.inf if r.steps_to_90 is None else r.steps_to_90 for r in self.results)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        return None if math.isinf(middle) else middle

    @property
    def seconds(self) -> float:
        """Mean wall time of a run."""
        return _mean([r.seconds for r in self.results]) or 0.0

    @property
    def note(self) -> str:
        """Say what the interval cannot: seeds that lag, points that were left out."""
        values = list(self.values().values())
        notes = []
        if lagging := statistics.lagging(values):
            notes.append(f"{lagging} of {len(values)} seeds has not learned yet")
        elif len(values) == 1 and not self.check:
            notes.append("one seed has no interval")
        return "; ".join(notes + self._points.notes)

    @property
    def best_run(self) -> RunConfig | None:
        """The measured run that is best on validation; None where all diverged."""
        ended = [(r.validation.token_accuracy, i) for i, r in enumerate(self.results) if r.validation]
        return self.runs[max(ended, key=lambda e: (e[0], -e[1]))[1]] if ended else None


def cells(group: Group) -> list[Cell]:
    """Return the cells of a group that have a result, settings in the order of the plan.

    Within a setting the best comes first.
    """
    found = _points(group)
    order: dict[tuple[str, str], int] = {}
    for points in found:
        order.setdefault((points.task, points.condition), len(order))
    made = [Cell(points, chosen) for points in found if (chosen := points.choose())]
    made = [cell for cell in made if cell.results]
    return sorted(made, key=lambda c: (order[c.task, c.condition], -(c.accuracy.mean if c.accuracy else -1.0)))


def chosen(group: Group) -> list[tuple[str, str, str, str]]:
    """Name the chosen point of every cell: mixer, its code, condition and point."""
    found = []
    for points in _points(group):
        if point := points.choose():
            entry = points.planned[point][0]
            found.append((entry.mixer, entry.code, entry.condition, entry.point))
    return found


class _Points:
    """All runs of one cell, by grid point."""

    def __init__(self, group: Group, mixer: str, condition: str):
        self.mixer, self.condition = mixer, condition
        self.runs, self.results = group.runs, group.results
        self.exploring = group.protocol == "exploring"
        self.planned: dict[str, list[Planned]] = {}
        self.task = self.setting = ""
        self.check = True
        self.allowed: set[str] | None = None  # points that every mixer was given
        self.notes: list[str] = []

    def choose(self) -> str | None:
        """Return the chosen point; None if there is no result to choose by."""
        done = {
            point: self._choosing(runs)
            for point, runs in self.planned.items()
            if self.allowed is None or point in self.allowed
        }
        most = max(map(len, done.values()), default=0)
        if not most:
            return None
        whole = {point: found for point, found in done.items() if len(found) == most}
        return max(whole, key=lambda point: _merit(whole[point]))

    def _choosing(self, runs: list[Planned]) -> list[Result]:
        """Return the results that choose: those of seeds for it, or of all where there are none."""
        own = [p for p in runs if p.chooses] or (
            [] if any(p.chooses for other in self.planned.values() for p in other) else runs
        )
        return [self.results[p.fingerprint] for p in own if p.fingerprint in self.results]

    def varied(self, chosen: str) -> dict[str, object]:
        """Return the fields of the optimiser that differ between the points, at the chosen one."""
        prefixes = ("optim.", *_CONDITION) if self.exploring else ("optim.",)
        fields = {
            point: {k: v for k, v in flatten(run).items() if k.startswith(prefixes)}
            for point, planned in self.planned.items()
            if (run := next((self.runs[p.fingerprint] for p in planned if p.fingerprint in self.runs), None))
        }
        own = fields.get(chosen, {})
        return {k: v for k, v in own.items() if any(f.get(k) != v for f in fields.values())}

    def rate(self, point: str) -> float | None:
        """Return the learning rate of a point; None where no configuration of it can be read."""
        return next(
            (self.runs[p.fingerprint].optim.lr for p in self.planned[point] if p.fingerprint in self.runs), None
        )

    def rates(self) -> list[float]:
        """Return the learning rates of all points, rising."""
        return sorted({rate for point in self.planned if (rate := self.rate(point)) is not None})

    def chosen_apart(self) -> bool:
        """Tell whether seeds that are not measured choose."""
        return any(p.chooses for runs in self.planned.values() for p in runs)

    def best_validation(self) -> float | None:
        """Return the highest mean validation accuracy of any point; None where nothing is done."""
        found = [own for runs in self.planned.values() if (own := self._choosing(runs))]
        return max((_merit(own)[0] for own in found), default=None)

    def best_on_test(self) -> float | None:
        """Return the mean test accuracy of the point that is best on the test split itself."""
        if self.chosen_apart():
            return None
        means = []
        for planned in self.planned.values():
            found = [self.results[p.fingerprint] for p in planned if p.fingerprint in self.results]
            if found:
                means.append(_mean([r.test.token_accuracy if r.test else 0.0 for r in found]))
        return max((m for m in means if m is not None), default=None)

    def missing(self, measured: list[Planned]) -> str:
        """Count what is not there: of the choosing runs, and of the measured ones."""
        every = {p.fingerprint: p for planned in self.planned.values() for p in planned}
        return _missing(every | {p.fingerprint: p for p in measured}, self.results)


def _merit(found: list[Result]) -> tuple[float, float]:
    """Return what a point is chosen by: validation accuracy, then loss."""
    accuracies = [r.validation.token_accuracy if r.validation else 0.0 for r in found]
    ended = [r.validation for r in found if r.validation]
    loss = math.fsum(v.loss for v in ended) / len(ended) if ended else math.inf
    return math.fsum(accuracies) / len(accuracies), -loss


def _points(group: Group) -> list[_Points]:
    """Group runs by mixer and condition, give each a label of its own, and match the grids."""
    if group.protocol == "exploring":
        group = _explored(group)
    tasks = _tasks(group)
    found: dict[tuple[str, str], _Points] = {}
    named = _mixers(group)
    for entry in group.planned:
        key = (named[entry.mixer, entry.code], entry.condition)
        points = found.setdefault(key, _Points(group, *key))
        points.planned.setdefault(entry.point, []).append(entry)
        points.check &= entry.check  # what any sweep measures is no check
    labels = _labels(group)
    for (_, condition), points in found.items():
        points.task, points.setting = tasks[condition], labels[condition]
    if group.protocol != "unmatched":  # there the grids differ on purpose, and its name says so
        _match(list(found.values()))
    return list(found.values())


def missing_runs(group: Group) -> dict[tuple[str, str], str]:
    """Count what is not there of each mixer and task: `1 diverged, 2 missing`."""
    named, tasks = _mixers(group), _tasks(group)
    found: dict[tuple[str, str], list[str]] = {}
    for p in group.planned:
        found.setdefault((named[p.mixer, p.code], tasks[p.condition]), []).append(p.fingerprint)
    return {key: _missing(names, group.results) for key, names in found.items()}


def _missing(fingerprints: Iterable[str], results: dict[str, Result]) -> str:
    names = list(fingerprints)
    diverged = sum(results[f].status == "diverged" for f in names if f in results)
    counts = {"diverged": diverged, "missing": sum(f not in results for f in names)}
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n)


def labels(group: Group) -> list[str]:
    """Return the labels of a group's mixers, in the order of the plan."""
    named = _mixers(group)
    return list(dict.fromkeys(named[p.mixer, p.code] for p in group.planned))


def _mixers(group: Group) -> dict[tuple[str, str], str]:
    """Give versions of the user's own code that share a label a digest behind it."""
    codes: dict[str, set[str]] = {}
    for entry in group.planned:
        codes.setdefault(entry.mixer, set()).add(entry.code)
    return {
        (mixer, code): f"{mixer} [{code[:4]}]" if len(found) > 1 else mixer
        for mixer, found in codes.items()
        for code in found
    }


def _explored(group: Group) -> Group:
    """Make everything that a search ranges over a part of the point; settings are its labels."""
    named = [
        entry.model_copy(update={"condition": entry.setting, "point": entry.condition + entry.point})
        for entry in group.planned
    ]
    return group._replace(planned=named)


def _match(found: list[_Points]) -> None:
    """Let every cell of a setting choose among the points that all mixers were given there."""
    by_setting: dict[str, list[_Points]] = {}
    for points in found:
        by_setting.setdefault(points.condition, []).append(points)
    for rivals in by_setting.values():
        # Where measured seeds are made at the chosen point alone, the choosing ones are the grid.
        grids = [_grid(points) for points in rivals]
        common = set.intersection(*grids)
        for points, own in zip(rivals, grids, strict=True):
            if own != common and common:
                points.allowed = common
                n = len(own - common)
                points.notes.append(f"{n} grid point{'s' * (n > 1)} left out that not every mixer was given")
            elif not common:
                points.notes.append("no grid point in common with the other mixers: not ranked")


def _grid(points: _Points) -> set[str]:
    chosen = {k for k, runs in points.planned.items() if any(p.chooses for p in runs)}
    return chosen or set(points.planned)


def _tasks(group: Group) -> dict[str, str]:
    """Return the task's name of each condition."""
    names = {p.condition: group.runs[p.fingerprint].task.name for p in group.planned if p.fingerprint in group.runs}
    by_run = {f: record.task for record in group.records for f in record.fingerprints}
    for entry in group.planned:
        names.setdefault(entry.condition, by_run.get(entry.fingerprint, ""))
    return names


def _labels(group: Group) -> dict[str, str]:
    """Give each setting a label that no other of its task has.

    It is the sweep's label. Settings that share one also name the fields in which they differ.
    """
    tasks, first = _tasks(group), dict[str, RunConfig | None]()
    shown: dict[tuple[str, str], list[str]] = {}
    for entry in group.planned:
        if entry.condition not in first or first[entry.condition] is None:
            if entry.condition not in first:
                shown.setdefault((tasks[entry.condition], entry.setting), []).append(entry.condition)
            first[entry.condition] = group.runs.get(entry.fingerprint)
    labels = {}
    for (_, label), conditions in shown.items():
        flat = {c: _fields(first[c]) for c in conditions}
        for condition in conditions:
            own = flat[condition]
            apart = {k: v for k, v in own.items() if any(f.get(k) != v for f in flat.values())}
            words = [f"{k.split('.')[-1]}={v}" for k, v in apart.items()]
            labels[condition] = ", ".join([label, *words])
    return labels


def _fields(run: RunConfig | None) -> dict[str, Any]:
    if run is None:
        return {}
    return {k: v for k, v in flatten(run).items() if k.startswith(_CONDITION)}


def by_setting(found: Iterable[Cell]) -> dict[tuple[str, str], dict[str, Cell]]:
    """Arrange cells by task and setting, then by mixer."""
    table: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in found:
        table.setdefault((cell.task, cell.setting), {})[cell.mixer] = cell
    return table


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
