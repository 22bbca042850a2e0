"""Overwrite: pairs whose keys come again with other values, then each key; answer its newest value.

    k1 v1 k2 v2  k1 v3 k2 v4 k1 v5 ...  k2 k1        at k2, k1 behind the pairs answer v4, v5

What was written first must go when the second comes. A state that only adds keeps the sum of all
values of a key; the delta rule takes the old one out.

Letters: K = pairs; filler 0, keys [1, V/2), values [V/2, V). First each of K different keys is
shown once; then, up to the questions, pairs whose key is any of them and whose value is any. The
last K tokens ask for the keys in a random order and are scored, in training as in test. Where room
for half a pair is left, a filler stands before them.

Source: ours, after the forgetting MQAR of zoology's code (forgetting_mqar.py), where some of the
keys get a second value, once. `retention` and `filtering` hold the rest alike.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import Examples, Split, Task, distinct, token_type
from mad_efla.tasks.retention import asked, check_pairs, newest


class Overwrite(Task):
    """Recall of what was written last.

    Attributes:
        vocab_size: Token ids in all, the filler included.
        seq_len: Tokens the model sees, of which 3 pairs show each key first and ask for it.
        pairs: Keys, each asked for once.
    """

    name: Literal["overwrite"] = "overwrite"
    vocab_size: int = Field(256, le=30_000)
    seq_len: int = Field(128, le=1_000_000)
    pairs: int = 8

    @model_validator(mode="after")
    def _check(self) -> "Overwrite":
        check_pairs(self.seq_len, self.pairs)
        if self.vocab_size < 2 * self.pairs + 2:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least 2 pairs + 2 = "
                f"{2 * self.pairs + 2}: half of it are keys, and none is shown for two; raise it "
                "or lower pairs"
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
        K, half, rows = self.pairs, self.vocab_size // 2, np.arange(n)[:, None]
        keys = distinct(rng, n, K, 1, half)
        writes = (self.seq_len - K) // 2
        which = rng.integers(0, K, (n, writes))
        which[:, :K] = np.arange(K)
        values = rng.integers(half, self.vocab_size, (n, writes))
        last = np.zeros((n, K), np.int64)
        np.maximum.at(last, (rows, which), np.arange(writes))

        inputs = np.zeros((n, self.seq_len), token_type(self.vocab_size))
        inputs[:, : 2 * writes : 2] = np.take_along_axis(keys, which, axis=1)
        inputs[:, 1 : 2 * writes : 2] = values
        return asked(inputs, keys, np.take_along_axis(values, last, axis=1), rng)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Look each key behind the pairs up, from the last pair back."""
        del world
        return newest(inputs, self.seq_len - self.pairs)

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name keys and values, and the filler."""
        half = self.vocab_size // 2
        return ["filler" if not t else "key" if t < half else "value" for t in inputs.tolist()]
