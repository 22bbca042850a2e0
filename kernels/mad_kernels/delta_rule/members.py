"""Members of the delta family: each computes its scalars and hands them to `delta_rule`.

    efla              S_t = (I - alpha k k^T) S + alpha k v^T, alpha |k|^2 = 1 - exp(-beta |k|^2)
    rk2, rk4          the same with 2 or 4 terms of alpha's series
    implicit          the same with alpha = beta / (1 + beta |k|^2), Longhorn
    kaczmarz          the same with alpha = beta / (|k|^2 + 1e-6)
    deltanet          the same with alpha = beta; normalise the keys first, as DeltaNet does
    gated_delta_rule  deltanet on exp(log_decay) S
    gated_efla        exact flow under a decay gate

Every one takes raw `q`, `k`, `v` of [B L H D], `beta` of [B L H], at least 0, and the options of
`delta_rule`; every one has a `_step` form that reads one token into a state.

Source: arXiv 2512.12602v4 Eq. 15 and 68, its v3 (rk2, rk4); arXiv 2407.14207, the implicit
online update; arXiv 2406.06484, the delta update rule; arXiv 2412.06464, the gated delta rule.
Departure: all but deltanet and gated_delta_rule run on unit keys, see `unit_keys`.
"""

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors
from mad_kernels.delta_rule.operator import delta_rule, delta_rule_step
from mad_kernels.delta_rule.unit_keys import gated_unit_key_form, unit_key_form


def efla(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    beta: Float[Tensor, "B L H"],
    *,
    initial_state: Float[Tensor, "B H Dk Dv"] | None = None,
    output_final_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"] | None]:
    """Run EFLA: the exact flow for a time beta, whatever the norm of the key."""
    _check("efla", k, beta)
    key, erase, write = unit_key_form(k, beta, "exact")
    return delta_rule(
        q,
        key,
        v,
        erase,
        write,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk=chunk,
        backend=backend,
    )


def efla_step(
    q_t: Float[Tensor, "B H Dk"],
    k_t: Float[Tensor, "B H Dk"],
    v_t: Float[Tensor, "B H Dv"],
    beta_t: Float[Tensor, "B H"],
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Take one token of `efla`, for decoding."""
    _check("efla_step", k_t, beta_t)
    key, erase, write = unit_key_form(k_t, beta_t, "exact")
    return delta_rule_step(q_t, key, v_t, erase, write, None, state)


def deltanet(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    beta: Float[Tensor, "B L H"],
    *,
    initial_state: Float[Tensor, "B H Dk Dv"] | None = None,
    output_final_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"] | None]:
    """Run the delta rule of DeltaNet, erase = write = beta, on keys as given."""
    return delta_rule(
        q,
        k,
        v,
        beta,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk=chunk,
        backend=backend,
    )


def deltanet_step(
    q_t: Float[Tensor, "B H Dk"],
    k_t: Float[Tensor, "B H Dk"],
    v_t: Float[Tensor, "B H Dv"],
    beta_t: Float[Tensor, "B H"],
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Take one token of `deltanet`, for decoding."""
    return delta_rule_step(q_t, k_t, v_t, beta_t, beta_t, None, state)


def rk2(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    beta: Float[Tensor, "B L H"],
    *,
    initial_state: Float[Tensor, "B H Dk Dv"] | None = None,
    output_final_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"] | None]:
    """Run the second-order Runge-Kutta step; it grows without bound for beta |k|^2 > 2."""
    _check("rk2", k, beta)
    key, erase, write = unit_key_form(k, beta, "rk2")
    return delta_rule(
        q,
        key,
        v,
        erase,
        write,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk=chunk,
        backend=backend,
    )


def rk2_step(
    q_t: Float[Tensor, "B H Dk"],
    k_t: Float[Tensor, "B H Dk"],
    v_t: Float[Tensor, "B H Dv"],
    beta_t: Float[Tensor, "B H"],
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Take one token of `rk2`, for decoding."""
    _check("rk2_step", k_t, beta_t)
    key, erase, write = unit_key_form(k_t, beta_t, "rk2")
    return delta_rule_step(q_t, key, v_t, erase, write, None, state)


def rk4(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    beta: Float[Tensor, "B L H"],
    *,
    initial_state: Float[Tensor, "B H Dk Dv"] | None = None,
    output_final_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"] | None]:
    """Run the fourth-order Runge-Kutta step; it grows without bound for beta |k|^2 > 2.785."""
    _check("rk4", k, beta)
    key, erase, write = unit_key_form(k, beta, "rk4")
    return delta_rule(
        q,
        key,
        v,
        erase,
        write,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk=chunk,
        backend=backend,
    )


def rk4_step(
    q_t: Float[Tensor, "B H Dk"],
    k_t: Float[Tensor, "B H Dk"],
    v_t: Float[Tensor, "B H Dv"],
    beta_t: Float[Tensor, "B H"],
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Take one token of `rk4`, for decoding."""
    _check("rk4_step", k_t, beta_t)
    key, erase, write = unit_key_form(k_t, beta_t, "rk4")
    return delta_rule_step(q_t, key, v_t, erase, write, None, state)


def implicit(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    beta: Float[Tensor, "B L H"],
    *,
    initial_state: Float[Tensor, "B H Dk Dv"] | None = None,
    output_final_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"] | None]:
    """Run the implicit Euler step of Longhorn; it never grows."""
    _check("implicit", k, beta)
    key, erase, write = unit_key_form(k, beta, "implicit")
    return delta_rule(
        q,
        key,
        v,
        erase,
        write,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk=chunk,
        backend=backend,
    )


def implicit_step(
    q_t: Float[Tensor, "B H Dk"],
    k_t: Float[Tensor, "B H Dk"],
    v_t: Float[Tensor, "B H Dv"],
    beta_t: Float[Tensor, "B H"],
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Take one token of `implicit`, for decoding."""
    _check("implicit_step", k_t, beta_t)
    key, erase, write = unit_key_form(k_t, beta_t, "implicit")
    return delta_rule_step(q_t, key, v_t, erase, write, None, state)


def kaczmarz(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    beta: Float[Tensor, "B L H"],
    *,
    initial_state: Float[Tensor, "B H Dk Dv"] | None = None,
    output_final_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"] | None]:
    """Run the Kaczmarz step: erase is beta at any norm of the key well above 1e-3."""
    _check("kaczmarz", k, beta)
    key, erase, write = unit_key_form(k, beta, "kaczmarz")
    return delta_rule(
        q,
        key,
        v,
        erase,
        write,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk=chunk,
        backend=backend,
    )


def kaczmarz_step(
    q_t: Float[Tensor, "B H Dk"],
    k_t: Float[Tensor, "B H Dk"],
    v_t: Float[Tensor, "B H Dv"],
    beta_t: Float[Tensor, "B H"],
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Take one token of `kaczmarz`, for decoding."""
    _check("kaczmarz_step", k_t, beta_t)
    key, erase, write = unit_key_form(k_t, beta_t, "kaczmarz")
    return delta_rule_step(q_t, key, v_t, erase, write, None, state)


def gated_delta_rule(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    beta: Float[Tensor, "B L H"],
    log_decay: Float[Tensor, "B L H"],
    *,
    initial_state: Float[Tensor, "B H Dk Dv"] | None = None,
    output_final_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"] | None]:
    """Run the rule of Gated DeltaNet, on keys as given.

    The state decays first, then beta erases and writes:
    `S_t = exp(log_decay) (I - beta k k^T) S + beta k v^T`.
    """
    return delta_rule(
        q,
        k,
        v,
        beta,
        beta,
        log_decay,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk=chunk,
        backend=backend,
    )


def gated_delta_rule_step(
    q_t: Float[Tensor, "B H Dk"],
    k_t: Float[Tensor, "B H Dk"],
    v_t: Float[Tensor, "B H Dv"],
    beta_t: Float[Tensor, "B H"],
    log_decay_t: Float[Tensor, "B H"],
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Take one token of `gated_delta_rule`, for decoding."""
    return delta_rule_step(q_t, k_t, v_t, beta_t, beta_t, log_decay_t, state)


def gated_efla(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    beta: Float[Tensor, "B L H"],
    gate: Float[Tensor, "B L H"],
    *,
    initial_state: Float[Tensor, "B H Dk Dv"] | None = None,
    output_final_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"] | None]:
    """Run gated EFLA: exact flow under a decay gate in [0, 1]; gate = 1 is `efla`.

    The state shrinks by exp(gate - 1), never under 1/e per token.
    """
    _check("gated_efla", k, beta, gate)
    (key, erase, write), log_decay = gated_unit_key_form(k, beta, gate)
    return delta_rule(
        q,
        key,
        v,
        erase,
        write,
        log_decay,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk=chunk,
        backend=backend,
    )


def gated_efla_step(
    q_t: Float[Tensor, "B H Dk"],
    k_t: Float[Tensor, "B H Dk"],
    v_t: Float[Tensor, "B H Dv"],
    beta_t: Float[Tensor, "B H"],
    gate_t: Float[Tensor, "B H"],
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Take one token of `gated_efla`, for decoding."""
    _check("gated_efla_step", k_t, beta_t, gate_t)
    (key, erase, write), log_decay = gated_unit_key_form(k_t, beta_t, gate_t)
    return delta_rule_step(q_t, key, v_t, erase, write, log_decay, state)


def _check(operator: str, k: Tensor, beta: Tensor, gate: Tensor | None = None) -> None:
    """Check what `delta_rule` will not see: the scalars from which erase and write come."""
    rows = "B L H" if k.dim() == 4 else "B H"
    check_tensors(operator, {"k": (k, f"{rows} Dk"), "beta": (beta, rows), "gate": (gate, rows)})
