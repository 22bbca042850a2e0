"""Filtering: pairs, pairs that are never asked for, then the first keys; answer with their values.

    k1 v1 k2 v2  n1 v3 n2 v4 n1 v5 ...  k2 k1        at k2, k1 behind the gap answer v2, v1

Keys that are never asked for are told by their ids, their values are those that answers come from.
Who writes everything down fills a state of fixed size with what nobody wants; who learns to write
selectively is disturbed by none of it, however long the gap.

Letters: K = pairs; filler 0, keys that are asked for [1, V/4), keys that are not [V/4, V/2), values
[V/2, V). The K keys are different and so are their values; the others are drawn with replacement.
The last K tokens ask for the keys in a random order and are scored, in training as in test. Where
room for half a pair is left, a filler stands before them.

Source: ours, after single-needle recall in a haystack of real text (S-NIAH-2 of Hsieh et al. 2024,
arXiv 2404.06654), where Yang et al. 2024, arXiv 2412.06464, find that a delta rule with
decay keeps what one without loses. `retention` holds the rest alike.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import Examples, Split, Task, distinct, token_type
from mad_efla.tasks.retention import asked, check_pairs, newest


class Filtering(Task):
    """Recall across pairs that are never asked for.

    Attributes:
        vocab_size: Token ids in all, the filler included.
        seq_len: Tokens the model sees, of which 3 pairs are no gap.
        pairs: Key-value pairs that are asked for, each once.
    """

    name: Literal["filtering"] = "filtering"
    vocab_size: int = Field(256, le=30_000)
    seq_len: int = Field(128, le=1_000_000)
    pairs: int = 8

    @model_validator(mode="after")
    def _check(self) -> "Filtering":
        check_pairs(self.seq_len, self.pairs)
        if self.vocab_size < 4 * self.pairs + 4:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least 4 pairs + 4 = "
                f"{4 * self.pairs + 4}: a quarter of it are keys that are asked for, and none "
                "comes twice; raise it or lower pairs"
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
        K, quarter, half = self.pairs, self.vocab_size // 4, self.vocab_size // 2
        keys = distinct(rng, n, K, 1, quarter)
        values = distinct(rng, n, K, half, self.vocab_size)
        inputs = np.zeros((n, self.seq_len), token_type(self.vocab_size))
        inputs[:, : 2 * K : 2], inputs[:, 1 : 2 * K : 2] = keys, values
        gap = inputs[:, 2 * K : self.seq_len - K]
        gap = gap[:, : gap.shape[1] // 2 * 2]
        gap[:, ::2] = rng.integers(quarter, half, gap[:, ::2].shape)
        gap[:, 1::2] = rng.integers(half, self.vocab_size, gap[:, 1::2].shape)
        return asked(inputs, keys, values, rng)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Look each key behind the gap up among the pairs."""
        del world
        return newest(inputs, self.seq_len - self.pairs)

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name keys and values that count, and those of pairs that do not."""
        K, quarter, half = self.pairs, self.vocab_size // 4, self.vocab_size // 2
        return [
            "filler" if not t else "key" if t < quarter else "noise" if t < half or i >= 2 * K else "value"
            for i, t in enumerate(inputs.tolist())
        ]
