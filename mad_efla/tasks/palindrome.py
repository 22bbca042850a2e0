"""Palindrome: a string, a bar, the string backwards; from the bar on answer what comes next.

    a b c | c b        at |, c, b answer c, b, a

As copying, but the distance between a letter and its answer grows by two from letter to letter, so
no fixed shift of the past will do.

Letters: letters [0, V - 2), bar V - 2, pad V - 1; a string of n letters takes 2 n tokens, its last
one being only a target. A training sequence has between `shortest` and seq_len tokens, and pads
behind them; where weights are chosen and scored all have seq_len. The second half is scored.

Source: Kimi Team 2025, arXiv 2510.26692, section 5.1: lengths of 256 to 2,048 tokens, on which it
trains and scores alike. Departures: the baseline is shorter, and the bar is asked at, too, where it
asks nothing. Which vocabulary it has it does not say.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import Examples, Split, Task
from mad_efla.tasks.copying import check_strings, letters, say_again, strings
from mad_efla.tasks.parity import draw_lengths


class Palindrome(Task):
    """Copying of a string backwards.

    Attributes:
        vocab_size: Token ids in all, the bar and the pad included.
        seq_len: Tokens of the longest sequence, twice its letters.
        shortest: Tokens of the shortest training sequence; none makes all of them seq_len long.
    """

    name: Literal["palindrome"] = "palindrome"
    vocab_size: int = Field(28, le=30_000)
    seq_len: int = Field(64, le=1_000_000)
    shortest: int | None = None

    @model_validator(mode="after")
    def _check(self) -> "Palindrome":
        check_strings(self.vocab_size, self.seq_len, self.shortest)
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
        """Draw `n` sequences; only those of training are of different lengths."""
        del world
        lengths = draw_lengths(n, rng, split, self.shortest, self.seq_len, step=2) // 2
        return strings(rng, lengths, self.seq_len // 2, self.vocab_size, backwards=True)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Say the letters before the bar, the last one first."""
        del world
        return say_again(inputs, self.vocab_size - 2, backwards=True)

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name letters, the bar and padding."""
        return letters(inputs, self.vocab_size)
