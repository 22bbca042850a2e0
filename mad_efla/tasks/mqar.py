"""Multi-query associative recall (MQAR): pairs first, then each key once more, soon or late.

    k1 v1 k2 v2 | k2 . . . k1 . . .        at each key behind the bar answer its value

Where in the second part the keys are asked for follows a power law, as distances between repeated
phrases do in text: most queries come soon, some much later.

Letters: K = pairs; filler 0 (shown as a dot), keys [1, V/2), values [V/2, V), none twice in a
sequence. The second part has S = (seq_len - 2 K) / 2 query slots of two tokens; the K keys take
slots drawn without replacement, slot i with weight i^(a - 1), a = gap_power. The query positions
are scored, in training as in test.

Source: Arora et al. 2023, arXiv 2312.04927, section 3 and appendix E, and its code for the
distribution of slots. Departure: vocabularies shorter than the sequence are allowed.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import IGNORE, Examples, Split, Task, distinct, token_type


class MQAR(Task):
    """Multi-query associative recall.

    Attributes:
        vocab_size: Token ids in all, the filler included.
        seq_len: Tokens the model sees.
        pairs: Key-value pairs, each asked for once.
        gap_power: a in (0, 1]: 1 spreads the queries evenly, less brings them nearer the pairs.
        random_filler: Fill the gaps with any ids instead of the filler.
    """

    name: Literal["mqar"] = "mqar"
    vocab_size: int = Field(8192, le=30_000)
    seq_len: int = Field(64, le=1_000_000)
    pairs: int = 4
    gap_power: float = 0.01
    random_filler: bool = False

    @model_validator(mode="after")
    def _check(self) -> "MQAR":
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs} must be at least 1")
        if self.seq_len % 2:
            raise ValueError(
                f"seq_len={self.seq_len} must be even: pairs and query slots are two tokens long; "
                f"use {self.seq_len - 1} or {self.seq_len + 1}"
            )
        if self.seq_len < 4 * self.pairs:
            raise ValueError(
                f"seq_len={self.seq_len} must be at least 4 pairs = {4 * self.pairs}: a pair and a "
                "query slot of two tokens for each; raise it or lower pairs"
            )
        if self.vocab_size < 2 * self.pairs + 2:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least 2 pairs + 2 = "
                f"{2 * self.pairs + 2}: no key or value comes twice; raise it or lower pairs"
            )
        if not 0 < self.gap_power <= 1:
            raise ValueError(
                f"gap_power={self.gap_power} must be in (0, 1]; the published value is 0.01, and "
                "1 spreads queries evenly"
            )
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
        K, half = self.pairs, self.vocab_size // 2
        keys = distinct(rng, n, K, 1, half)
        values = distinct(rng, n, K, half, self.vocab_size)

        inputs = np.zeros((n, self.seq_len), token_type(self.vocab_size))
        if self.random_filler:
            inputs[:] = rng.integers(0, self.vocab_size, inputs.shape, dtype=inputs.dtype)
        inputs[:, : 2 * K : 2], inputs[:, 1 : 2 * K : 2] = keys, values

        # The K first of S racing exponential clocks are K draws without replacement.
        weight = np.arange(1, (self.seq_len - 2 * K) // 2 + 1) ** (self.gap_power - 1)
        arrival = rng.standard_exponential((n, len(weight))) / weight
        asked = 2 * K + 2 * arrival.argsort(axis=1)[:, :K]

        rows = np.arange(n)[:, None]
        targets = np.full_like(inputs, IGNORE)
        inputs[rows, asked], targets[rows, asked] = keys, values
        return Examples(inputs, targets)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Look every token of the second part up among the pairs of the first."""
        del world
        answers = np.full(len(inputs), IGNORE)
        tokens, context = inputs.tolist(), 2 * self.pairs
        value_of = dict(zip(tokens[:context:2], tokens[1:context:2], strict=False))
        for position, token in enumerate(tokens[context:], start=context):
            answers[position] = value_of.get(token, IGNORE)
        return answers

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name keys and values of the pairs, and what follows them."""
        tokens, context = inputs.tolist(), 2 * self.pairs
        keys = set(tokens[:context:2])
        pairs = [("key", "value")[i % 2] for i in range(len(tokens[:context]))]
        return pairs + ["key" if t in keys else "filler" for t in tokens[context:]]
