"""The delta rule with separate erase and write: arguments checked, backend chosen, operator called.

S_t = exp(log_decay_t) (I - erase_t k_t k_t^T) S_{t-1} + write_t k_t v_t^T
o_t = S_t^T q_t
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors
from mad_kernels.delta_rule.chunked import delta_rule_chunked
from mad_kernels.delta_rule.compiled import delta_rule_compiled
from mad_kernels.delta_rule.reference import delta_rule_reference, delta_rule_token
from mad_kernels.dispatch import run_backend


def _triton(*tensors: Any) -> tuple[Tensor, Tensor]:
    from mad_kernels.delta_rule.triton import delta_rule_triton  # triton only where it is used

    return delta_rule_triton(*tensors)


BACKENDS = {
    "chunked": delta_rule_chunked,
    "numba": delta_rule_compiled,
    "reference": delta_rule_reference,
    "triton": _triton,
}


def delta_rule(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    erase: Float[Tensor, "B L H"],
    write: Float[Tensor, "B L H"],
    log_decay: Float[Tensor, "B L H"] | None = None,
    *,
    initial_state: Float[Tensor, "B H Dk Dv"] | None = None,
    output_final_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"] | None]:
    """Run the delta rule over L tokens, on keys as given and queries unscaled.

    Args:
        q: Queries.
        k: Keys; neither normalised nor scaled here.
        v: Values.
        erase: Share of the old value under `k_t` that is taken out, stable while erase |k|^2 is in
            [0, 2].
        write: Weight of the new value.
        log_decay: Log of the factor on the old state, at most 0; None keeps the state whole.
        initial_state: State before the first token; None is zero.
        output_final_state: Whether to hand back the state after the last token.
        chunk: Tokens per chunk, for the chunked backend, or between kept states, for numba; None
            takes the table's length.
        backend: "chunked", "numba" (CPU), "triton" (GPU), "reference" or "auto", see
            `mad_kernels.dispatch`.

    Returns:
        Outputs in the dtype of `v`, and the final state in float32 (float64 for float64) or None.
        Sums, gates and states are float32 for bfloat16 inputs. Only the reference has gradients
        of second order.

    Raises:
        ValueError: If shapes, dtypes, devices, `chunk` or `backend` do not fit.
    """
    given = {
        "q": (q, "B L H Dk"),
        "k": (k, "B L H Dk"),
        "v": (v, "B L H Dv"),
        "erase": (erase, "B L H"),
        "write": (write, "B L H"),
        "log_decay": (log_decay, "B L H"),
        "initial_state": (initial_state, "B H Dk Dv"),
    }
    sizes = check_tensors("delta_rule", given)
    options = {"like": "v", "widths": "Dk Dv", "chunk": chunk}
    o, final = run_backend("delta_rule", BACKENDS, backend, given, sizes, **options)
    return o, final if output_final_state else None


def delta_rule_step(
    q_t: Float[Tensor, "B H Dk"],
    k_t: Float[Tensor, "B H Dk"],
    v_t: Float[Tensor, "B H Dv"],
    erase_t: Float[Tensor, "B H"],
    write_t: Float[Tensor, "B H"],
    log_decay_t: Float[Tensor, "B H"] | None,
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Take one token of `delta_rule`, for decoding.

    Returns:
        The token's output in the dtype of `v_t`, and the next state.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    check_tensors(
        "delta_rule_step",
        {
            "q_t": (q_t, "B H Dk"),
            "k_t": (k_t, "B H Dk"),
            "v_t": (v_t, "B H Dv"),
            "erase_t": (erase_t, "B H"),
            "write_t": (write_t, "B H"),
            "log_decay_t": (log_decay_t, "B H"),
            "state": (state, "B H Dk Dv"),
        },
    )
    return delta_rule_token(q_t, k_t, v_t, erase_t, write_t, log_decay_t, state)
