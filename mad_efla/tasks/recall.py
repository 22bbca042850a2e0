"""In-context recall: a sequence of key-value pairs; answer a key that was seen with its value.

    k1 v1 k2 v2 k1 v1 ... k2 -> v2

Within a sequence a key always has the same value; between sequences the pairing is drawn anew, so
nothing but the context can be learned. The last key is one of those seen, uniformly.

Letters: n ordinary tokens, keys [0, n/2), values [n/2, n); K keys; P pair slots = seq_len / 2.
Multi-query scores every key seen before; single-query only the last, marked by the copy token
V - 1 before it.

Source: Poli et al. 2024, arXiv 2403.17844, section 4 and appendix B. Departure: streams come from
(seed, split) alone, so the result does not depend on the number of workers.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, token_type


class Recall(Task):
    """In-context recall.

    Attributes:
        vocab_size: Token ids in all, the copy token of single-query included.
        seq_len: Tokens of the pairs; with multi-query the model sees one less, the last value
            being only a target.
        multi_query: Score every key seen before, not only the last.
    """

    name: Literal["recall"] = "recall"
    vocab_size: int = Field(16, le=30_000)
    seq_len: int = Field(128, le=1_000_000)
    multi_query: bool = True

    @model_validator(mode="after")
    def _check(self) -> "Recall":
        if self.seq_len % 2:
            raise ValueError(
                f"seq_len={self.seq_len} must be even: keys and values alternate; "
                f"use {self.seq_len - 1} or {self.seq_len + 1}"
            )
        if self.seq_len < 4:
            raise ValueError(f"seq_len={self.seq_len} must be at least 4: a pair and its query")
        least = 4 if self.multi_query else 5
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least {least}: two keys, two values"
                + ("" if self.multi_query else " and the copy token")
            )
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.vocab_size

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len - 1 if self.multi_query else self.seq_len

    @property
    def _ordinary(self) -> int:
        return self.vocab_size if self.multi_query else self.vocab_size - 1

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` sequences; all splits are alike."""
        del split, world
        K, P = self._ordinary // 2, self.seq_len // 2
        dtype = token_type(self.vocab_size)
        rows = np.arange(n)[:, None]

        keys = np.empty((n, P), np.int64)
        keys[:, :-1] = rng.integers(0, K, (n, P - 1))
        value_of = rng.integers(K, self._ordinary, (n, K))

        first = np.full((n, K), P)  # the slot in which a key first occurs
        np.minimum.at(first, (rows, keys[:, :-1]), np.arange(P - 1))
        keys[:, -1] = np.where(first < P, rng.random((n, K)), -1.0).argmax(axis=1)

        pairs = np.stack([keys, value_of[rows, keys]], axis=2).reshape(n, 2 * P).astype(dtype)
        if not self.multi_query:
            copy = np.full((n, 1), self.vocab_size - 1, dtype)
            pairs = np.concatenate([pairs[:, :-2], copy, pairs[:, -2:]], axis=1)
        inputs, next_tokens = pairs[:, :-1].copy(), pairs[:, 1:].copy()

        targets = np.full_like(inputs, IGNORE)
        if self.multi_query:
            seen = np.arange(P) > first[rows, keys]
            targets[:, ::2] = np.where(seen, next_tokens[:, ::2], IGNORE)
        else:
            targets[:, -1] = next_tokens[:, -1]
        return Examples(inputs, targets, next_tokens)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Look each key up among the pairs before it."""
        del world
        answers = np.full(len(inputs), IGNORE)
        value_of: dict[int, int] = {}
        key: int | None = None
        for position, token in enumerate(inputs.tolist()):
            if token >= self._ordinary:  # the copy token says nothing by itself
                continue
            if key is None:
                key = token
                answers[position] = value_of.get(token, IGNORE)
            else:
                value_of[key], key = token, None
        return answers

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name keys, values and the copy token."""
        K = self._ordinary // 2
        return [
            "copy" if t >= self._ordinary else "key" if t < K else "value" for t in inputs.tolist()
        ]
