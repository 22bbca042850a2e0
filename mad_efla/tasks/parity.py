"""Parity: is the number of ones odd? Asked once, at the last bit.

    1 0 1 1 _ _        at the last bit, the fourth, answer 1: three ones

No bit can be left out and no shorter sum will do, so a mixer must carry one state that each one
turns over. Linear ones can only if their transition has an eigenvalue below zero.

Letters: bits 0 and 1, pad 2 (shown as _). A training sequence has between `shortest` and seq_len
bits, any number alike, and pads behind them; where weights are chosen and scored all have seq_len.

Source: Grazzi et al. 2024, arXiv 2411.12537, section 5.1, and its code: 3 to 40 tokens in training,
40 to 256 in test, the answer among them. Departures: lengths count bits alone, and a test split has
one length, so that each length has a score of its own.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, token_type

_PAD = 2


class Parity(Task):
    """Parity of a sequence of bits.

    Attributes:
        seq_len: Bits, of the longest sequence; what the model sees.
        shortest: Bits of the shortest training sequence; none makes all of them seq_len long.
    """

    name: Literal["parity"] = "parity"
    seq_len: int = Field(40, le=1_000_000)
    shortest: int | None = 3

    @model_validator(mode="after")
    def _check(self) -> "Parity":
        check_lengths(self.seq_len, self.shortest)
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return 3

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` sequences; only those of training are of different lengths."""
        del world
        lengths = draw_lengths(n, rng, split, self.shortest, self.seq_len)
        inputs = rng.integers(0, 2, (n, self.seq_len), dtype=token_type(3))
        inputs[np.arange(self.seq_len) >= lengths[:, None]] = _PAD
        targets = np.full_like(inputs, IGNORE)
        targets[np.arange(n), lengths - 1] = (inputs == 1).sum(axis=1) % 2
        return Examples(inputs, targets)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Count the ones so far."""
        del world
        return (inputs == 1).cumsum() % 2

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Tell bits from padding."""
        return ["pad" if t == _PAD else "bit" for t in inputs.tolist()]


# ------------------------------------------- what tasks of sequences of many lengths share


def check_lengths(seq_len: int, shortest: int | None, least: int = 1, step: int = 1) -> None:
    """Refuse a length that is too short or no multiple, and a shortest longer than the longest.

    Args:
        seq_len: Of the longest sequences.
        shortest: Of the shortest in training.
        least: What a sequence needs at least.
        step: What lengths are multiples of.

    Raises:
        ValueError: Opening with the field, as validators of a task do.
    """
    for field, value in (("seq_len", seq_len), ("shortest", shortest)):
        if value is not None and value < least:
            raise ValueError(f"{field}={value} must be at least {least}")
        if value is not None and value % step:
            below = value // step * step
            raise ValueError(f"{field}={value} must be a multiple of {step}; use {below} or {below + step}")
    if shortest is not None and shortest > seq_len:
        raise ValueError(
            f"shortest={shortest} must be at most seq_len = {seq_len}; leave it out for sequences that are all as long"
        )


def draw_lengths(
    n: int, rng: np.random.Generator, split: Split, shortest: int | None, longest: int, step: int = 1
) -> Int[np.ndarray, "n"]:
    """Draw the length of each sequence: any in training, the longest where models are judged.

    Args:
        n: Sequences.
        rng: The only source of randomness.
        split: Only lengths of `train` vary.
        shortest: Tokens of the shortest; None makes all of them `longest`.
        longest: Tokens of the longest.
        step: Lengths are multiples of it.
    """
    if split != "train" or shortest is None:
        return np.full(n, longest)
    return step * rng.integers(shortest // step, longest // step + 1, n)
