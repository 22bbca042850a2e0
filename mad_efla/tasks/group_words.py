"""Group words: elements of a finite group; at each one answer the product of all so far.

    g1 g2 g3 ...        at each answer g1, g1 g2, g1 g2 g3, ...

Who solves it keeps a group element and multiplies; how hard that is depends on the group. Z_n
counts in a circle (Z2 is parity, asked at every token), S3 is the smallest in which order matters,
A5 the smallest that is not solvable.

Letters: Z_n: additions modulo n, ids 0 to n - 1. S_n: all permutations of n points, A_n: the even
ones, ids in lexicographic order, so that the identity is 0. In a product the first factor acts
first: (g h)(x) = h(g(x)). Elements are drawn alike.

Source: Merrill et al. 2024, arXiv 2404.08819, and its code jopetty/word-problem. `moves` as in
Siems et al. 2025, arXiv 2502.10297 (its S5 of swaps alone is moves = 2). Departures: no token opens
the sequence, and the order of factors, which theirs takes from a library, is stated here.
"""

import functools
import itertools
import re
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field, model_validator

from mad_efla.tasks import Examples, Split, Task, token_type

_LARGEST = {"Z": 1_000, "S": 6, "A": 6}


class GroupWords(Task):
    """The word problem of a finite group.

    Attributes:
        group: `Z2`, `Z3`, ..., `S3` to `S6`, `A3` to `A6`.
        seq_len: Elements, each of them asked at.
        moves: Draw only permutations that move at most so many points; none for all of them.
    """

    name: Literal["group_words"] = "group_words"
    group: str = "S3"
    seq_len: int = Field(128, le=1_000_000)
    moves: int | None = None

    @model_validator(mode="after")
    def _check(self) -> "GroupWords":
        kind, n = self.group[:1], self.group[1:]
        known = re.fullmatch(r"[1-9]\d{0,3}", n) and kind in _LARGEST
        if not known or not (2 if kind == "Z" else 3) <= int(n) <= _LARGEST[kind]:
            raise ValueError(
                f"group={self.group!r} must be Z2 to Z{_LARGEST['Z']}, S3 to S{_LARGEST['S']} or A3 to A{_LARGEST['A']}"
            )
        if self.seq_len < 1:
            raise ValueError(f"seq_len={self.seq_len} must be at least 1")
        if self.moves is not None and (kind == "Z" or self._drawn.sum() < 2):
            raise ValueError(
                f"moves={self.moves} must leave {self.group} something to draw beside the "
                "identity: at least 2 points for S, 3 for A; Z moves all or none, so leave it out"
            )
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids: elements of the group."""
        return len(product_table(self.group))

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len

    @property
    def _drawn(self) -> Bool[np.ndarray, "G"]:
        """Tell which elements are drawn."""
        if self.moves is None:
            return np.ones(self.vocabulary, bool)
        points = permutations(self.group)
        return (points != np.arange(points.shape[1])).sum(axis=1) <= self.moves

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` sequences; all splits are alike."""
        del split, world
        table, drawn = product_table(self.group), np.flatnonzero(self._drawn)
        kind = token_type(self.vocabulary)
        inputs = drawn[rng.integers(0, len(drawn), (n, self.seq_len))].astype(kind)
        targets = inputs.copy()
        for t in range(1, self.seq_len):
            targets[:, t] = table[targets[:, t - 1], inputs[:, t]]
        return Examples(inputs, targets)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Multiply what was read."""
        del world
        table = product_table(self.group)
        found = itertools.accumulate(inputs.tolist(), lambda product, g: int(table[product, g]))
        return np.fromiter(found, np.int64, len(inputs))

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Call every token an element."""
        return ["element"] * len(inputs)


@functools.cache
def product_table(group: str) -> Int[np.ndarray, "G G"]:
    """Return the id of every product g h, at [g, h]."""
    if group[0] == "Z":
        n = int(group[1:])
        return (np.arange(n)[:, None] + np.arange(n)) % n
    points = permutations(group)
    products = points[np.arange(len(points))[None, :, None], points[:, None, :]]  # h(g(x))
    place = len(points[0]) ** np.arange(len(points[0]))[::-1]
    return np.searchsorted(points @ place, products @ place)  # lexicographic is numeric order


@functools.cache
def permutations(group: str) -> Int[np.ndarray, "G n"]:
    """List the permutations of S_n or A_n: where each point goes."""
    n = int(group[1:])
    found = np.array(list(itertools.permutations(range(n))))
    if group[0] == "S":
        return found
    pairs = itertools.combinations(range(n), 2)
    inversions = sum((found[:, i] > found[:, j]).astype(int) for i, j in pairs)
    return found[inversions % 2 == 0]
