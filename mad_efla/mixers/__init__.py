"""Sequence mixers: `(B, L, D) -> (B, L, D)`, causal. One file each; its name is the file's name.

What every mixer promises, and one test battery holds:

- the shape is kept, outputs depend on no later token and on no other row of the batch;
- every parameter gets a finite gradient, and the mixer's own initialisation is what it trains from;
- `step` fed token by token from `initial_state` gives what `forward` gives at once;
- `state_size` is the number of values `step` carries from one token to the next.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad_efla.config import Section

State = tuple[Tensor, ...]
"""What a mixer carries between tokens; the first axis of every tensor is the batch."""


class MixerConfig(Section):
    """The fields of a mixer; `name` says which."""

    name: str


ConfigT = TypeVar("ConfigT", bound=MixerConfig)


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weight follows the input's dtype: torch's own warns where the two differ."""

    def forward(self, x: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes D"]:
        """Normalise the last axis."""
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Mixer(nn.Module, ABC, Generic[ConfigT]):
    """A causal sequence mixer.

    Args:
        d_model: Width of the model, D.
        config: The mixer's fields.

    Class attributes:
        Config: The model of its fields.
    """

    Config: ClassVar[type[MixerConfig]]

    def __init__(self, d_model: int, config: ConfigT):
        super().__init__()
        self.d_model = d_model
        self.config = config

    @abstractmethod
    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L."""

    @abstractmethod
    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return the state before the first token."""

    @abstractmethod
    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token."""

    def state_size(self, seq_len: int) -> int:
        """Count the numbers carried to token `seq_len`, convolution included.

        Mixers whose state grows with the sequence override this.
        """
        del seq_len
        return sum(s.numel() for s in self.initial_state(1, torch.device("meta")))
