"""Identity: nothing passes between tokens. The floor that every mixer has to leave.

    y_t = x_t

The residual stream becomes x + norm(x), and the model a map of each token alone: what it scores is
what a task gives away without memory.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mad_efla.mixers import Mixer, MixerConfig, State


class Identity(Mixer):
    """No mixing; no parameters and no state."""

    class Config(MixerConfig):
        """Identity has no fields."""

        name: Literal["identity"] = "identity"

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return the input."""
        return x

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return no state."""
        return ()

    def mixing_flops(self, seq_len: int) -> int:
        """Count nothing."""
        return 0

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Return the token."""
        return x, ()
