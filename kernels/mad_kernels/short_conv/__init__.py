"""A short causal depthwise convolution; see `operator`."""

from mad_kernels.short_conv.operator import short_conv, short_conv_split, short_conv_step

__all__ = ["short_conv", "short_conv_split", "short_conv_step"]
