"""A short causal depthwise convolution: arguments checked, backend chosen, operator called.

    y_t = activation(bias + sum_j weight[:, j] x_{t-K+1+j}),  j in 0..K-1

Legend: D channels, K taps; the state is the last K-1 inputs.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors
from mad_kernels.dispatch import choose_backend, obstacle_to_triton
from mad_kernels.short_conv.fused import short_conv_fused
from mad_kernels.short_conv.reference import short_conv_reference, short_conv_token

BACKENDS = ("fused", "reference", "triton")


def short_conv(
    x: Float[Tensor, "B L D"],
    weight: Float[Tensor, "D K"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Float[Tensor, "B D K-1"] | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B D K-1"] | None]:
    """Convolve each channel with its own K taps, looking back only.

    Args:
        x: Inputs.
        weight: Taps; the last one meets the present token.
        bias: Added before the activation.
        activation: "silu" or None.
        initial_state: The K-1 inputs before the first token, oldest first; None is zeros.
        output_final_state: Whether to hand back the last K-1 inputs.
        backend: "fused", "triton" (GPU), "reference" or "auto", see `mad_kernels.dispatch`.

    Returns:
        Outputs and the last K-1 inputs or None, both in the dtype of `x`.

    Raises:
        ValueError: If shapes, dtypes, devices, `activation` or `backend` do not fit.
    """
    specification = {"x": (x, "B L D"), "weight": (weight, "D K"), "bias": (bias, "D")}
    sizes = check_tensors("short_conv", specification)
    before = sizes["K"] - 1
    _check_taps("short_conv", sizes["K"], activation)
    state = x.new_zeros(x.shape[0], sizes["D"], before) if initial_state is None else initial_state
    _check_state("short_conv", x, state, before)
    obstacle = obstacle_to_triton(x, otherwise="fused")
    automatic = "triton" if x.is_cuda and obstacle is None else "fused"
    options = {"automatic": automatic, "obstacle": obstacle}
    chosen = choose_backend("short_conv", backend, BACKENDS, **options)
    if chosen == "reference":
        y, final = short_conv_reference(x, weight, bias, activation, state)
    elif chosen == "triton":
        from mad_kernels.short_conv.triton import short_conv_triton  # triton only where it is used

        y, final = short_conv_triton(x, weight, bias, activation, state)
    else:
        y, final = short_conv_fused(x, weight, bias, activation, state)
    return y, final if output_final_state else None


def short_conv_step(
    x_t: Float[Tensor, "B D"],
    weight: Float[Tensor, "D K"],
    bias: Float[Tensor, " D"] | None,
    state: Float[Tensor, "B D K-1"],
    *,
    activation: Literal["silu"] | None = None,
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D K-1"]]:
    """Take one token of `short_conv`, for decoding.

    Returns:
        The token's output and the next state, both in the dtype of `x_t`.

    Raises:
        ValueError: If shapes, dtypes, devices or `activation` do not fit.
    """
    specification = {"x_t": (x_t, "B D"), "weight": (weight, "D K"), "bias": (bias, "D")}
    sizes = check_tensors("short_conv_step", specification)
    _check_taps("short_conv_step", sizes["K"], activation)
    _check_state("short_conv_step", x_t, state, sizes["K"] - 1)
    return short_conv_token(x_t, weight, bias, activation, state)


def _check_taps(operator: str, taps: int, activation: str | None) -> None:
    if taps < 1:
        raise ValueError(f"{operator}: weight has K={taps} taps, at least 1 is needed: add one")
    if activation not in (None, "silu"):
        raise ValueError(
            f"{operator}: activation={activation!r} is not built in: take 'silu', or None and apply it to the output"
        )


def _check_state(operator: str, x: Tensor, state: Tensor, before: int) -> None:
    axes = "B L D" if x.dim() == 3 else "B D"
    check_tensors(operator, {"x": (x, axes), "state": (state, "B D (K-1)")})
    if state.shape[-1] != before:
        raise ValueError(
            f"{operator}: state keeps {state.shape[-1]} inputs, but K={before + 1} taps look back "
            f"on {before}: pass [B D {before}]"
        )
