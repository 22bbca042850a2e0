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
from torch.nn.functional import conv2d, pad, silu

from mad_kernels.custom_ops import first_order_only


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
    z = _ShortConv.apply(line, weight, bias)
    return silu(z) if activation == "silu" else z, final


def _backward(line, weight, bias, dz):
    L, K = dz.shape[1], weight.shape[1]
    d_line = _convolve(pad(dz, (0, 0, K - 1, K - 1)), weight.flip(-1).to(dz.dtype), None)
    taps = [(dz * line[:, j : j + L]).sum((0, 1)) for j in range(K)]
    d_weight = torch.stack(taps, dim=1).to(weight.dtype)
    return d_line, d_weight, None if bias is None else dz.sum((0, 1)).to(bias.dtype)


_pull = first_order_only(_backward, "short_conv")


class _ShortConv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(line, weight, bias):
        return _convolve(line, weight.to(line.dtype), None if bias is None else bias.to(line.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dz):
        return _pull(*ctx.saved_tensors, dz)


def _convolve(line: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(line.device.type, enabled=False):
        image = line.mT[:, :, None]
        return conv2d(image, taps[:, None, None], bias, groups=taps.shape[0]).squeeze(2).mT
