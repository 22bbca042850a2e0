"""Counting: ups and downs; at every token answer the balance, while it is near zero.

    + + - + + - - -        with most = 2: the balance is 1 2 1 2 . 2 1 0

The balance is never reset and has no bound, so a state that forgets, or that holds only so many
values, loses it. Where it lies beyond what can be named nothing is asked, but it must be kept.

Letters: C = most; answers C + balance, ids [0, 2 C]; up 2 C + 1, down 2 C + 2, idle 2 C + 3. A
token is idle with probability `idle`, else up or down alike. The balance is a random walk, so after
t tokens it is about sqrt(t (1 - idle)) from zero.

Source: ours. Close to it are the one-counter machines of Weiss et al. 2018, arXiv 1805.04908, and
"majority count" of Beck et al. 2024, arXiv 2405.04517, which asks once for a count that grows with
the length; here answers, and so the vocabulary, stay the same at every length.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, token_type


class Counting(Task):
    """Counting up and down.

    Attributes:
        seq_len: Tokens the model sees.
        most: Largest balance, up or down, that is asked for.
        idle: Probability of a token that does not count.
    """

    name: Literal["counting"] = "counting"
    seq_len: int = Field(64, le=1_000_000)
    most: int = Field(4, le=10_000)
    idle: float = 0.0

    @model_validator(mode="after")
    def _check(self) -> "Counting":
        if self.seq_len < 1:
            raise ValueError(f"seq_len={self.seq_len} must be at least 1")
        if self.most < 1:
            raise ValueError(f"most={self.most} must be at least 1")
        if not 0 <= self.idle < 1:
            raise ValueError(f"idle={self.idle} must be in [0, 1): some tokens must count")
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return 2 * self.most + 4

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` sequences; all splits are alike."""
        del split, world
        up, kind = 2 * self.most + 1, token_type(self.vocabulary)
        inputs = rng.integers(up, up + 2, (n, self.seq_len), dtype=kind)
        inputs[rng.random(inputs.shape) < self.idle] = up + 2
        steps = (inputs == up).astype(np.int32) - (inputs == up + 1)
        balance = steps.cumsum(axis=1)
        near = np.abs(balance) <= self.most
        return Examples(inputs, np.where(near, balance + self.most, IGNORE).astype(kind))

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Keep the balance."""
        del world
        answers = np.full(len(inputs), IGNORE)
        balance = 0
        for position, token in enumerate(inputs.tolist()):
            balance += {1: 1, 2: -1, 3: 0}[token - 2 * self.most]
            if abs(balance) <= self.most:
                answers[position] = balance + self.most
        return answers

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name ups, downs and idle tokens."""
        return [("+", "-", "idle")[t - 2 * self.most - 1] for t in inputs.tolist()]
