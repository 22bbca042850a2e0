"""Tasks: what is learned. One file each; a task's class is its configuration and its generator.

A task samples token sequences and says which positions are scored. It is defined by its solver: a
symbolic program that sees only what stands before a position and answers every scored one.

A `RealTask` has examples instead of a generator, and is defined by them: nobody can write down
what makes an image a seven, so it has no solver, and the contract holds it to other promises.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Num

from mad_efla.config import Section

IGNORE = -100
"""Target of a position that is not scored."""

Split = Literal["train", "validation", "test"]


class Examples(NamedTuple):
    """A batch of sequences, in the smallest integer type that holds them.

    Attributes:
        inputs: Token ids; or real numbers in float32, one per position.
        targets: The answer at every scored position, `IGNORE` elsewhere.
        next_tokens: The plain next token at every position, for training on the whole sequence;
            None where the task is only ever trained on its answers.
    """

    inputs: Num[np.ndarray, "n L"]
    targets: Int[np.ndarray, "n L"]
    next_tokens: Int[np.ndarray, "n L"] | None = None

    def rows(self, index: Any) -> "Examples":
        """Return some of the sequences, copied."""
        return Examples(*(None if column is None else column[index].copy() for column in self))  # type: ignore[arg-type]


class Probe(NamedTuple):
    """A test set that a trained model is scored on beside the test split; see `Task.probes`.

    Attributes:
        name: What was done to the test split: `noise`.
        severity: How much of it.
        examples: What is scored.
    """

    name: str
    severity: float
    examples: Examples


class Corpus(NamedTuple):
    """All examples of a `RealTask`: those to learn from, and those that score, once and for all."""

    train: Examples
    test: Examples


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
        """Number of token ids, special ones included; of classes where inputs are real numbers."""

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

    def answerable(self, examples: Examples, train: Examples, world: Any) -> Bool[np.ndarray, "n L"]:
        """Tell which scored positions can be answered from the prefix and the training set.

        All of them, unless a task says otherwise.

        Args:
            examples: Whose positions are judged.
            train: All that the learner was shown.
            world: What `world` returned for this seed.
        """
        del train, world
        return examples.targets != IGNORE

    def describe(self, inputs: Num[np.ndarray, "L"]) -> list[str]:
        """Name the role of each token (`key`, `value`, `noise`, ...), for display.

        A name of one letter (`+`) is shown itself, in place of the token's id.
        """
        return ["token"] * len(inputs)

    def probes(self, test: Examples, stream: Callable[[str], np.random.Generator]) -> Iterator[Probe]:
        """Yield further test sets, on which the chosen weights are scored when training is over.

        None by default. They choose nothing.

        Args:
            test: The test split.
            stream: Returns the random stream of a name, from its beginning at every call.
        """
        del test, stream
        yield from ()


class RealTask(Task):
    """A task whose examples are there already, and no generator or solver."""

    @abstractmethod
    def corpus(self) -> Corpus:
        """Return all examples, always in the same order; what is slow to read may be kept.

        Raises:
            ConfigError: They are not where they must be, or are not what they must be.
        """

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` different sequences from the part of the corpus that a split is taken from."""
        del world
        part = self.corpus().test if split == "test" else self.corpus().train
        return part.rows(rng.choice(len(part.inputs), n, replace=False))

    def solve(self, inputs: Num[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Answer nothing: there is no solver."""
        del world
        return np.full(len(inputs), IGNORE)


def token_type(vocabulary: int) -> type[np.signedinteger]:
    """Return the smallest signed type that holds the ids of a vocabulary and `IGNORE`."""
    return next(t for t in (np.int8, np.int16, np.int32) if vocabulary - 1 <= np.iinfo(t).max)


def distinct(rng: np.random.Generator, n: int, k: int, low: int, high: int) -> Int[np.ndarray, "n k"]:
    """Draw `n` times `k` different ids of [low, high), every ordered choice equally likely.

    The i-th id is drawn as a rank among those not taken yet, and steps over each smaller one that
    is; so nothing as long as the range is ever held.

    Args:
        rng: The only source of randomness.
        n: Rows.
        k: Ids in a row, at most `high - low`.
        low: The least id.
        high: One more than the largest id.
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
