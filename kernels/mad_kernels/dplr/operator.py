"""Diagonal plus low rank: arguments checked, backend chosen, operator called.

S_t = diag(exp(log_decay_t)) S_{t-1} + a_t (b_t^T S_{t-1}) + k_t v_t^T
o_t = S_t^T q_t
"""

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors
from mad_kernels.dispatch import run_backend
from mad_kernels.dplr.chunked import dplr_chunked
from mad_kernels.dplr.compiled import dplr_compiled
from mad_kernels.dplr.reference import dplr_reference, dplr_token

BACKENDS = {"chunked": dplr_chunked, "numba": dplr_compiled, "reference": dplr_reference}


def dplr(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    log_decay: Float[Tensor, "B L H Dk"],
    a: Float[Tensor, "B L H Dk"] | None = None,
    b: Float[Tensor, "B L H Dk"] | None = None,
    *,
    initial_state: Float[Tensor, "B H Dk Dv"] | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"] | None]:
    """Run the recurrence over L tokens, on keys as given and queries unscaled.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        log_decay: Log of the factor on each row of the old state, at most 0.
        a: Where to add what `b` has read. Stability is the caller's: with unit `b` and
            a = -rate * b, rate in [0, 1], no state grows.
        b: What to read from the state before it decays. Both None: gated linear attention.
        initial_state: State before the first token; None is zero.
        output_final_state: Whether to hand back the state after the last token.
        backend: "chunked", "numba" (CPU), "reference" or "auto", see `mad_kernels.dispatch`.

    Returns:
        Outputs in the dtype of `v`, and the final state in float32 (float64 for float64) or None.
        Sums, factors and states are float32 for bfloat16 inputs. The numba backend has first-order
        gradients only.

    Raises:
        ValueError: If shapes, dtypes, devices or `backend` do not fit, or only one of `a` and `b`
            is given.
    """
    axes = "B L H Dk"
    given = {
        "q": (q, axes),
        "k": (k, axes),
        "v": (v, "B L H Dv"),
        "log_decay": (log_decay, axes),
        "a": (a, axes),
        "b": (b, axes),
        "initial_state": (initial_state, "B H Dk Dv"),
    }
    sizes = check_tensors("dplr", given)
    _check_pair("dplr", a, b)
    o, final = run_backend("dplr", BACKENDS, backend, given, sizes, like="v")
    return o, final if output_final_state else None


def dplr_step(
    q_t: Float[Tensor, "B H Dk"],
    k_t: Float[Tensor, "B H Dk"],
    v_t: Float[Tensor, "B H Dv"],
    log_decay_t: Float[Tensor, "B H Dk"],
    a_t: Float[Tensor, "B H Dk"] | None,
    b_t: Float[Tensor, "B H Dk"] | None,
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Take one token of `dplr`, for decoding.

    Returns:
        The token's output in the dtype of `v_t`, and the next state.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or only one of `a_t` and `b_t` is
            given.
    """
    check_tensors(
        "dplr_step",
        {
            "q_t": (q_t, "B H Dk"),
            "k_t": (k_t, "B H Dk"),
            "v_t": (v_t, "B H Dv"),
            "log_decay_t": (log_decay_t, "B H Dk"),
            "a_t": (a_t, "B H Dk"),
            "b_t": (b_t, "B H Dk"),
            "state": (state, "B H Dk Dv"),
        },
    )
    _check_pair("dplr_step", a_t, b_t)
    return dplr_token(q_t, k_t, v_t, log_decay_t, a_t, b_t, state)


def _check_pair(operator: str, a: Tensor | None, b: Tensor | None) -> None:
    if (a is None) != (b is None):
        given, missing = ("a", "b") if b is None else ("b", "a")
        raise ValueError(
            f"{operator}: {given} is given but {missing} is None: the correction a (b^T S) takes "
            f"both; give {missing} too, or neither"
        )
