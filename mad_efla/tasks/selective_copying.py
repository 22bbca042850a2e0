"""Selective copying: tokens among blanks; after the copy token, say them again in order.

    _ t1 _ _ t2 t3 _ C _ _ _        at the blanks behind C answer t1 t2 t3

How many blanks stand before, between and behind the tokens changes from sequence to sequence, so
that the distance between a token and its answer cannot be learned.

Letters: n = tokens_to_copy; tokens [0, V - 2), blank V - 2, copy C = V - 1. The last n positions
are scored, in training as in test; the model is fed blanks there, not its answers.

Source: Poli et al. 2024, arXiv 2403.17844, section 4 and appendix B. Each blank falls into one of
the n + 1 places around the tokens, uniformly. Departure: the reference code never puts one behind
the last token, which so always stands right before C and is a free answer; `as_mad_lab` keeps that.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, token_type


class SelectiveCopying(Task):
    """Copying of tokens that stand among blanks.

    Attributes:
        vocab_size: Token ids in all, blank and copy token included.
        seq_len: Tokens the model sees.
        tokens_to_copy: Tokens to say again, drawn with replacement.
        as_mad_lab: Put no blank behind the last token, as the reference code does.
    """

    name: Literal["selective_copying"] = "selective_copying"
    vocab_size: int = Field(16, le=30_000)
    seq_len: int = Field(256, le=1_000_000)
    tokens_to_copy: int = 16
    as_mad_lab: bool = False

    @model_validator(mode="after")
    def _check(self) -> "SelectiveCopying":
        if self.vocab_size < 4:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least 4: two tokens, the blank and the copy token"
            )
        if self.tokens_to_copy < 1:
            raise ValueError(f"tokens_to_copy={self.tokens_to_copy} must be at least 1")
        if self.seq_len <= 2 * self.tokens_to_copy + 1:
            raise ValueError(
                f"seq_len={self.seq_len} must be more than 2 tokens_to_copy + 1 = "
                f"{2 * self.tokens_to_copy + 1}: the tokens, a blank, the copy token, the answers; "
                f"use at least {2 * self.tokens_to_copy + 2}, or copy fewer tokens"
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
        count = self.tokens_to_copy
        blanks, places = self.seq_len - 2 * count - 1, count + (not self.as_mad_lab)
        rows = np.arange(n)[:, None]
        dtype = token_type(self.vocab_size)

        tokens = rng.integers(0, self.vocab_size - 2, (n, count), dtype=dtype)
        place = rng.integers(0, places, (n, blanks), dtype=np.int32)  # of each blank
        before = np.bincount((place + places * rows).ravel(), minlength=n * places)
        before = before.reshape(n, places)[:, :count].cumsum(axis=1)

        inputs = np.full((n, self.seq_len), self.vocab_size - 2, dtype)
        inputs[rows, before + np.arange(count)] = tokens
        inputs[:, -count - 1] = self.vocab_size - 1
        targets = np.full_like(inputs, IGNORE)
        targets[:, -count:] = tokens
        return Examples(inputs, targets)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Remember the tokens; behind the copy token, say them one by one."""
        del world
        answers = np.full(len(inputs), IGNORE)
        tokens: list[int] = []
        copied: int | None = None
        for position, token in enumerate(inputs.tolist()):
            if copied is not None and copied < len(tokens):
                answers[position] = tokens[copied]
                copied += 1
            elif token == self.vocab_size - 1:
                copied = 0
            elif token < self.vocab_size - 2:
                tokens.append(token)
        return answers

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name tokens, blanks and the copy token."""
        special = {self.vocab_size - 1: "copy", self.vocab_size - 2: "blank"}
        return [special.get(t, "token") for t in inputs.tolist()]
