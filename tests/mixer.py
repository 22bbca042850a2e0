"""A mixer on its own, for tests."""

import torch

from mad_efla import plugins
from mad_efla.contract import B, L, MixerUnderTest

__all__ = ["B", "D", "L", "example", "make", "subject"]

D = 32


def subject(name, fields, width=D) -> MixerUnderTest:
    """Name a mixer to be built."""
    found = plugins.mixer(name)
    return MixerUnderTest(found, found.Config(**{"name": name, **fields}), width)


def make(name, fields, d_model=D, dtype=torch.float64, seed=0):
    """Build a mixer."""
    return subject(name, fields, d_model).build(dtype, seed)


def example(seed=1, dtype=torch.float64):
    """Draw an input, `[B, L, D]`."""
    return subject("identity", {}).example(seed, dtype)
