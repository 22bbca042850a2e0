"""Tasks: what is learned. One file each; a task's class is its configuration and its generator.

A task samples token sequences and says which positions are scored. It is defined by its solver: a
symbolic program that sees only what stands before a position and answers every scored one.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from mad_efla.config import Section

IGNORE = -100
"""Target of a position that is not scored."""

Split = Literal["train", "validation", "test"]


class Examples(NamedTuple):
    """A batch of sequences, in the smallest integer type that holds them.

    Attributes:
        inputs: Token ids.
        targets: The answer at every scored position, `IGNORE` elsewhere.
        next_tokens: The plain next token at every position, for training on the whole sequence;
            None where the task is only ever trained on its answers.
    """

    inputs: Int[np.ndarray, "n L"]
    targets: Int[np.ndarray, "n L"]
    next_tokens: Int[np.ndarray, "n L"] | None = None


class Task(Section):
    """A task: its fields are its difficulty, its methods its meaning.

    Class attributes:
        version: Raised whenever equal fields and seed would give other data.
        backbone: The model the task asks for.
    """

    version: ClassVar[int] = 1
    backbone: ClassVar[str] = "language_model"

    name: str

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of token ids, special ones included."""

    @property
    @abstractmethod
    def input_length(self) -> int:
        """Tokens the model sees per sequence."""

    def world(self, rng: np.random.Generator) -> Any:
        """Draw what all splits of one seed share, such as a table of facts; None by default."""
        del rng
        return None

    @abstractmethod
    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` independent sequences.

        Args:
            n: Sequences to draw.
            rng: The only source of randomness.
            split: For tasks whose test differs from their training on purpose.
            world: What `world` returned for this seed.
        """

    @abstractmethod
    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Answer every position of one sequence from what stands at or before it.

        Returns:
            A token for each position, `IGNORE` where nothing is known yet.
        """

    def answerable(
        self, examples: Examples, train: Examples, world: Any
    ) -> Bool[np.ndarray, "n L"]:
        """Tell which scored positions can be answered from the prefix and the training set.

        All of them, unless a task says otherwise.

        Args:
            examples: Whose positions are judged.
            train: All that the learner was shown.
            world: What `world` returned for this seed.
        """
        del train, world
        return examples.targets != IGNORE

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name the role of each token (`key`, `value`, `noise`, ...), for display."""
        return ["token"] * len(inputs)


def token_type(vocabulary: int) -> type[np.signedinteger]:
    """Return the smallest signed type that holds the ids of a vocabulary and `IGNORE`."""
    return next(t for t in (np.int8, np.int16, np.int32) if vocabulary - 1 <= np.iinfo(t).max)


def distinct(
    rng: np.random.Generator, n: int, k: int, low: int, high: int
) -> Int[np.ndarray, "n k"]:
    """Draw `n` times `k` different ids of [low, high), every ordered choice equally likely.

    The i-th id is drawn as a rank among those not taken yet, and steps over each smaller one that
    is; so nothing as long as the range is ever held.
    """
    columns = np.empty((k, n), token_type(high))
    rising: list[np.ndarray] = []  # the columns so far, each row in order of size
    for i in range(k):
        column = rng.integers(0, high - low - i, n, dtype=columns.dtype)
        for taken in rising:
            column += column >= taken
        columns[i] = column
        for place, other in enumerate(rising):
            rising[place], column = np.minimum(other, column), np.maximum(other, column)
        rising.append(column)
    return columns.T + columns.dtype.type(low)
