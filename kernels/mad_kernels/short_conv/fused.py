"""A short causal convolution in one library call each way, with its own backward.

    z_t = bias + sum_j weight[:, j] x_{t-K+1+j},  j in 0..K-1        y = activation(z)
    dx_t = sum_j weight[:, j] dz_{t+K-1-j}        d weight[:, j] = sum_t dz_t x_{t-K+1+j}

`[B L D]` is, seen as an image of height 1 and width L, the channels-last layout: the library's
depthwise kernel for it reads x once, where conv1d transposes it and a sum of shifted products reads
it K times. dx is the same kernel on the taps in reverse; only d weight is a sum of products, since
the library's own takes three to four times as long in bfloat16, and no less in float32.

Source: arXiv 2312.00752, the convolution before the state space.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, pad, silu


def short_conv_fused(
    x: Float[Tensor, "B L D"],
    weight: Float[Tensor, "D K"],
    bias: Float[Tensor, " D"] | None,
    activation: str | None,
    state: Float[Tensor, "B D K-1"],
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B D K-1"]]:
    """Convolve all tokens at once; arguments as in `short_conv`, already checked."""
    line = torch.cat([state.to(x.dtype).mT, x], dim=1)
    final = line[:, x.shape[1] :].mT
    if x.numel() == 0:  # the library refuses an image without pixels
        return x.clone(), final
    return _ShortConv.apply(line, weight, bias, activation == "silu"), final


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, line, weight, bias, activate):
        z = _convolve(line, weight.to(line.dtype), None if bias is None else bias.to(line.dtype))
        ctx.activate = activate
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(line, weight, z if activate else None)
        return silu(z) if activate else z

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        line, weight, z = ctx.saved_tensors
        dz = torch.ops.aten.silu_backward(dy, z) if ctx.activate else dy
        L, K = dz.shape[1], weight.shape[1]
        d_line = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_line = _convolve(pad(dz, (0, 0, K - 1, K - 1)), weight.flip(-1).to(dz.dtype), None)
        if ctx.needs_input_grad[1]:
            taps = [(dz * line[:, j : j + L]).sum((0, 1)) for j in range(K)]
            d_weight = torch.stack(taps, dim=1).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = dz.sum((0, 1)).to(ctx.bias_dtype)
        return d_line, d_weight, d_bias, None


def _convolve(line: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(line.device.type, enabled=False):
        image = line.mT[:, :, None]
        return conv2d(image, taps[:, None, None], bias, groups=taps.shape[0]).squeeze(2).mT
