"""Digits: the handwritten digits that come with scikit-learn, 8 x 8 pixels, read one by one.

1,797 images of 17 levels of grey, about 180 of each class, the test part of Optdigits. A fixed
permutation makes 397 of them the test part here, and leaves 1,400 to learn from. It goes by image:
the files do not say who wrote what, so a test image may be by a hand that was trained on, and
accuracies are those for known hands.

Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI repository.
"""

import functools
from typing import Literal

import numpy as np

from mad_efla.tasks import Corpus
from mad_efla.tasks._pixels import Pixels, sequences

_TEST = 397
_WHITE = 16


class Digits(Pixels):
    """Handwritten digits of 64 pixels, which come with an installed package."""

    name: Literal["digits"] = "digits"

    @property
    def input_length(self) -> int:
        """Pixels of an image."""
        return 64

    def corpus(self) -> Corpus:
        """Return the images, 1,400 to learn from and 397 to test on."""
        return _corpus()


@functools.cache
def _corpus() -> Corpus:
    from sklearn.datasets import load_digits  # a second, which no other task should pay

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.Generator(np.random.Philox(0)).permutation(len(images))
    every = sequences(images[order].reshape(-1, 8, 8), _WHITE, labels[order])
    return Corpus(train=every.rows(slice(_TEST, None)), test=every.rows(slice(_TEST)))
