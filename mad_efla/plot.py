"""Figures of runs, as the report draws them; each a matplotlib `Figure`.

    import mad_efla as mad
    mad.plot.learning(mad.load("runs"))

The runs are those of one plan under one protocol, since protocols are never mixed; several tasks are
panels. `width` is in inches.
"""

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from mad_efla.config import ConfigError
from mad_efla.reporting import figures
from mad_efla.reporting.figures import style

if TYPE_CHECKING:
    from mad_efla.api.runs import Run, Runs

__all__ = [
    "corruption",
    "difficulty",
    "eigenvalues",
    "forest",
    "leaderboard",
    "learning",
    "learning_rate",
    "memory",
    "mixers_by_tasks",
    "spectra",
    "style",
]


def leaderboard(runs: "Runs", *, width: float = figures.PAGE) -> Figure:
    """Draw each mixer's mean test accuracy with its 95 % interval over seeds, the highest first."""
    return _chart(runs, "scores", width)


def mixers_by_tasks(runs: "Runs", *, width: float = figures.PAGE) -> Figure:
    """Draw mean test accuracy as a heat map of mixers by tasks; of two tasks at least."""
    return _chart(runs, "mixers by tasks", width)


def forest(runs: "Runs", *, width: float = figures.PAGE) -> Figure:
    """Draw the paired differences between mixers with their 95 % intervals, and where zero is."""
    return _chart(runs, "differences", width)


def learning(runs: "Runs", *, width: float = figures.PAGE) -> Figure:
    """Draw accuracy on validation while training, at the chosen grid point, with bands over seeds."""
    return _chart(runs, "learning", width)


def difficulty(runs: "Runs", *, width: float = figures.PAGE) -> Figure:
    """Draw test accuracy as one field of the task changes and the rest stays."""
    return _chart(runs, "difficulty", width)


def memory(runs: "Runs", *, width: float = figures.PAGE) -> Figure:
    """Draw test accuracy against the numbers that are carried from token to token."""
    return _chart(runs, "memory", width)


def learning_rate(runs: "Runs", *, width: float = figures.PAGE) -> Figure:
    """Draw accuracy at each learning rate that was tried."""
    return _chart(runs, "learning rate", width)


def corruption(runs: "Runs", *, width: float = figures.PAGE) -> Figure:
    """Draw test accuracy over the severity of each corruption."""
    return _chart(runs, "corruption", width)


def spectra(*runs: "Run", examples: int = 16, seed: int = 0) -> dict[str, Figure]:
    """Draw what trained mixers do with their memory, beside each other; figures by name.

    Args:
        *runs: Runs with weights, such as `runs.best("efla")`.
        examples: Sequences of the test split to look at.
        seed: Draws the noise and the replaced token that gains are measured with.
    """
    from mad_efla.reporting.figures import spectra as drawing

    names = drawing.names([run.config for run in runs])
    found = {name: run.spectrum(examples, seed) for name, run in zip(names, runs, strict=True)}
    return drawing.figures(found)


def eigenvalues(*runs: "Run", examples: int = 16, seed: int = 0) -> Figure:
    """Draw the eigenvalues of single tokens' transitions; see `spectra`."""
    found = spectra(*runs, examples=examples, seed=seed)
    if "eigenvalues" not in found:
        raise ConfigError(f"these mixers hand out no eigenvalues; there is {', '.join(found) or 'nothing'} to draw")
    return found["eigenvalues"]


def _chart(runs: "Runs", name: str, width: float) -> Figure:
    from mad_efla.reporting import charts

    chapters = runs.chapters()
    if len(chapters) != 1:
        plans = ", ".join(f"{c.group.plan} ({c.group.protocol})" for c in chapters) or "none"
        raise ConfigError(f"a figure shows one plan under one protocol, and these runs have {plans}; filter them")
    found = charts.DRAW[name](chapters[0])
    if not found:
        raise ConfigError(f"these runs have nothing to tell of {name}")
    if len(found) > 1:
        raise ConfigError(f"these runs fill {len(found)} figures of {name}; filter them to one task")
    with figures.style():
        return found[0].draw(width)
