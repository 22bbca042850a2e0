"""A short causal convolution on a GPU: one launch each way, one program per tokens and channels.

    line = [state, x]    z_t = bias + sum_j weight[:, j] line_{t+j},  j in 0..K-1    y = act(z)

    d line_m = sum_j weight[:, j] dz_{m-j}       d weight[:, j] = sum_t dz_t line_{t+j}

The backward computes z again wherever it needs the slope of the activation, so it keeps only the
inputs. Gradients of weight and bias sum over tokens and sequences: each program writes its own
share in float32, and the shares are added in a fixed order afterwards. No atomics: equal inputs
give equal bits. Sums are float32 throughout.

Legend: D channels, K taps, W sets of taps: sequences share one in blocks of B/W, which is how
stacked calls bring each their own; m a place in line, K-1 places longer than x.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mad_kernels.blocks import readable, writable
from mad_kernels.custom_ops import with_gradients

# Fixed, so that no run depends on a timing.
TOKENS, CHANNELS, WARPS = 32, 64, 4


def short_conv_triton(
    x: Float[Tensor, "B L D"],
    weight: Float[Tensor, "D K"],
    bias: Float[Tensor, " D"] | None,
    activation: str | None,
    state: Float[Tensor, "B D K-1"],
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B D K-1"]]:
    """Convolve all tokens on a GPU; arguments as in `short_conv`, already checked."""
    shared = None if bias is None else bias[None]
    return _run(x, weight[None], shared, state, activation == "silu")


@no_type_check
def _forward(x, weight, bias, state, silu):
    (B, L, D), (W, _, K) = x.shape, weight.shape
    y = writable(x, B, L, D, dtype=x.dtype)
    first = max(0, L - (K - 1))
    final = torch.cat([state.to(x.dtype), x[:, first:].mT], dim=2)
    final = final[:, :, final.shape[2] - (K - 1) :].clone(memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y.to(x.dtype), final
    with torch.cuda.device_of(x):
        forward_kernel[_grid(B, L, D)](
            *(readable(z, x) for z in (x, weight, bias, state)),
            *(y, B // W, L, D, K),
            BIAS=bias is not None,
            SILU=silu,
            BT=TOKENS,
            BD=CHANNELS,
            num_warps=WARPS,
        )
    return y.to(x.dtype), final


@no_type_check  # sizes are symbols while torch.compile traces
def _allocate(x, weight, bias, state, silu):
    return x.new_empty(x.shape), x.new_empty(state.shape)


@no_type_check
def _backward(x, weight, bias, state, d_y, d_final, silu):
    (B, L, D), (W, _, K) = x.shape, weight.shape
    exact = torch.float32 if d_final is not None else None  # where more is added to it
    d_x, d_state = (writable(x, *z.shape, dtype=exact or z.dtype) for z in (x, state))
    grid = _grid(B, L + K - 1, D)
    d_weight, d_bias = writable(x, B, grid[1], D, K), writable(x, B, grid[1], D)
    if d_y is None or x.numel() == 0:
        d_x, d_state, d_weight, d_bias = (z.zero_() for z in (d_x, d_state, d_weight, d_bias))
    else:
        with torch.cuda.device_of(x):
            backward_kernel[grid](
                *(readable(z, x) for z in (x, weight, bias, state, d_y)),
                *(d_x, d_weight, d_bias, d_state, B // W, L, D, K),
                BIAS=bias is not None,
                SILU=silu,
                BT=TOKENS,
                BD=CHANNELS,
                num_warps=WARPS,
            )
    if d_final is not None:  # the last K-1 places of line
        kept = min(L, K - 1)
        d_x[:, L - kept :] += d_final[:, :, K - 1 - kept :].mT
        d_state[:, :, L:] += d_final[:, :, : max(0, K - 1 - L)]
    d_weight, d_bias = (z.unflatten(0, (W, B // W)).sum((1, 2)) for z in (d_weight, d_bias))
    d_bias = x.new_empty(B, 0) if bias is None else d_bias.to(bias.dtype)
    return d_x.to(x.dtype), d_weight.to(weight.dtype), d_bias, d_state.to(state.dtype)


_run = with_gradients(
    *("short_conv", "triton", "x weight bias? state", "bool silu"),
    forward=_forward,
    backward=_backward,
    allocate=_allocate,
)


@no_type_check
def _grid(B, places, D):
    return B, triton.cdiv(places, TOKENS), triton.cdiv(D, CHANNELS)


@triton.jit(do_not_specialize=["share", "L"])
@no_type_check
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    y_ptr,
    share,
    L,
    D: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Fill y."""
    sequence = tl.program_id(0).to(tl.int64)
    t, d = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(2) * BD + tl.arange(0, BD)
    taps = sequence // share * D + d
    z = convolved(x_ptr, weight_ptr, bias_ptr, state_ptr, sequence, t, d, taps, L, D, K, BIAS, BT, BD)
    if SILU:
        z *= tl.sigmoid(z)
    within = (t[:, None] < L) & (d[None, :] < D)
    at = (sequence * L + t)[:, None] * D + d[None, :]
    tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["share", "L"])
@no_type_check
def backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    d_y_ptr,
    d_x_ptr,
    d_weight_ptr,
    d_bias_ptr,
    d_state_ptr,
    share,
    L,
    D: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Fill d line, that is d state and d x, and this program's share of d weight and d bias."""
    sequence = tl.program_id(0).to(tl.int64)
    m, d = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(2) * BD + tl.arange(0, BD)
    taps = sequence // share * D + d
    own = (sequence * tl.num_programs(1) + tl.program_id(1)) * D + d
    d_line = tl.zeros((BT, BD), tl.float32)
    for j in range(K):
        t = m - j
        within = (t[:, None] >= 0) & (t[:, None] < L) & (d[None, :] < D)
        at = (sequence * L + t)[:, None] * D + d[None, :]
        dz = tl.load(d_y_ptr + at, mask=within, other=0.0).to(tl.float32)
        if SILU:
            z = convolved(x_ptr, weight_ptr, bias_ptr, state_ptr, sequence, t, d, taps, L, D, K, BIAS, BT, BD)
            s = tl.sigmoid(z)
            dz *= s * (1 + z * (1 - s))
        w = tl.load(weight_ptr + taps * K + j, mask=d < D, other=0.0).to(tl.float32)
        d_line += dz * w[None, :]
        if j == 0:
            tl.store(d_bias_ptr + own, tl.sum(dz, axis=0), mask=d < D)
            for i in range(K):
                line = load_line(x_ptr, state_ptr, sequence, m + i, d, L, D, K)
                tl.store(d_weight_ptr + own * K + i, tl.sum(dz * line, axis=0), mask=d < D)
    at = (sequence * L + m - (K - 1))[:, None] * D + d[None, :]
    within = (m[:, None] >= K - 1) & (m[:, None] < L + K - 1) & (d[None, :] < D)
    tl.store(d_x_ptr + at, d_line.to(d_x_ptr.dtype.element_ty), mask=within)
    at = (sequence * D + d)[None, :] * (K - 1) + m[:, None]
    within = (m[:, None] < K - 1) & (d[None, :] < D)
    tl.store(d_state_ptr + at, d_line.to(d_state_ptr.dtype.element_ty), mask=within)


@triton.jit
@no_type_check
def convolved(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    sequence,
    t,
    d,
    taps,
    L,
    D: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Give z of tokens t and channels d, float32."""
    z = tl.zeros((BT, BD), tl.float32)
    for j in range(K):
        w = tl.load(weight_ptr + taps * K + j, mask=d < D, other=0.0).to(tl.float32)
        z += load_line(x_ptr, state_ptr, sequence, t + j, d, L, D, K) * w[None, :]
    if BIAS:
        z += tl.load(bias_ptr + taps, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
@no_type_check
def load_line(x_ptr, state_ptr, sequence, m, d, L, D: tl.constexpr, K: tl.constexpr):
    """Load places m of line, float32; 0 outside."""
    t = m - (K - 1)
    in_x = (t[:, None] >= 0) & (t[:, None] < L) & (d[None, :] < D)
    at_x = (sequence * L + t)[:, None] * D + d[None, :]
    in_state = (m[:, None] >= 0) & (t[:, None] < 0) & (d[None, :] < D)
    at_state = (sequence * D + d)[None, :] * (K - 1) + m[:, None]
    before = tl.load(state_ptr + at_state, mask=in_state, other=0.0).to(tl.float32)
    return tl.load(x_ptr + at_x, mask=in_x, other=0.0).to(tl.float32) + before
