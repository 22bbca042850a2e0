"""Choose, then measure: which runs a plan with `choose` makes once its grid has been looked at.

The whole grid is made on seeds of its own. Of every mixer and setting whose grid is done one point
is chosen, by the rule of `analysis.cells`, and made on the plan's seeds, which took no part in the
choice. So the chosen point's score is not biased by having been chosen, and a grid and five seeds
cost little more than the five seeds.

What is chosen follows from the run folders alone, so a sweep that was killed goes on by itself.
"""

from pathlib import Path

from mad_efla.analysis import cells
from mad_efla.plan.expand import Sweep
from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import finished, permanently_failed
from mad_efla.runs.read import of_runs
from mad_efla.runs.schema import Planned, planned


def decided(sweep: Sweep, out: Path) -> Sweep:
    """Add the measured runs of every cell whose choosing runs have all ended.

    Args:
        sweep: A sweep; one that does not choose is returned as it is.
        out: The folder of run folders.
    """
    if not sweep.measured:
        return sweep
    checks = [run for run in sweep.runs if run.fingerprint in sweep.checks]
    choosing = [run for run in sweep.runs if run.seed in sweep.choosing and run not in checks]
    results = finished(out, [run.fingerprint for run in choosing])
    ended = results.keys() | permanently_failed(out, choosing)
    open_cells = {_cell(run) for run in choosing if run.fingerprint not in ended}
    ready = [run for run in choosing if _cell(run) not in open_cells]
    chosen = cells.chosen(of_runs((), results, choosing=ready)) if ready else []
    measured = [run for key in chosen for run in sweep.measured[key]]
    return sweep._replace(runs=[*choosing, *measured, *checks])


def named(sweep: Sweep) -> tuple[Planned, ...]:
    """Note of each run what it is for: to choose, to be measured, or a check."""
    return tuple(
        planned(run, chooses=run.seed in sweep.choosing, check=run.fingerprint in sweep.checks) for run in sweep.runs
    )


def _cell(run: RunConfig) -> tuple[str, str, str]:
    return run.mixer, run.mixer_code, run.condition
