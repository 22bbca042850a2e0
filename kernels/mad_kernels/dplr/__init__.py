"""Linear recurrences with a decay per key channel and a rank-one correction; see `operator`."""

from mad_kernels.dplr.operator import dplr, dplr_step

__all__ = ["dplr", "dplr_step"]
