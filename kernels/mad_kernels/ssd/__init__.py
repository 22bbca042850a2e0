"""Mamba-2's state space duality; see `operator`."""

from mad_kernels.ssd.operator import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]
