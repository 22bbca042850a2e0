"""Exploring: points proposed by Optuna from what earlier runs reached, an ordinary run for each.

One study for every mixer at every setting, each of equally many trials. A study is kept nowhere: it
is played again from the run folders, in the order in which the sweep's record names them, so that a
search that was killed goes on as if it had not been. Each proposal has a seed of its own, of the
plan's seed and the trial's number; so with one worker equal plans make equal trials.

What is maximised is validation accuracy, and `prune: hyperband` looks at it at every evaluation.
The points of two mixers are not the same, which is why these runs carry the protocol `exploring`
and have no score.

Source: Bergstra et al. 2011 (TPE); Li et al. 2018, arXiv 1603.06560 (Hyperband).
"""

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from mad_efla.config import ConfigError, digest
from mad_efla.execution.costs import Costs
from mad_efla.execution.queue import Event, RunQueue
from mad_efla.plan.expand import Space, Sweep
from mad_efla.plan.grid import Range, Search
from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.schema import SweepRecord
from mad_efla.runs.sweeps import write_sweep

_PROPOSALS = 20  # of points that were had before, or cannot be built, until a study is exhausted


class Explore(RunQueue):
    """The trials of a sweep that searches: each is proposed when a worker is free.

    Args:
        sweep: With its search.
        record: As found in the folder; its runs are played again. Rewritten with each trial.
        out: The folder of run folders.
        costs: Told of each run.
        retry_failed: Make trials again that failed by an error of their own.

    Attributes:
        record: What it has become.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, sweep: Sweep, record: SweepRecord, out: Path, costs: Costs, *, retry_failed: bool = False):
        super().__init__([], out, costs)
        assert sweep.search
        there = tuple(f for f in record.fingerprints if (out / f / "config.json").exists())
        self.record = record.model_copy(update={"fingerprints": there})
        self._studies = [_Study(space, sweep.search, sweep.prune) for space in sweep.spaces]
        self._of: dict[str, _Study] = {}
        for fingerprint in there:
            run = RunFolder(out, fingerprint).run()
            study = next(s for s in self._studies if s.space.holds(run))
            self._take(study, run)
            study.again(run)
            self._read(run)
            failure = RunFolder(out, fingerprint).failure()
            again = retry_failed and failure is not None and failure.kind == "failed"
            if not again and study.ends(run, RunFolder(out, fingerprint)):
                self.needs.drop(run)
            else:
                self.waiting[fingerprint] = run

    @property
    def total(self) -> int:
        """Trials of all studies together."""
        return sum(study.search.trials for study in self._studies)

    def next(self) -> RunConfig | None:
        """Go on with what was begun; else propose a trial of the study that has had fewest."""
        if begun := super().next():
            return begun
        for study in sorted(self._studies, key=lambda s: len(s.trials)):
            if run := study.propose():
                RunFolder(self.out, run.fingerprint).create(run)
                self._take(study, run)
                names = *self.record.fingerprints, run.fingerprint
                self.record = self.record.model_copy(update={"fingerprints": names})
                write_sweep(self.out, self.record)
                return run
        return None

    def ended(self, run: RunConfig) -> Event:
        """Tell the study what came of a trial."""
        self._read(run)
        self._of[run.fingerprint].ends(run, RunFolder(self.out, run.fingerprint))
        return super().ended(run)

    def prune_reason(self, run: RunConfig) -> str:
        """Say at which evaluation a trial fell behind, if it did."""
        return self._read(run)

    def _take(self, study: "_Study", run: RunConfig) -> None:
        self._of[run.fingerprint] = study
        self.runs.append(run)
        self.costs.add(run)
        self.needs.add(run)

    def _read(self, run: RunConfig) -> str:
        return self._of[run.fingerprint].reads(run, RunFolder(self.out, run.fingerprint))


class _Study:
    """One space, and its trials so far in the order of their numbers."""

    def __init__(self, space: Space, search: Search, prune: str | None):
        self._optuna = _optuna()
        self.space, self.search = space, search
        self.trials: dict[str, Any] = {}
        self._seen: dict[str, tuple[int, int, str]] = {}  # byte offset, last step, verdict
        self._axes = {field: _axis(self._optuna, r) for field, r in space.over.items()}
        pruner = self._optuna.pruners.NopPruner()
        if prune:
            run = space.build({f: r.at(0.5) for f, r in space.over.items()})
            pruner = self._optuna.pruners.HyperbandPruner(min_resource=run.eval_every, max_resource=run.steps)
        # The name decides which trial is in which of Hyperband's brackets.
        name = f"{space.setting} {space.mixer}"
        self._study = self._optuna.create_study(direction="maximize", pruner=pruner, study_name=name)

    def propose(self) -> RunConfig | None:
        """Propose a run that was not had before; None if the study has ended."""
        if len(self.trials) >= self.search.trials:
            return None
        for attempt in range(_PROPOSALS):
            number = f"{self.search.seed} {len(self.trials)} {attempt}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
                self._study.sampler = self._optuna.samplers.TPESampler(
                    seed=int(digest(number), 16) % 2**32, constant_liar=True
                )
            trial = self._study.ask(self._axes)
            try:
                run = self.space.build(_point(self.space.over, trial.params))
            except ConfigError:  # a combination that no model can be built of
                run = None
            if run and run.fingerprint not in self.trials:
                self.trials[run.fingerprint] = trial
                return run
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        self.search = self.search.model_copy(update={"trials": len(self.trials)})
        return None

    def again(self, run: RunConfig) -> None:
        """Take a trial that an earlier call had proposed."""
        self._study.enqueue_trial(_parameters(self.space.over, run))
        self.trials[run.fingerprint] = self._study.ask(self._axes)

    def reads(self, run: RunConfig, folder: RunFolder) -> str:
        """Report the evaluations since the last look; return the verdict."""
        trial = self.trials[run.fingerprint]
        offset, last, verdict = self._seen.get(run.fingerprint, (0, 0, ""))
        rows, end = folder.rows(offset)
        for row in rows:
            value = row.metrics.get("val/token_accuracy")
            if value is None or verdict or row.step <= last:  # a retry logs its steps again
                continue
            trial.report(value, row.step)
            last = row.step
            if last < run.steps and trial.should_prune():
                verdict = f"at step {last}, validation accuracy {value:.4f}"
        self._seen[run.fingerprint] = end, last, verdict
        return verdict

    def ends(self, run: RunConfig, folder: RunFolder) -> bool:
        """Tell the study how a trial has ended; False if it has not."""
        states, trial = self._optuna.trial.TrialState, self.trials[run.fingerprint]
        result, failure = folder.result(), folder.failure()
        if self._seen.get(run.fingerprint, (0, 0, ""))[2]:  # also if it ended before it was told
            self._study.tell(trial, state=states.PRUNED)
        elif result:
            accuracy = result.validation.token_accuracy if result.validation else 0.0
            self._study.tell(trial, accuracy)
        elif failure and failure.kind == "failed" and not failure.transient:
            self._study.tell(trial, state=states.FAIL)
        else:
            return False
        return True


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise ConfigError("search: needs Optuna, which is not installed; pip install 'mad-efla[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _axis(optuna: ModuleType, r: Range) -> Any:
    """Return a range as Optuna writes it; choices by their number."""
    if r.choice is not None:
        return optuna.distributions.CategoricalDistribution(range(len(r.choice)))
    if r.integer is not None:
        return optuna.distributions.IntDistribution(*r.integer)
    low, high = r.log or r.uniform or (0.0, 1.0)
    return optuna.distributions.FloatDistribution(low, high, log=r.log is not None)


def _point(over: dict[str, Range], parameters: dict[str, Any]) -> dict[str, Any]:
    return {f: r.choice[parameters[f]] if r.choice else parameters[f] for f, r in over.items()}


def _parameters(over: dict[str, Range], run: RunConfig) -> dict[str, Any]:
    """Read a point back from its run."""
    found = {}
    for field, r in over.items():
        section, key = field.split(".")
        value = getattr(getattr(run, section), key)
        if r.choice is not None:
            value = list(value) if isinstance(value, tuple) else value
            value = r.choice.index(value)
        found[field] = value
    return found
