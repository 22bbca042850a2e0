"""How sure a number is: intervals of means, paired differences, corrections, and seeds that lag.

Tasks and settings are fixed, since nobody drew them; seeds are the sample. With settings s of n_s
seeds each, weights w_s, means m_s and variances v_s,

    mean  sum_s w_s m_s        variance  V = sum_s w_s^2 v_s / n_s

and Student's t with Satterthwaite's degrees of freedom,

    df = V^2 / sum_s ( (w_s^2 v_s / n_s)^2 / (n_s - 1) )

which is the ordinary t interval where there is one setting. A setting of one seed has no variance,
so nothing that contains it has an interval. `python -m tests.coverage` measures what these cover.

Source: Satterthwaite 1946, Biometrics Bulletin 2, 110-114; Holm 1979, Scand. J. Stat. 6, 65-70.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
_LAG_RATIO, _LAG_POINTS = 3.0, 0.05


class Interval(NamedTuple):
    """A mean and its 95 % interval; `low` and `high` are None where a setting has one seed."""

    mean: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """The mean of paired differences, and two answers to whether it means something.

    Attributes:
        mean: First minus second, with its interval; the same seeds on both sides.
        p: Would other seeds say the same on these settings? Of the t test that the interval
            belongs to; None where a setting has one pair of seeds.
        settings: Settings that both have.
        seeds: Least number of pairs of seeds in a setting.
        wins: Settings whose own interval lies above zero.
        losses: Settings whose own interval lies below zero.
        p_settings: Do the settings agree? Of a two-sided sign test over wins and losses.
    """

    mean: Interval
    p: float | None
    settings: int
    seeds: int
    wins: int
    losses: int
    p_settings: float


def interval(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> Interval:
    """Return the mean over seeds at one setting with Student's interval, cut to [low, high].

    Args:
        values: One per seed; a single one has no interval.
        low: The least value there can be.
        high: The largest value there can be.
    """
    return weighted([values], [1.0], low, high)


def weighted(
    settings: Sequence[Sequence[float]], weights: Sequence[float], low: float = 0.0, high: float = 1.0
) -> Interval:
    """Return a weighted mean over settings with its interval.

    Args:
        settings: The values of each setting's seeds.
        weights: Of each setting.
        low: The least value there can be.
        high: The largest value there can be.
    """
    mean = math.fsum(w * _mean(v) for w, v in zip(weights, settings, strict=True))
    half = _half(settings, weights)
    if half is None:
        return Interval(mean, None, None)
    return Interval(mean, max(mean - half, low), min(mean + half, high))


def _half(settings: Sequence[Sequence[float]], weights: Sequence[float]) -> float | None:
    """Return half the width of an interval; None where a setting has one seed."""
    if not settings or min(map(len, settings)) < 2:
        return None
    parts = [w * w * variance(v) / len(v) for w, v in zip(weights, settings, strict=True)]
    total = math.fsum(parts)
    if total == 0:
        return 0.0
    below = math.fsum(p * p / (len(v) - 1) for p, v in zip(parts, settings, strict=True))
    return _t(total * total / below) * math.sqrt(total)


def _t(df: float) -> float:
    from scipy import special  # a second of import that `mad-efla --help` does without

    return float(special.stdtrit(df, (1 + CONFIDENCE) / 2))


def difference(
    first: Mapping[str, Mapping[int, float]], second: Mapping[str, Mapping[int, float]], weights: Mapping[str, float]
) -> Difference | None:
    """Compare two mixers on the settings and seeds that both have.

    Where every setting has the same pairs of seeds, the seed is the unit: the weighted mean over
    settings is taken for each seed, and Student's t over these. It holds also where one seed's runs
    share luck across settings. Elsewhere the variances of the settings' own differences add up.

    Args:
        first: By setting, the values by seed.
        second: The same of the other.
        weights: Of the settings; those that are compared are scaled to a sum of one.

    Returns:
        None where they share no seed of any setting.
    """
    pairs: dict[str, dict[int, float]] = {}
    for setting in first.keys() & second.keys():
        both = first[setting].keys() & second[setting].keys()
        if both:
            pairs[setting] = {s: first[setting][s] - second[setting][s] for s in sorted(both)}
    if not pairs:
        return None
    names = sorted(pairs)
    whole = math.fsum(weights[s] for s in names)
    shares = [weights[s] / whole for s in names]
    values = [list(pairs[s].values()) for s in names]
    if len({tuple(pairs[s]) for s in names}) == 1:
        blocks = [math.fsum(w * v for w, v in zip(shares, seed, strict=True)) for seed in zip(*values, strict=True)]
        found, p = weighted([blocks], [1.0], -1.0), _p([blocks], [1.0])
    else:
        found, p = weighted(values, shares, -1.0), _p(values, shares)
    own = [interval(v, -1.0) for v in values]
    wins = sum(i.low is not None and i.low > 0 for i in own)
    losses = sum(i.high is not None and i.high < 0 for i in own)
    least = min(map(len, values))
    return Difference(found, p, len(names), least, wins, losses, sign_test(wins, losses))


def _p(settings: Sequence[Sequence[float]], weights: Sequence[float]) -> float | None:
    """Return the two-sided p of a weighted mean of zero, of the test behind `weighted`."""
    from scipy import special

    if min(map(len, settings)) < 2:
        return None
    parts = [w * w * variance(v) / len(v) for w, v in zip(weights, settings, strict=True)]
    mean = math.fsum(w * _mean(v) for w, v in zip(weights, settings, strict=True))
    total = math.fsum(parts)
    if total == 0:
        return 1.0 if mean == 0 else 0.0
    below = math.fsum(p * p / (len(v) - 1) for p, v in zip(parts, settings, strict=True))
    return float(2 * special.stdtr(total * total / below, -abs(mean) / math.sqrt(total)))


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p of so many wins and losses if either were equally likely."""
    n, k = wins + losses, max(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number, by Holm's step-down; the order is kept."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def lagging(values: Sequence[float]) -> int:
    """Count the seeds that have not learned what the median seed has.

    Their error is over three times the median seed's, and over five points larger. Where there are
    any, no interval from a few seeds covers as it says: the sample is not one of a bell curve.

    Args:
        values: Accuracies, in [0, 1].
    """
    middle = sorted(values)[len(values) // 2]
    return sum(1 - v > _LAG_RATIO * (1 - middle) and middle - v > _LAG_POINTS for v in values)


def variance(values: Sequence[float]) -> float:
    """Return the unbiased variance; at least two values."""
    mean = _mean(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
