"""Copying: a string, a bar, the string again; at the bar and behind it answer what comes next.

    a b c | a b        at |, a, b answer a, b, c

The model reads the copy as it should be, one token behind what is asked, so one that finds where it
is needs no count. Held in a state of fixed size, only so long a string can be copied.

Letters: letters [0, V - 2), bar V - 2, pad V - 1; a string of n letters takes 2 n tokens, its last
one being only a target. A training sequence has between `shortest` and seq_len tokens, and pads
behind them; where weights are chosen and scored all have seq_len. The copy is scored.

Source: Jelassi et al. 2024, arXiv 2402.01032, and its code: 26 letters, the copy alone
trained on. Departures: one string per sequence, without marks at its beginning and end, and a test
split has one length.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, token_type
from mad_efla.tasks.parity import check_lengths, draw_lengths


class Copying(Task):
    """Copying of a string.

    Attributes:
        vocab_size: Token ids in all, the bar and the pad included.
        seq_len: Tokens of the longest sequence, twice its letters.
        shortest: Tokens of the shortest training sequence; none makes all of them seq_len long.
    """

    name: Literal["copying"] = "copying"
    vocab_size: int = Field(28, le=30_000)
    seq_len: int = Field(64, le=1_000_000)
    shortest: int | None = None

    @model_validator(mode="after")
    def _check(self) -> "Copying":
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
        return strings(rng, lengths, self.seq_len // 2, self.vocab_size, backwards=False)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Say the letters before the bar one by one."""
        del world
        return say_again(inputs, self.vocab_size - 2, backwards=False)

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name letters, the bar and padding."""
        return letters(inputs, self.vocab_size)


# ------------------------------------------- what copying shares with its reverse


def check_strings(vocab_size: int, seq_len: int, shortest: int | None) -> None:
    """Refuse what leaves no two letters, or no string.

    Args:
        vocab_size: Token ids in all, the bar and the pad included.
        seq_len: Tokens of the longest sequence.
        shortest: Tokens of the shortest training sequence; None makes all equally long.

    Raises:
        ValueError: Opening with the field, as validators of a task do.
    """
    if vocab_size < 4:
        raise ValueError(f"vocab_size={vocab_size} must be at least 4: two letters, the bar and the pad")
    check_lengths(seq_len, shortest, least=2, step=2)


def strings(
    rng: np.random.Generator, lengths: Int[np.ndarray, "n"], longest: int, vocab_size: int, *, backwards: bool
) -> Examples:
    """Draw strings, and behind a bar write them again, forwards or backwards.

    Args:
        rng: The only source of randomness.
        lengths: Letters of each string.
        longest: Letters of the longest there may be.
        vocab_size: Ids in all, the last two being bar and pad.
        backwards: Whether the last letter comes first behind the bar.
    """
    n, kind, place = len(lengths), token_type(vocab_size), np.arange(longest)
    letters = rng.integers(0, vocab_size - 2, (n, longest), dtype=kind)
    inside = place < lengths[:, None]
    order = (lengths[:, None] - 1 - place) % longest if backwards else place + 0 * lengths[:, None]

    whole = np.full((n, 2 * longest + 1), vocab_size - 1, kind)
    rows, columns = inside.nonzero()
    whole[rows, columns] = letters[inside]
    whole[np.arange(n), lengths] = vocab_size - 2
    again = lengths[rows] + 1 + columns
    whole[rows, again] = np.take_along_axis(letters, order, axis=1)[inside]

    inputs, targets = whole[:, :-1].copy(), np.full((n, 2 * longest), IGNORE, kind)
    targets[rows, again - 1] = whole[rows, again]
    short = lengths < longest
    inputs[short, 2 * lengths[short]] = vocab_size - 1  # the last letter is only a target
    return Examples(inputs, targets)


def say_again(inputs: Int[np.ndarray, "L"], bar: int, *, backwards: bool) -> Int[np.ndarray, "L"]:
    """Answer, from the bar on, the letters before it.

    Args:
        inputs: One sequence.
        bar: The token between the string and its copy.
        backwards: Answer the last letter first.
    """
    answers = np.full(len(inputs), IGNORE)
    bars = np.flatnonzero(inputs == bar)
    if bars.size:
        said = inputs[: bars[0]][::-1] if backwards else inputs[: bars[0]]
        there = answers[bars[0] : 2 * bars[0]]
        there[:] = said[: len(there)]
    return answers


def letters(inputs: Int[np.ndarray, "L"], vocab_size: int) -> list[str]:
    """Name letters, the bar and padding."""
    special = {vocab_size - 2: "|", vocab_size - 1: "pad"}
    return [special.get(t, "token") for t in inputs.tolist()]
