"""What the tasks of pixel sequences share: one class per image, corrupted images as probes.

    x_1 x_2 ... x_L  ->  - - ... class        x_i in [0, 1], rows of the image one after the other

Only the last position is scored, so a mixer has to carry the image there.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Int, Num
from pydantic import field_validator

from mad_efla.config import suggest
from mad_efla.tasks import IGNORE, Examples, Probe, RealTask, token_type
from mad_efla.tasks._corruptions import CORRUPTIONS, NEUTRAL, UPPER, corrupt

CLASSES = 10

_TENTHS = tuple(i / 10 for i in range(11))
# The first three as published.
GRIDS: dict[str, tuple[float, ...]] = {
    "dropout": _TENTHS,
    "intensity": tuple(map(float, range(1, 11))),
    "noise": _TENTHS,
    "inversion": (0.0, 0.25, 0.5, 0.75, 1.0),
    "shift": (0.0, 1.0, 2.0, 3.0),
    "burst": _TENTHS[:6],
}


class Pixels(RealTask):
    """A task of pixel sequences.

    Attributes:
        body: What stands around the mixers: the `stack` of residual layers and norms that all
            tasks have, or the `bare` body of the EFLA authors' experiment; see `training.model`.
        corruptions: Severities by corruption, see `_corruptions.py`; the trained model is
            scored on the test split under each of them, and under none.
    """

    body: Literal["stack", "bare"] = "stack"
    corruptions: dict[str, tuple[float, ...]] = GRIDS

    @field_validator("corruptions")
    @classmethod
    def _known(cls, corruptions: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        for name, severities in corruptions.items():
            if name not in CORRUPTIONS:
                raise ValueError(f"{name}: unknown{suggest(name, list(CORRUPTIONS))}")
            most = UPPER.get(name, np.inf)
            if not severities or list(severities) != sorted(set(severities)):
                raise ValueError(f"{name}={list(severities)} must rise, and name one at least")
            if severities[0] < 0 or severities[-1] > most:
                raise ValueError(f"{name}={list(severities)} must lie in [0, {most:g}]")
        return corruptions

    @property
    def backbone(self) -> str:  # type: ignore[override]
        """The model asked for."""
        return {"stack": "classifier", "bare": "bare_classifier"}[self.body]

    @property
    def vocabulary(self) -> int:
        """Number of classes."""
        return CLASSES

    def probes(self, test: Examples, stream: Callable[[str], np.random.Generator]) -> Iterator[Probe]:
        """Yield the test split under each corruption, severities rising, the neutral one too."""
        for name, severities in self.corruptions.items():
            for severity in sorted({NEUTRAL.get(name, 0.0), *severities}):
                changed = corrupt(name, test.inputs, severity, stream(name))
                yield Probe(name, severity, test._replace(inputs=changed))

    def describe(self, inputs: Num[np.ndarray, "L"]) -> list[str]:
        """Name pixels."""
        return ["pixel"] * len(inputs)


def sequences(images: Num[np.ndarray, "n rows columns"], white: int, labels: Int[np.ndarray, "n"]) -> Examples:
    """Write images as sequences in [0, 1] with the class at the last position.

    Args:
        images: Levels of grey, in [0, white].
        white: The largest level.
        labels: The class of each image.
    """
    inputs = images.reshape(len(images), -1).astype(np.float32) / np.float32(white)
    targets = np.full(inputs.shape, IGNORE, token_type(CLASSES))
    targets[:, -1] = labels
    return Examples(inputs, targets)
