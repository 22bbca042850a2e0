"""Mamba's selective scan; see `operator`."""

from mad_kernels.selective_scan.operator import selective_scan, selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
