"""Mamba's selective scan: arguments checked, backend chosen, operator called.

    S_t[d, n] = exp(dt_t[d] a[d, n]) S_{t-1}[d, n] + dt_t[d] x_t[d] b_t[n]
    y_t[d]    = sum_n c_t[n] S_t[d, n]

Legend: D channels, N state width.
"""

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors
from mad_kernels.dispatch import run_backend
from mad_kernels.selective_scan.compiled import selective_scan_compiled
from mad_kernels.selective_scan.reference import selective_scan_reference, selective_scan_token


def _triton(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    from mad_kernels.selective_scan.triton import selective_scan_triton  # triton only where it is used

    return selective_scan_triton(*tensors)


BACKENDS = {"reference": selective_scan_reference, "numba": selective_scan_compiled, "triton": _triton}


def selective_scan(
    x: Float[Tensor, "B L D"],
    dt: Float[Tensor, "B L D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "B L N"],
    c: Float[Tensor, "B L N"],
    *,
    initial_state: Float[Tensor, "B D N"] | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B D N"] | None]:
    """Run Mamba's selective scan over L tokens; no skip term, no gate, no softplus on dt.

    Args:
        x: Inputs.
        dt: Step sizes, at least 0.
        a: Decay rates, below 0.
        b: Input directions, shared by all channels.
        c: Output directions, shared by all channels.
        initial_state: State before the first token; None is zero.
        output_final_state: Whether to hand back the state after the last token.
        backend: "numba" (CPU), "triton" (GPU), "reference" or "auto", see `mad_kernels.dispatch`.

    Returns:
        Outputs in the dtype of `x`, and the final state in float32 (float64 for float64) or None.
        Only the reference has gradients of second order.

    Raises:
        ValueError: If shapes, dtypes, devices or `backend` do not fit.
    """
    given = {
        "x": (x, "B L D"),
        "dt": (dt, "B L D"),
        "a": (a, "D N"),
        "b": (b, "B L N"),
        "c": (c, "B L N"),
        "initial_state": (initial_state, "B D N"),
    }
    sizes = check_tensors("selective_scan", given)
    y, final = run_backend("selective_scan", BACKENDS, backend, given, sizes, like="x", widths="N")
    return y, final if output_final_state else None


def selective_scan_step(
    x_t: Float[Tensor, "B D"],
    dt_t: Float[Tensor, "B D"],
    a: Float[Tensor, "D N"],
    b_t: Float[Tensor, "B N"],
    c_t: Float[Tensor, "B N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D N"]]:
    """Take one token of `selective_scan`, for decoding.

    Returns:
        The token's output in the dtype of `x_t`, and the next state.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    check_tensors(
        "selective_scan_step",
        {
            "x_t": (x_t, "B D"),
            "dt_t": (dt_t, "B D"),
            "a": (a, "D N"),
            "b_t": (b_t, "B N"),
            "c_t": (c_t, "B N"),
            "state": (state, "B D N"),
        },
    )
    return selective_scan_token(x_t, dt_t, a, b_t, c_t, state)
