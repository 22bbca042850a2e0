"""How often intervals contain the truth and tests reject what is true: `python -m tests.coverage`.

The truth is the mean over settings of the mean over all seeds there could be. Draws are normal, with
a standard deviation of 5 points, or resampled from ten real seeds each: EFLA and DeltaNet at recall's
hard setting (V 128, L 128, 250 steps, learning rate 5e-3). DeltaNet's has a long lower tail: one seed
in ten has not learned. In `mixed` every second setting is solved and the others are DeltaNet's.
"""

import numpy as np

from mad_efla.analysis import statistics

SAMPLES = {
    "efla": (0.8951, 0.9058, 0.9195, 0.9266, 0.9267, 0.9374, 0.9390, 0.9407, 0.9491, 0.9522),
    "deltanet": (0.6416, 0.7543, 0.8513, 0.8930, 0.8960, 0.9021, 0.9137, 0.9231, 0.9299, 0.9438),
}
SEEDS = (2, 3, 5, 10)
SETTINGS = (1, 2, 11, 66)
SD = 0.05


def draw(kind: str, rng: np.random.Generator, settings: int, seeds: int) -> np.ndarray:
    """Draw values, settings by seeds."""
    if kind == "normal":
        return rng.normal(0.5, SD, (settings, seeds))
    if kind == "mixed":
        found = rng.choice(SAMPLES["deltanet"], (settings, seeds))
        found[1::2] = 0.999
        return found
    return rng.choice(SAMPLES[kind], (settings, seeds))


def truth(kind: str, settings: int) -> float:
    """Return the mean that the draws have in the long run."""
    if kind == "normal":
        return 0.5
    if kind == "mixed":
        solved = settings // 2
        return (0.999 * solved + (settings - solved) * np.mean(SAMPLES["deltanet"])) / settings
    return float(np.mean(SAMPLES[kind]))


def coverage(kind: str, settings: int, seeds: int, draws: int, seed: int = 0) -> float:
    """Return the share of 95 % intervals that contain the truth."""
    rng, true = np.random.default_rng([seed, settings, seeds]), truth(kind, settings)
    hits = 0
    for _ in range(draws):
        values = draw(kind, rng, settings, seeds).tolist()
        found = statistics.weighted(values, [1 / settings] * settings)
        hits += found.low <= true <= found.high
    return hits / draws


def type_one(settings: int, seeds: int, draws: int, spread: float = 0.1, seed: int = 0) -> float:
    """Return the share of comparisons with p < .05 of two mixers that are equal on average.

    Args:
        settings: Of the plan.
        seeds: Of each mixer at each setting.
        draws: Comparisons.
        spread: Standard deviation, between settings, of what one mixer has before the other; over
            all settings it sums to zero.
        seed: Of the draws.
    """
    rng, rejected = np.random.default_rng([seed, settings, seeds, 1]), 0
    for _ in range(draws):
        ahead = rng.normal(0, spread, (settings, 1))
        ahead -= ahead.mean()
        a, b = (rng.normal(0.5, SD, (settings, seeds)) for _ in "ab")
        first, second = ({str(s): dict(enumerate(row)) for s, row in enumerate(x.tolist())} for x in (a + ahead, b))
        found = statistics.difference(first, second, dict.fromkeys(first, 1.0))
        rejected += found.p < 0.05
    return rejected / draws


def main(draws: int = 4_000) -> None:
    """Print coverage and type I error."""
    print("draws | settings | " + " | ".join(f"{n} seeds" for n in SEEDS))
    print("--- | --- | " + " | ".join("---" for _ in SEEDS))
    for kind in ("normal", "efla", "deltanet", "mixed"):
        for settings in SETTINGS:
            row = [coverage(kind, settings, n, draws) for n in SEEDS]
            print(f"{kind} | {settings} | " + " | ".join(f"{100 * c:.1f}" for c in row), flush=True)
    for settings in SETTINGS:
        row = [type_one(settings, n, draws) for n in SEEDS]
        print(f"type I | {settings} | " + " | ".join(f"{100 * c:.1f}" for c in row), flush=True)


if __name__ == "__main__":
    main()
