"""Induction: a mark comes twice; the second time answer what followed the first.

    a b M c d a b M        at the second M answer c

One fact, one question, and no telling how far apart: what is learned at one length may hold at any.

Letters: V = vocab_size; mark M = V - 1, the other tokens are drawn alike. The first mark stands
anywhere but so that its answer is no mark, alike; the second is the last token, and alone scored.

Source: Gu and Dao 2023, arXiv 2312.00752, section 4.1.2, after Fu et al. 2023, arXiv 2212.14052:
16 tokens, trained at length 256, tried at 64 to 1,048,576.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, token_type


class Induction(Task):
    """The induction-heads task.

    Attributes:
        vocab_size: Token ids in all, the mark included.
        seq_len: Tokens the model sees.
    """

    name: Literal["induction"] = "induction"
    vocab_size: int = Field(16, le=30_000)
    seq_len: int = Field(256, le=2_000_000)

    @model_validator(mode="after")
    def _check(self) -> "Induction":
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 3: two tokens and the mark")
        if self.seq_len < 3:
            raise ValueError(f"seq_len={self.seq_len} must be at least 3: the mark, its answer, the mark again")
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
        mark, rows = self.vocab_size - 1, np.arange(n)
        inputs = rng.integers(0, mark, (n, self.seq_len), dtype=token_type(self.vocab_size))
        first = rng.integers(0, self.seq_len - 2, n)
        inputs[rows, first] = inputs[:, -1] = mark
        targets = np.full_like(inputs, IGNORE)
        targets[:, -1] = inputs[rows, first + 1]
        return Examples(inputs, targets)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Look behind the first mark when the second comes."""
        del world
        answers = np.full(len(inputs), IGNORE)
        marks = np.flatnonzero(inputs == self.vocab_size - 1)
        answers[marks[1:]] = inputs[marks[:1] + 1] if len(marks) > 1 else IGNORE
        return answers

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name tokens and the mark."""
        return ["mark" if t == self.vocab_size - 1 else "token" for t in inputs.tolist()]
