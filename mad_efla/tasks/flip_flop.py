"""Flip-flop: a bit is written, read and meant to be ignored; at each read answer what was written.

    w 1 i 0 i 1 r 1 w 0 i 1 r 0        at each r answer the bit behind the last w

One bit of memory is enough, but it must survive any number of instructions that only look as if
they mattered. Attention errs on rare sequences, however long it was trained.

Letters: bits 0 and 1, then w, r, i. Instructions and bits alternate; the first is w, the last r,
the others are i with probability `ignore`, else w or r alike. Bits behind w and i are random, the
bit behind r is the answer. Every r is scored, in training as in test.

Source: Liu et al. 2023, arXiv 2306.00946, section 3: sequences of 512 tokens with ignore = 0.8,
tried on 0.98 and on 0.1. Departure: the baseline is shorter.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, token_type
from mad_efla.tasks.parity import check_lengths

_WRITE, _READ, _IGNORED = 2, 3, 4


class FlipFlop(Task):
    """The flip-flop language.

    Attributes:
        seq_len: Tokens the model sees: instructions and bits.
        ignore: Probability that an instruction is to be ignored.
    """

    name: Literal["flip_flop"] = "flip_flop"
    seq_len: int = Field(128, le=1_000_000)
    ignore: float = 0.8

    @model_validator(mode="after")
    def _check(self) -> "FlipFlop":
        check_lengths(self.seq_len, None, least=4, step=2)
        if not 0 <= self.ignore <= 1:
            raise ValueError(f"ignore={self.ignore} must be in [0, 1]: it is a probability; published with 0.8")
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return 5

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` sequences; all splits are alike."""
        del split, world
        count, kind = self.seq_len // 2, token_type(5)
        chance = rng.random((n, count))
        acts = np.where(chance < (1 + self.ignore) / 2, _WRITE, _READ)
        acts[chance < self.ignore] = _IGNORED
        acts[:, 0], acts[:, -1] = _WRITE, _READ
        bits = rng.integers(0, 2, (n, count))
        written = np.maximum.accumulate(np.where(acts == _WRITE, np.arange(count), 0), axis=1)
        held = np.take_along_axis(bits, written, axis=1)

        inputs = np.empty((n, self.seq_len), kind)
        inputs[:, ::2], inputs[:, 1::2] = acts, np.where(acts == _READ, held, bits)
        targets = np.full_like(inputs, IGNORE)
        targets[:, ::2] = np.where(acts == _READ, held, IGNORE)
        return Examples(inputs, targets)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Remember the bit behind each w, say it at each r."""
        del world
        answers = np.full(len(inputs), IGNORE)
        held = act = IGNORE
        for position, token in enumerate(inputs.tolist()):
            if token >= _WRITE:
                act = token
                answers[position] = held if act == _READ else IGNORE
            elif act == _WRITE:
                held = token
        return answers

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name instructions by their letters, and bits that count or are to be ignored."""
        acts = [None, *inputs.tolist()]
        return [
            "wri"[t - _WRITE] if t >= _WRITE else "noise" if act == _IGNORED else "bit"
            for act, t in zip(acts, inputs.tolist(), strict=False)
        ]
