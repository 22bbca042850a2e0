"""A short causal depthwise convolution: arguments checked, backend chosen, operator called.

    y_t = activation(bias + sum_j weight[:, j] x_{t-K+1+j}),  j in 0..K-1

Legend: D channels, K taps; the state is the last K-1 inputs.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors
from mad_kernels.dispatch import choose_backend, obstacle_to_triton
from mad_kernels.memory import check_in_memory, in_memory
from mad_kernels.short_conv.compiled import short_conv_compiled
from mad_kernels.short_conv.fused import short_conv_fused
from mad_kernels.short_conv.reference import short_conv_reference, short_conv_token

BACKENDS = ("fused", "numba", "reference", "triton")


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
        backend: "numba" (CPU), "fused", "triton" (GPU), "reference" or "auto", see
            `mad_kernels.dispatch`.

    Returns:
        Outputs and the last K-1 inputs or None, both in the dtype of `x`.

    Raises:
        ValueError: If shapes, dtypes, devices, `activation` or `backend` do not fit.
    """
    D = x.shape[-1]
    (y,), final = _convolve(x, weight, bias, activation, initial_state, (D,), x.dtype, output_final_state, backend)
    return y, final


def short_conv_split(
    x: Float[Tensor, "B L D"],
    weight: Float[Tensor, "D K"],
    bias: Float[Tensor, " D"] | None,
    widths: Sequence[int],
    *,
    activation: Literal["silu"] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L _"], ...]:
    """Convolve from an empty state, and cut the channels into parts, see `short_conv`.

    Args:
        x: Inputs.
        weight: Taps; the last one meets the present token.
        bias: Added before the activation.
        widths: Channels of each part; together D.
        activation: "silu" or None.
        dtype: Of the parts; None is that of `x`.
        backend: As of `short_conv`.

    Returns:
        The parts, in the order of the channels.

    Raises:
        ValueError: If `widths` do not add up to D, or anything of `short_conv` does not fit.
    """
    if sum(widths) != x.shape[-1] or min(widths, default=0) < 1:
        raise ValueError(
            f"short_conv: widths={tuple(widths)} must be positive and add up to D={x.shape[-1]}: "
            f"cut the channels that there are"
        )
    dtype = dtype or x.dtype
    return _convolve(x, weight, bias, activation, None, widths, dtype, False, backend)[0]


def _convolve(
    x, weight, bias, activation, initial_state, widths, dtype, output_final_state, backend
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    specification = {"x": (x, "B L D"), "weight": (weight, "D K"), "bias": (bias, "D")}
    sizes = check_tensors("short_conv", specification)
    before = sizes["K"] - 1
    _check_taps("short_conv", sizes["K"], activation)
    state = x.new_zeros(x.shape[0], sizes["D"], before) if initial_state is None else initial_state
    _check_state("short_conv", x, state, before)
    obstacle = obstacle_to_triton(x, otherwise="fused")
    automatic = "numba" if in_memory(x, weight, bias, state) else "fused"
    if x.is_cuda and obstacle is None:
        automatic = "triton"
    options = {"automatic": automatic, "like": x, "obstacle": obstacle}
    chosen = choose_backend("short_conv", backend, BACKENDS, **options)
    if chosen == "numba":
        check_in_memory("short_conv", x, weight, bias, state)
        parts = short_conv_compiled(x, weight, bias, activation, state, widths, dtype)
        final = _last_inputs(x, state) if output_final_state else None
        return parts, final
    if chosen == "reference":
        y, final = short_conv_reference(x, weight, bias, activation, state)
    elif chosen == "triton":
        from mad_kernels.short_conv.triton import short_conv_triton  # triton only where it is used

        y, final = short_conv_triton(x, weight, bias, activation, state)
    else:
        y, final = short_conv_fused(x, weight, bias, activation, state)
    return y.to(dtype).split(list(widths), dim=-1), final if output_final_state else None


def _last_inputs(x: Tensor, state: Tensor) -> Tensor:
    """Return the last K-1 inputs, of the state where x has fewer."""
    before = state.shape[-1]
    recent = x[:, max(0, x.shape[1] - before) :].mT
    return torch.cat([state.to(x.dtype), recent], dim=-1)[..., recent.shape[-1] :]


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
