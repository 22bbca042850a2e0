"""Memorization: keys and blanks to fill in; the values are never shown, only trained on.

    k1 I k2 I k1 I        at each I answer the value of the key before it

One table of facts, drawn from the seed, holds in all sequences of all splits; nothing in a sequence
gives it away. Test sequences are new, their facts are those of training.

Letters: insert token I = V - 1; n = V - 1 ordinary ids, keys [0, n/2), values [n/2, n), no value
belonging to two keys. Every I is scored, in training as in test.

Source: Poli et al. 2024, arXiv 2403.17844, section 4 and appendix B. No departure. With 256
training sequences of 16 keys, not every key of a large vocabulary occurs in training; `answerable`
says which test positions ask for one that does.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, token_type


class Memorization(Task):
    """A table of facts to be learned by heart.

    Attributes:
        vocab_size: Token ids in all: keys, values and the insert token.
        seq_len: Tokens the model sees, every second one the insert token.
    """

    name: Literal["memorization"] = "memorization"
    vocab_size: int = Field(256, le=30_000)
    seq_len: int = Field(32, le=1_000_000)

    @model_validator(mode="after")
    def _check(self) -> "Memorization":
        if self.vocab_size < 5:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least 5: two keys, two values and the insert token"
            )
        if self.seq_len % 2:
            raise ValueError(
                f"seq_len={self.seq_len} must be even: an insert token follows each key; "
                f"use {self.seq_len - 1} or {self.seq_len + 1}"
            )
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2: a key and its insert")
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.vocab_size

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len

    def world(self, rng: np.random.Generator) -> Int[np.ndarray, "K"]:
        """Draw the value of each key."""
        n = self.vocab_size - 1
        return n // 2 + rng.permutation(n - n // 2)[: n // 2]

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` sequences; all splits are alike and share the table."""
        del split
        keys = rng.integers(0, len(world), (n, self.seq_len // 2))
        inputs = np.full((n, self.seq_len), self.vocab_size - 1, token_type(self.vocab_size))
        inputs[:, ::2] = keys
        targets = np.full_like(inputs, IGNORE)
        targets[:, 1::2] = world[keys]
        return Examples(inputs, targets)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Look each key up in the table."""
        answers = np.full(len(inputs), IGNORE)
        keys = inputs[: len(inputs) // 2 * 2 : 2]
        answers[1::2] = world[keys]
        return answers

    def answerable(self, examples: Examples, train: Examples, world: Any) -> Bool[np.ndarray, "n L"]:
        """Tell which positions ask for a key that training has shown."""
        shown = np.zeros(len(world), bool)
        shown[train.inputs[:, ::2]] = True
        mask = np.zeros(examples.inputs.shape, bool)
        mask[:, 1::2] = shown[examples.inputs[:, ::2]]
        return mask

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name keys and insert tokens."""
        return ["insert" if t == self.vocab_size - 1 else "key" for t in inputs.tolist()]
