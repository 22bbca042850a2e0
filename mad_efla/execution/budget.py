"""A budget of time: as many seeds, then settings, of a plan as fit it by what its runs cost.

Levels grow by one seed at a time: two seeds at the plan's first setting, up to all of the plan's
seeds; the same at the first two settings; when all settings have them, more seeds than the plan
names. The largest level that fits is made. Runs are the same as without a budget, so a longer one
goes on from a shorter one's.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from mad_efla.config import ConfigError
from mad_efla.plan.expand import Sweep
from mad_efla.plan.run import RunConfig

MOST_SEEDS = 20
_UNITS = {"s": 1, "m": 60, "h": 3600}

Cost = Callable[[list[RunConfig]], float]


def parse(text: str) -> float:
    """Return the seconds of `90s`, `2m`, `1.5h`.

    Raises:
        ConfigError: It is no such time.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if not found or not float(found[1]):
        raise ConfigError(f"--budget {text}: must be a number above 0 with s, m or h, such as 90s, 2m or 1.5h")
    return float(found[1]) * _UNITS[found[2]]


def seeds(plan: Sequence[int], taken: Sequence[int] = ()) -> list[int]:
    """Return a plan's seeds and those that a long budget may add: the numbers that are not taken."""
    more = (n for n in range(10**6) if n not in plan and n not in taken)
    return [*plan, *(next(more) for _ in range(MOST_SEEDS - len(plan)))]


def fit(sweeps: list[Sweep], plan: int, seconds: float, cost: Cost) -> tuple[list[Sweep], str]:
    """Cut sweeps to what fits a budget.

    Args:
        sweeps: The sweeps of one call, expanded with all seeds that may be made, see `seeds`.
        plan: How many of these are the plan's own, those first.
        seconds: The budget.
        cost: Returns the seconds that runs which are not done yet will take, all workers at it.

    Returns:
        What is made of each sweep, and a sentence that says so.

    Raises:
        ConfigError: Not even the least fits.
    """
    kept: tuple[list[Sweep], int, int] | None = None
    for settings, count in _levels(sweeps, plan):
        cut = [_cut(sweep, settings, count, plan) for sweep in sweeps]
        needed = cost([run for sweep in cut for run in sweep.whole])
        if needed > seconds:
            if kept is None:
                raise ConfigError(
                    f"--budget of {seconds:g} s: the least of this plan, {count} seeds at one setting of each "
                    f"task, takes about {needed:.0f} s; give more"
                )
            break
        kept = cut, settings, count
    assert kept is not None
    found, settings, count = kept
    total = max(map(_settings, sweeps))
    return found, f"the budget holds {settings} of {total} settings, {count} seeds at the last of them"


def _levels(sweeps: list[Sweep], plan: int) -> Iterator[tuple[int, int]]:
    total = max(map(_settings, sweeps))
    for settings in range(1, total + 1):
        yield from ((settings, count) for count in range(min(2, plan), plan + 1))
    yield from ((total, count) for count in range(plan + 1, len(sweeps[0].seeds) + 1))


def _settings(sweep: Sweep) -> int:
    return len(_conditions(sweep))


def _conditions(sweep: Sweep) -> list[str]:
    return list(dict.fromkeys(r.condition for r in sweep.runs if r.fingerprint not in sweep.checks))


def _cut(sweep: Sweep, settings: int, count: int, plan: int) -> Sweep:
    """Keep the first settings, the last of them with `count` seeds and those before with the plan's at least."""
    conditions = _conditions(sweep)[:settings]
    last = conditions[-1] if settings <= len(conditions) else None

    def holds(run: RunConfig) -> bool:
        if run.fingerprint in sweep.checks or run.seed in sweep.choosing:
            return run.fingerprint in sweep.checks or run.condition in conditions
        allowed = sweep.seeds[: count if run.condition == last else max(count, plan)]
        return run.condition in conditions and run.seed in allowed

    measured = {key: kept for key, runs in sweep.measured.items() if (kept := [r for r in runs if holds(r)])}
    return sweep._replace(runs=[r for r in sweep.runs if holds(r)], measured=measured)
