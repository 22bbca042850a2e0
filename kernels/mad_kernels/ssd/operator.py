"""Mamba-2's state space: arguments checked, backend chosen, operator called.

    S_t = exp(dt_t a) S_{t-1} + dt_t b_t x_t^T
    y_t = S_t^T c_t

Legend: P head width, G groups of H/G neighbouring heads that share b and c, N state width.
"""

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors
from mad_kernels.dispatch import run_backend
from mad_kernels.ssd.as_delta_rule import ssd_chunked, ssd_compiled, ssd_triton
from mad_kernels.ssd.reference import ssd_reference, ssd_token

BACKENDS = {"chunked": ssd_chunked, "numba": ssd_compiled, "reference": ssd_reference, "triton": ssd_triton}


def ssd(
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "B L G N"],
    c: Float[Tensor, "B L G N"],
    *,
    initial_state: Float[Tensor, "B H N P"] | None = None,
    output_final_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H N P"] | None]:
    """Run Mamba-2's state space over L tokens; no skip term, no gate, no softplus on dt.

    Args:
        x: Inputs.
        dt: Step sizes, at least 0.
        a: Decay rates, below 0.
        b: Input directions; G divides H.
        c: Output directions; G divides H.
        initial_state: State before the first token; None is zero.
        output_final_state: Whether to hand back the state after the last token.
        chunk: Tokens per chunk, for the chunked backend, or between kept states, for numba; None
            takes the table's length.
        backend: "chunked", "numba" (CPU), "triton" (GPU), "reference" or "auto", see
            `mad_kernels.dispatch`.

    Returns:
        Outputs in the dtype of `x`, and the final state in float32 (float64 for float64) or None.
        Only the reference has gradients of second order.

    Raises:
        ValueError: If shapes, dtypes, devices, groups, `chunk` or `backend` do not fit.
    """
    given = {
        "x": (x, "B L H P"),
        "dt": (dt, "B L H"),
        "a": (a, "H"),
        "b": (b, "B L G N"),
        "c": (c, "B L G N"),
        "initial_state": (initial_state, "B H N P"),
    }
    sizes = check_tensors("ssd", given)
    _check_groups("ssd", sizes)
    options = {"like": "x", "widths": "N P", "chunk": chunk}
    y, final = run_backend("ssd", BACKENDS, backend, given, sizes, **options)
    return y, final if output_final_state else None


def ssd_step(
    x_t: Float[Tensor, "B H P"],
    dt_t: Float[Tensor, "B H"],
    a: Float[Tensor, " H"],
    b_t: Float[Tensor, "B G N"],
    c_t: Float[Tensor, "B G N"],
    state: Float[Tensor, "B H N P"],
) -> tuple[Float[Tensor, "B H P"], Float[Tensor, "B H N P"]]:
    """Take one token of `ssd`, for decoding.

    Returns:
        The token's output in the dtype of `x_t`, and the next state.

    Raises:
        ValueError: If shapes, dtypes, devices or groups do not fit.
    """
    sizes = check_tensors(
        "ssd_step",
        {
            "x_t": (x_t, "B H P"),
            "dt_t": (dt_t, "B H"),
            "a": (a, "H"),
            "b_t": (b_t, "B G N"),
            "c_t": (c_t, "B G N"),
            "state": (state, "B H N P"),
        },
    )
    _check_groups("ssd_step", sizes)
    return ssd_token(x_t, dt_t, a, b_t, c_t, state)


def _check_groups(operator: str, sizes: dict[str, int]) -> None:
    if sizes["G"] < 1 or sizes["H"] % sizes["G"]:
        raise ValueError(
            f"{operator}: b has G={sizes['G']} groups, which must divide H={sizes['H']} heads: "
            f"pass one group, or one per head"
        )
