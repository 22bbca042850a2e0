"""Noisy recall: in-context recall among pairs of tokens that mean nothing.

    k1 v1 x5 x2 k2 v2 x1 x1 k1 v1 ... k2 -> v2

Every pair slot but one is, with probability noise_fraction, two noise tokens instead of a pair;
one slot, drawn at random, is sure to hold a pair, and the last is never noise.

Letters: n ordinary tokens, keys [0, n/2), values [n/2, n), noise [n, n + noise_vocab_size);
P pair slots = seq_len / 2. Scoring is that of `recall`: multi-query scores every key seen before,
single-query only the last, marked by the copy token V - 1 before it.

Source: Poli et al. 2024, arXiv 2403.17844, section 4 and appendix B. Departure: the sure slot is
never the last. In the reference code it may be, and a sequence of noise alone then has no key to
ask for.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import Examples, Split, Task
from mad_efla.tasks.recall import check_length, draw_pairs, examples_of, look_up


class NoisyRecall(Task):
    """In-context recall among noise.

    Attributes:
        vocab_size: Token ids in all: ordinary, noise, and the copy token of single-query.
        seq_len: Tokens of the slots; with multi-query the model sees one less, the last value
            being only a target.
        multi_query: Score every key seen before, not only the last.
        noise_vocab_size: Ids that are noise.
        noise_fraction: Probability, in [0, 1), that a slot is noise.
    """

    name: Literal["noisy_recall"] = "noisy_recall"
    vocab_size: int = Field(32, le=30_000)
    seq_len: int = Field(128, le=1_000_000)
    multi_query: bool = True
    noise_vocab_size: int = 16
    noise_fraction: float = 0.2

    @model_validator(mode="after")
    def _check(self) -> "NoisyRecall":
        check_length(self.seq_len)
        if not 0 <= self.noise_fraction < 1:
            raise ValueError(
                f"noise_fraction={self.noise_fraction} must be in [0, 1): some slots must hold pairs; use 0.9 or less"
            )
        if self.noise_vocab_size < 1:
            raise ValueError(
                f"noise_vocab_size={self.noise_vocab_size} must be at least 1; for no noise set "
                "noise_fraction to 0, or use the task recall"
            )
        if self._ordinary < 4:
            least = self.vocab_size - self._ordinary + 4
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least {least}: two keys, two values"
                + ("" if self.multi_query else ", the copy token")
                + f" and noise_vocab_size={self.noise_vocab_size}; raise one or lower the other"
            )
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.vocab_size

    @property
    def input_length(self) -> int:
        """Tokens the model sees."""
        return self.seq_len - 1 if self.multi_query else self.seq_len

    @property
    def _ordinary(self) -> int:
        return self.vocab_size - self.noise_vocab_size - (0 if self.multi_query else 1)

    def sample(self, n: int, rng: np.random.Generator, split: Split, world: Any) -> Examples:
        """Draw `n` sequences; all splits are alike."""
        del split, world
        P, ordinary = self.seq_len // 2, self._ordinary
        noise = rng.random((n, P - 1)) < self.noise_fraction
        noise[np.arange(n), rng.integers(0, P - 1, n)] = False
        pairs = draw_pairs(n, rng, slots=P, ordinary=ordinary, noise=noise)
        ids = rng.integers(ordinary, ordinary + self.noise_vocab_size, (noise.sum(), 2))
        pairs.tokens[:, :-1][noise] = ids
        return examples_of(pairs, self.vocab_size, self.multi_query)

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Look each key up among the pairs before it, passing over noise."""
        del world
        return look_up(inputs, self._ordinary)

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name keys, values, noise and the copy token."""
        n = self._ordinary
        copy = n + self.noise_vocab_size
        return ["key" if t < n // 2 else "value" if t < n else "noise" if t < copy else "copy" for t in inputs.tolist()]
