"""Sequential MNIST: 28 x 28 pixels read one by one, the class asked for at the last.

The files are read from `$MAD_EFLA_DATA/<dataset>/`, or what `--data-dir` names instead, compressed
or not; nothing is ever downloaded:

    train-images-idx3-ubyte  train-labels-idx1-ubyte  t10k-images-idx3-ubyte  t10k-labels-idx1-ubyte

`dataset: mnist` means the published 60,000 + 10,000 images, held to their size and checksum. Any
other name means any four files of the format in a folder of that name, such as `fashion_mnist`.

Source: LeCun et al. 1998, Gradient-based learning applied to document recognition; as a sequence
of pixels: Le et al. 2015, arXiv 1504.00941, section 4.2.
"""

import functools
import os
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from mad_efla.config import ConfigError
from mad_efla.tasks import Corpus, Examples, _idx
from mad_efla.tasks._idx import Published
from mad_efla.tasks._pixels import CLASSES, Pixels, sequences

DATA = "MAD_EFLA_DATA"
"""Environment variable with the folder of data sets."""

FILES = {
    "train-images-idx3-ubyte": Published(47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": Published(60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": Published(7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": Published(10_008, "27ae3e4e09519cfbb04c329615203637"),
}


class SMNIST(Pixels):
    """MNIST, or another data set in its format, pixel by pixel.

    Attributes:
        dataset: The folder its files stand in; `mnist` takes the published files alone.
        side: Pixels across an image.
    """

    name: Literal["smnist"] = "smnist"
    dataset: str = Field("mnist", pattern=r"^[\w.-]+$")
    side: int = Field(28, ge=2, le=1_000)

    @property
    def input_length(self) -> int:
        """Pixels of an image."""
        return self.side**2

    def corpus(self) -> Corpus:
        """Return the images of the files, training and test part as published."""
        where = os.environ.get(DATA)
        if not where:
            raise ConfigError(
                f"task {self.name}: needs the files of {self.dataset!r}; name the folder that "
                f"holds {self.dataset}/ with --data-dir or {DATA}. They are never downloaded; "
                "the task digits needs none"
            )
        return _corpus(Path(where) / self.dataset, self.dataset == "mnist", self.side)


@functools.lru_cache(maxsize=1)
def _corpus(folder: Path, published: bool, side: int) -> Corpus:
    found = {name: _idx.find(folder, name) for name in FILES}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise ConfigError(f"{folder}: lacks {', '.join(missing)}; put them there, as they are or with .gz")
    files = [
        _idx.read(path, 1 if "labels" in name else 3, FILES[name] if published else None)
        for name, path in found.items()
        if path is not None
    ]
    images, labels, test_images, test_labels = files
    return Corpus(train=_part(folder, images, labels, side), test=_part(folder, test_images, test_labels, side))


def _part(
    folder: Path, images: UInt8[np.ndarray, "n rows columns"], labels: UInt8[np.ndarray, "m"], side: int
) -> Examples:
    if images.shape[1:] != (side, side):
        size = " x ".join(map(str, images.shape[1:]))
        raise ConfigError(f"{folder}: images are {size}, must be {side} x {side}; set task.side")
    if len(images) != len(labels) or not len(images):
        raise ConfigError(f"{folder}: {len(labels)} labels for {len(images)} images; take all files from one data set")
    if labels.max() >= CLASSES:
        raise ConfigError(f"{folder}: label {labels.max()} must be under {CLASSES}")
    return sequences(images, 255, labels.astype(np.int64))
