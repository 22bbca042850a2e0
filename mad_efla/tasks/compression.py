"""Compression: random tokens, read into one vector; say each of them again from that vector alone.

    t1 t2 t3 t4 C  ->  t1 t2 t3 t4 C

The autoencoder keeps nothing of a sequence but its last vector, at C, so what is scored is how much
a mixer can put there.

Letters: tokens [0, V - 1), independent and uniform; the compression token C = V - 1 ends every
sequence. All L positions are scored, C among them, in training as in test.

Source: Poli et al. 2024, arXiv 2403.17844, section 4 and appendix B. No departure.
"""

from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mad_efla.tasks import Examples, Split, Task, token_type


class Compression(Task):
    """Compression of a sequence into one vector.

    Attributes:
        vocab_size: Token ids in all, the compression token included.
        seq_len: Tokens the model sees, the compression token included.
    """

    backbone: ClassVar[str] = "autoencoder"

    name: Literal["compression"] = "compression"
    vocab_size: int = Field(16, le=30_000)
    seq_len: int = Field(32, le=1_000_000)

    @model_validator(mode="after")
    def _check(self) -> "Compression":
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 3: two tokens and the compression token")
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2: a token and the compression token")
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
        inputs = np.full((n, self.seq_len), self.vocab_size - 1, token_type(self.vocab_size))
        inputs[:, :-1] = rng.integers(0, self.vocab_size - 1, (n, self.seq_len - 1), inputs.dtype)
        return Examples(inputs, inputs.copy())

    def solve(self, inputs: Int[np.ndarray, "L"], world: Any) -> Int[np.ndarray, "L"]:
        """Say every token again."""
        del world
        return inputs.astype(np.int64)

    def describe(self, inputs: Int[np.ndarray, "L"]) -> list[str]:
        """Name tokens and the compression token."""
        return ["compress" if t == self.vocab_size - 1 else "token" for t in inputs.tolist()]
