"""A short causal convolution, one token at a time: the definition that others have to meet.

    y_t = activation(bias + sum_j weight[:, j] x_{t-K+1+j}),  j in 0..K-1

Each of the D channels has its own K taps; the last tap is the present token. The state is the last
K-1 inputs, zeros before the first token.

Source: arXiv 2312.00752, the convolution before the state space.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from mad_kernels.checks import working_dtype


def short_conv_token(
    x: Float[Tensor, "B D"],
    weight: Float[Tensor, "D K"],
    bias: Float[Tensor, " D"] | None,
    activation: str | None,
    state: Float[Tensor, "B D K-1"],
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D K-1"]]:
    """Convolve one token with the ones before it.

    Returns:
        The output and the next state, both in the dtype of `x`.
    """
    wide = working_dtype(x)
    window = torch.cat([state.to(x.dtype), x[..., None]], dim=-1)
    y = (window.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)
    return (silu(y) if activation == "silu" else y).to(x.dtype), window[..., 1:]


def short_conv_reference(
    x: Float[Tensor, "B L D"],
    weight: Float[Tensor, "D K"],
    bias: Float[Tensor, " D"] | None,
    activation: str | None,
    state: Float[Tensor, "B D K-1"],
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B D K-1"]]:
    """Apply `short_conv_token` to every token in turn."""
    outputs, state = [], state.to(x.dtype)
    for t in range(x.shape[1]):
        y_t, state = short_conv_token(x[:, t], weight, bias, activation, state)
        outputs.append(y_t)
    return (torch.stack(outputs, dim=1) if outputs else x.clone()), state
