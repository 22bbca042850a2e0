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

from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
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
        check_length(self.seq_len)
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
        pairs = draw_pairs(n, rng, slots=self.seq_len // 2, ordinary=self._ordinary)
        return examples_of(pairs, self.vocab_size, self.multi_query)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Look each key up among the pairs before it."""
        del world
        return look_up(inputs, self._ordinary)

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name keys, values and the copy token."""
        K = self._ordinary // 2
        return ["copy" if t >= self._ordinary else "key" if t < K else "value" for t in inputs.tolist()]


# ------------------------------------------- what tasks of single-token pairs share


class Pairs(NamedTuple):
    """Key-value pairs, slot by slot.

    Attributes:
        tokens: Key and value of each slot.
        seen: Whether the slot's key stood in an earlier slot.
    """

    tokens: Int[np.ndarray, "n P 2"]
    seen: Bool[np.ndarray, "n P"]


def check_length(seq_len: int) -> None:
    """Refuse a length that is no pairs, or too few.

    Raises:
        ValueError: Opening with the field, as validators of a task do.
    """
    if seq_len % 2:
        raise ValueError(
            f"seq_len={seq_len} must be even: keys and values alternate; use {seq_len - 1} or {seq_len + 1}"
        )
    if seq_len < 4:
        raise ValueError(f"seq_len={seq_len} must be at least 4: a pair and its query")


def draw_pairs(
    n: int, rng: np.random.Generator, *, slots: int, ordinary: int, noise: Bool[np.ndarray, "n earlier"] | None = None
) -> Pairs:
    """Draw keys, a value for each kind of key, and in the last slot a key seen before.

    Args:
        n: Sequences.
        rng: The only source of randomness.
        slots: Pairs per sequence, P.
        ordinary: Ids that keys and values share, half each.
        noise: Which slots, of all but the last, show no pair; what is drawn there is for the
            caller to write over.
    """
    K, P = ordinary // 2, slots
    rows = np.arange(n)[:, None]
    keys = np.empty((n, P), np.int64)
    keys[:, :-1] = rng.integers(0, K, (n, P - 1))
    value_of = rng.integers(K, ordinary, (n, K))

    first = np.full((n, K), P)  # the slot in which a key first occurs
    shown = np.arange(P - 1) if noise is None else np.where(noise, P, np.arange(P - 1))
    np.minimum.at(first, (rows, keys[:, :-1]), shown)
    keys[:, -1] = np.where(first < P, rng.random((n, K)), -1.0).argmax(axis=1)

    seen = np.arange(P) > first[rows, keys]
    if noise is not None:
        seen[:, :-1] &= ~noise
    return Pairs(np.stack([keys, value_of[rows, keys]], axis=2), seen)


def examples_of(pairs: Pairs, vocab_size: int, multi_query: bool) -> Examples:
    """Write pairs as sequences, shifted by one, with the answers that are scored.

    Args:
        pairs: Keys and values, as `draw_pairs` returns them.
        vocab_size: Token ids in all; the last is the copy token of single-query.
        multi_query: Score every key seen before, not only the last.
    """
    n, P, _ = pairs.tokens.shape
    dtype = token_type(vocab_size)
    tokens = pairs.tokens.reshape(n, 2 * P).astype(dtype)
    if not multi_query:
        copy = np.full((n, 1), vocab_size - 1, dtype)
        tokens = np.concatenate([tokens[:, :-2], copy, tokens[:, -2:]], axis=1)
    inputs, next_tokens = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    targets = np.full_like(inputs, IGNORE)
    if multi_query:
        targets[:, ::2] = np.where(pairs.seen, next_tokens[:, ::2], IGNORE)
    else:
        targets[:, -1] = next_tokens[:, -1]
    return Examples(inputs, targets, next_tokens)


def look_up(inputs: Int[np.ndarray, "L"], ordinary: int) -> Int[np.ndarray, "L"]:
    """Answer each key with its value in an earlier pair; ids from `ordinary` on say nothing."""
    answers = np.full(len(inputs), IGNORE)
    value_of: dict[int, int] = {}
    key: int | None = None
    for position, token in enumerate(inputs.tolist()):
        if token >= ordinary:
            continue
        if key is None:
            key = token
            answers[position] = value_of.get(token, IGNORE)
        else:
            value_of[key], key = token, None
    return answers
