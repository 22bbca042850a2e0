"""Mamba's selective scan: arguments checked, backend chosen, operator called.

    S_t[d, n] = exp(dt_t[d] a[d, n]) S_{t-1}[d, n] + dt_t[d] x_t[d] b_t[n]
    y_t[d]    = sum_n c_t[n] S_t[d, n]

Legend: D channels, N state width.
"""

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors, working_dtype
from mad_kernels.dispatch import choose_backend, obstacle_to_triton, runs_compiled_loops
from mad_kernels.selective_scan.compiled import selective_scan_compiled
from mad_kernels.selective_scan.reference import selective_scan_reference, selective_scan_token

BACKENDS = ("numba", "reference", "triton")


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
    sizes = check_tensors(
        "selective_scan",
        {
            "x": (x, "B L D"),
            "dt": (dt, "B L D"),
            "a": (a, "D N"),
            "b": (b, "B L N"),
            "c": (c, "B L N"),
            "initial_state": (initial_state, "B D N"),
        },
    )
    automatic = "numba" if runs_compiled_loops(x) else "reference"
    obstacle = obstacle_to_triton(x, sizes["N"], otherwise="reference")
    if x.is_cuda and obstacle is None:
        automatic = "triton"
    options = {"automatic": automatic, "like": x, "obstacle": obstacle}
    chosen = choose_backend("selective_scan", backend, BACKENDS, **options)
    state = initial_state
    if state is None:
        shape = [sizes[axis] for axis in ("B", "D", "N")]
        state = x.new_zeros(shape, dtype=working_dtype(x))
    if chosen == "reference":
        y, final = selective_scan_reference(x, dt, a, b, c, state)
    elif chosen == "triton":
        from mad_kernels.selective_scan.triton import selective_scan_triton  # only where it is used

        y, final = selective_scan_triton(x, dt, a, b, c, state)
    else:
        y, final = selective_scan_compiled(x, dt, a, b, c, state)
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
