"""Retention: pairs, a long gap of one filler, then each key; answer its value.

    k1 v1 k2 v2 . . . . . . k2 k1        at each key behind the gap answer its value

The gap brings nothing that could disturb. Who fails here forgets by waiting: a decay that does not
stop costs what it keeps. One of three questions of long memory in the clothes of MQAR, beside
`filtering` and `overwrite`; for all three a longer sequence is a longer gap between the same pairs
and the same questions.

Letters: K = pairs; filler 0 (shown as a dot), keys [1, V/2), values [V/2, V), none twice in a
sequence. The last K tokens ask for the keys in a random order and are scored, in training as in
test.

Source: ours, after single-needle recall in a haystack of one repeated sentence (S-NIAH-1 of Hsieh
et al. 2024, arXiv 2404.06654), where Yang et al. 2024, arXiv 2412.06464, find that a delta
rule without decay keeps what one with decay loses.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, distinct, token_type


class Retention(Task):
    """Recall across a gap of nothing.

    Attributes:
        vocab_size: Token ids in all, the filler included.
        seq_len: Tokens the model sees, of which 3 pairs are no gap.
        pairs: Key-value pairs, each asked for once.
    """

    name: Literal["retention"] = "retention"
    vocab_size: int = Field(256, le=30_000)
    seq_len: int = Field(128, le=1_000_000)
    pairs: int = 8

    @model_validator(mode="after")
    def _check(self) -> "Retention":
        check_pairs(self.seq_len, self.pairs)
        if self.vocab_size < 2 * self.pairs + 2:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least 2 pairs + 2 = "
                f"{2 * self.pairs + 2}: no key or value comes twice; raise it or lower pairs"
            )
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.vocab_size

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` sequences; all splits are alike."""
        del split, world
        K, half = self.pairs, self.vocab_size // 2
        keys = distinct(rng, n, K, 1, half)
        values = distinct(rng, n, K, half, self.vocab_size)
        inputs = np.zeros((n, self.seq_len), token_type(self.vocab_size))
        inputs[:, : 2 * K : 2], inputs[:, 1 : 2 * K : 2] = keys, values
        return asked(inputs, keys, values, rng)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Look each key behind the gap up among the pairs."""
        del world
        return newest(inputs, self.seq_len - self.pairs)

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name keys, values and the filler."""
        half = self.vocab_size // 2
        return ["filler" if not t else "key" if t < half else "value" for t in inputs.tolist()]


# ------------------------------------------- what the three questions of long memory share


def check_pairs(seq_len: int, pairs: int) -> None:
    """Refuse no pairs, and a sequence too short to show and ask for each.

    Raises:
        ValueError: Opening with the field, as validators of a task do.
    """
    if pairs < 1:
        raise ValueError(f"pairs={pairs} must be at least 1")
    if seq_len < 3 * pairs:
        raise ValueError(
            f"seq_len={seq_len} must be at least 3 pairs = {3 * pairs}: each pair and its "
            "question; raise it or lower pairs"
        )


def asked(
    inputs: Int[np.ndarray, "n L"],
    keys: Int[np.ndarray, "n K"],
    values: Int[np.ndarray, "n K"],
    rng: np.random.Generator,
) -> Examples:
    """Write the questions, the keys in a random order, over the end of each sequence.

    Args:
        inputs: The sequences; changed in place.
        keys: Asked for, each once.
        values: The answer to each key.
        rng: Draws the order.
    """
    K, order = keys.shape[1], rng.random(keys.shape).argsort(axis=1)
    targets = np.full_like(inputs, IGNORE)
    inputs[:, -K:] = np.take_along_axis(keys, order, axis=1)
    targets[:, -K:] = np.take_along_axis(values, order, axis=1)
    return Examples(inputs, targets)


def newest(inputs: Int[np.ndarray, "L"], questions: int) -> Int[np.ndarray, "L"]:
    """Answer the tokens from `questions` on with the last value that stood behind them."""
    answers = np.full(len(inputs), IGNORE)
    tokens = inputs.tolist()
    shown = tokens[:questions]
    value_of = dict(zip(shown[::2], shown[1::2], strict=False))
    for position, token in enumerate(tokens[questions:], start=questions):
        answers[position] = value_of.get(token, IGNORE)
    return answers
