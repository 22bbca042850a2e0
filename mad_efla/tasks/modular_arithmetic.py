"""Modular arithmetic: the value of an expression modulo a small number, asked at the equals sign.

    2 * 3 - 4 + 1 =        modulo 5, at = answer 3
    ( ( 4 - 1 ) + ( - 3 ) ) =        at = answer 0

Without brackets a few registers are enough: what was summed, and the product that is open. With
brackets each one that opens must wait for its end, which takes a stack as deep as they are nested.

Letters: m = modulus; digits [0, m), then + - * ( ) = and the pad. A training sequence has between
`shortest` and seq_len tokens, the equals sign included, and pads behind it; where weights are
chosen and scored all have seq_len. A bracket's left half is of any length that leaves room for the
right one; operators and digits are uniform.

Source: Deletang et al. 2022, arXiv 2207.02098, and its code (modular_arithmetic,
modular_arithmetic_brackets); lengths as Grazzi et al. 2024, arXiv 2411.12537. Published with m = 5,
with + - * if there are no brackets and + - if there are. Departure: a test split has one length.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, token_type
from mad_efla.tasks.parity import check_lengths, draw_lengths

_SIGNS = "+-*()="  # ids m, m + 1, ...; then the pad


class ModularArithmetic(Task):
    """Modular arithmetic.

    Attributes:
        modulus: Values are taken modulo this; digits are the numbers below it.
        seq_len: Tokens of the longest sequence, the equals sign included.
        shortest: Tokens of the shortest training sequence; none makes all of them seq_len long.
        operators: Which are drawn, each as often.
        brackets: Put each operation into brackets, nested at random.
    """

    name: Literal["modular_arithmetic"] = "modular_arithmetic"
    modulus: int = Field(5, le=1_000)
    seq_len: int = Field(40, le=100_000)
    shortest: int | None = 4
    operators: Literal["+", "+-", "+-*"] = "+-*"
    brackets: bool = False

    @model_validator(mode="after")
    def _check(self) -> "ModularArithmetic":
        if self.modulus < 2:
            raise ValueError(f"modulus={self.modulus} must be at least 2")
        check_lengths(self.seq_len, self.shortest, least=2, step=self._step)
        return self

    @property
    def _step(self) -> int:
        return 1 if self.brackets else 2  # digits and signs alternate

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.modulus + len(_SIGNS) + 1

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` expressions; only those of training are of different lengths."""
        del world
        lengths = draw_lengths(n, rng, split, self.shortest, self.seq_len, self._step)
        rows = np.arange(n)
        inputs = np.full((n, self.seq_len), self.vocabulary - 1, token_type(self.vocabulary))
        if self.brackets:
            values = self._nest(inputs, rows, np.zeros_like(rows), lengths - 1, rng)
        else:
            values = self._chain(inputs, lengths, rng)
        inputs[rows, lengths - 1] = self._id("=")
        targets = np.full_like(inputs, IGNORE)
        targets[rows, lengths - 1] = values
        return Examples(inputs, targets)

    def _id(self, sign: str) -> int:
        return self.modulus + _SIGNS.index(sign)

    def _chain(
        self, inputs: Int[np.ndarray, "n L"], lengths: Int[np.ndarray, "n"], rng: np.random.Generator
    ) -> Int[np.ndarray, "n"]:
        """Write digits with operators between them; return the values."""
        n, pairs = len(inputs), self.seq_len // 2
        digits = rng.integers(0, self.modulus, (n, pairs))
        signs = rng.integers(0, len(self.operators), (n, pairs))
        total, product = np.zeros(n, np.int64), digits[:, 0]
        for i in range(1, pairs):
            sign, there = signs[:, i - 1], 2 * i < lengths
            times = there & (sign == 2)
            total = np.where(there & ~times, total + product, total)
            term = np.where(times, product * digits[:, i], (1 - 2 * sign) * digits[:, i])
            product = np.where(there, term, product) % self.modulus
        inputs[:, ::2], inputs[:, 1::2] = digits, self.modulus + signs
        inputs[np.arange(self.seq_len) >= lengths[:, None]] = self.vocabulary - 1
        return (total + product) % self.modulus

    def _nest(
        self,
        inputs: Int[np.ndarray, "n L"],
        rows: Int[np.ndarray, "m"],
        starts: Int[np.ndarray, "m"],
        lengths: Int[np.ndarray, "m"],
        rng: np.random.Generator,
    ) -> Int[np.ndarray, "m"]:
        """Write an expression into each span of a row, all spans of a depth at once.

        A span of up to four tokens is d, -d, (d) or (-d); a longer one (left sign right).

        Returns:
            The value of each expression.
        """
        ends = starts + lengths - 1
        inside = np.where(lengths > 2, 1, 0)
        values = rng.integers(0, self.modulus, len(rows))
        inputs[rows, ends - inside] = values
        negative = lengths % 2 == 0
        inputs[rows[negative], (starts + inside)[negative]] = self._id("-")
        values = np.where(negative, -values, values) % self.modulus
        inputs[rows[lengths > 2], starts[lengths > 2]] = self._id("(")
        inputs[rows[lengths > 2], ends[lengths > 2]] = self._id(")")

        split = lengths > 4
        if not split.any():
            return values
        row, start, length = rows[split], starts[split], lengths[split]
        left = rng.integers(1, length - 3)
        sign = rng.integers(0, len(self.operators), len(row))
        inputs[row, start + 1 + left] = self.modulus + sign
        halves = self._nest(
            inputs,
            np.tile(row, 2),
            np.concatenate([start + 1, start + left + 2]),
            np.concatenate([left, length - left - 3]),
            rng,
        )
        a, b = np.split(halves, 2)
        values[split] = np.choose(sign, [a + b, a - b, a * b]) % self.modulus
        return values

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Keep a sum, an open product and a stack of those that brackets have interrupted."""
        del world
        answers = np.full(len(inputs), IGNORE)
        total, product, operand = 0, 1, False
        waiting: list[tuple[int, int]] = []
        for position, token in enumerate(inputs.tolist()):
            sign = self._sign(token)
            if not sign:
                product, operand = product * token % self.modulus, True
            elif sign == "(":
                waiting.append((total, product))
                total, product, operand = 0, 1, False
            elif sign == ")":
                value = total + product
                total, product = waiting.pop()
                product, operand = product * value % self.modulus, True
            elif sign == "=":
                answers[position] = (total + product) % self.modulus
            elif sign in "+-" and operand:
                total, product, operand = total + product, (-1 if sign == "-" else 1), False
            elif sign == "-":
                product = -product
            elif sign == "*":
                operand = False
        return answers

    def _sign(self, token: int) -> str:
        """Return the sign of a token, empty for digits."""
        return "" if token < self.modulus else (_SIGNS + "_")[token - self.modulus]

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name digits, signs by themselves, and padding."""
        names = [self._sign(t) or "digit" for t in inputs.tolist()]
        return ["pad" if name == "_" else name for name in names]
