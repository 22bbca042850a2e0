"""Corruptions of pixel sequences: exact functions of images, a severity, and a random stream.

    dropout     x_i = 0 with probability s                       s in [0, 1], no rescaling
    intensity   x = s x                                          s > 0, not cut off
    noise       x = x + s n,  n standard normal                  s >= 0, not cut off
    inversion   x = (1 - s) x + s (1 - x)                        s in [0, 1]; 1 is the negative
    shift       the image moves s pixels to one of four sides    s whole; what is left is 0
    burst       a run of s L pixels in reading order is 1        s in [0, 1]

What is drawn depends on the stream alone, not on the severity: with equal streams the pixels
dropped at 0.2 are among those dropped at 0.3, and noise keeps its pattern and grows.

Source: the first three, Lei, Zhang, Poria, arXiv 2512.12602, experiment on sequential MNIST. The
others are ours: a change of polarity, of place, and a fault of a sensor.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Images = Float[np.ndarray, "n side side"]


def dropout(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """Set pixels to 0, each with probability `severity`.

    Args:
        images: In [0, 1].
        severity: In [0, 1].
        rng: Draws which.
    """
    return np.where(rng.random(images.shape) < severity, 0, images)


def intensity(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """Multiply all pixels by `severity`.

    Args:
        images: In [0, 1].
        severity: Above 0; what leaves [0, 1] is not cut off.
        rng: Not drawn from.
    """
    del rng
    return severity * images


def noise(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """Add Gaussian noise of standard deviation `severity`.

    Args:
        images: In [0, 1].
        severity: At least 0; what leaves [0, 1] is not cut off.
        rng: Draws the noise.
    """
    return images + severity * rng.standard_normal(images.shape)


def inversion(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """Mix images with their negatives.

    Args:
        images: In [0, 1].
        severity: Share of the negative, in [0, 1].
        rng: Not drawn from.
    """
    del rng
    return (1 - severity) * images + severity * (1 - images)


def shift(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """Move each image by `severity` pixels to the left, right, top or bottom, drawn per image.

    Args:
        images: In [0, 1].
        severity: Pixels, rounded to a whole number; at most the side.
        rng: Draws the directions.
    """
    n, side = len(images), images.shape[1]
    steps = min(round(severity), side)
    wide = np.pad(images, ((0, 0), (steps, steps), (steps, steps)))
    to = np.array([(0, -1), (0, 1), (-1, 0), (1, 0)])[rng.integers(0, 4, n)] * steps
    rows = steps - to[:, 0, None] + np.arange(side)
    columns = steps - to[:, 1, None] + np.arange(side)
    return wide[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def burst(images: Images, severity: float, rng: np.random.Generator) -> Images:
    """Saturate a run of pixels, as long as the share `severity` of an image, drawn per image.

    Args:
        images: In [0, 1].
        severity: In [0, 1].
        rng: Draws where each run begins.
    """
    n, length = len(images), images[0].size
    run = round(severity * length)
    first = np.floor(rng.random(n) * (length - run + 1))[:, None]
    place = np.arange(length)
    hit = (place >= first) & (place < first + run)
    return np.where(hit.reshape(images.shape), 1, images)


CORRUPTIONS: dict[str, Callable[[Images, float, np.random.Generator], Images]] = {
    f.__name__: f for f in (dropout, intensity, noise, inversion, shift, burst)
}

UPPER = {"dropout": 1.0, "inversion": 1.0, "burst": 1.0}
"""Largest severity where there is one."""
NEUTRAL = {"intensity": 1.0}
"""Severity that changes nothing, where it is not 0."""


def corrupt(
    name: str, inputs: Float[np.ndarray, "n L"], severity: float, rng: np.random.Generator
) -> Float[np.ndarray, "n L"]:
    """Corrupt square images that are given as sequences, in float64, rounded once to their type.

    Args:
        name: One of `CORRUPTIONS`.
        inputs: Images in [0, 1], row after row.
        severity: In the range that the corruption has, see above.
        rng: The only source of randomness; equal streams give nested corruptions.
    """
    side = round(inputs.shape[1] ** 0.5)
    images = inputs.reshape(-1, side, side).astype(np.float64)
    changed = CORRUPTIONS[name](images, severity, rng)
    return changed.reshape(inputs.shape).astype(inputs.dtype)
