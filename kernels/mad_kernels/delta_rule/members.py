"""Members of the delta family: each computes its scalars and hands them to `delta_rule`.

    efla              S_t = (I - alpha k k^T) S + alpha k v^T, alpha |k|^2 = 1 - exp(-beta |k|^2)
    rk2, rk4          the same with 2 or 4 terms of alpha's series
    implicit          the same with alpha = beta / (1 + beta |k|^2), Longhorn
    kaczmarz          the same with alpha = beta / (|k|^2 + 1e-6)
    deltanet          the same with alpha = beta; normalise the keys first, as DeltaNet does
    gated_delta_rule  deltanet on exp(log_decay) S
    gated_efla        exact flow under a decay gate

Every one takes raw `q`, `k`, `v` of [B L H D], `beta` of [B L H], at least 0, and the `Options` of
`delta_rule`; every one has a `_step` form that reads one token into a state.

Source: arXiv 2512.12602v4 Eq. 15 and 68, its v3 (rk2, rk4); arXiv 2407.14207, the implicit
online update; arXiv 2406.06484, the delta update rule; arXiv 2412.06464, the gated delta rule.
Departure: all but deltanet and gated_delta_rule run on unit keys, see `unit_keys`.
"""

from typing import TypedDict, Unpack

from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors
from mad_kernels.delta_rule.operator import delta_rule, delta_rule_step
from mad_kernels.delta_rule.unit_keys import Step, gated_unit_key_form, unit_key_form

Keys = Float[Tensor, "B L H Dk"]
Values = Float[Tensor, "B L H Dv"]
Scalars = Float[Tensor, "B L H"]
State = Float[Tensor, "B H Dk Dv"]
Key = Float[Tensor, "B H Dk"]
Value = Float[Tensor, "B H Dv"]
Scalar = Float[Tensor, "B H"]


class Options(TypedDict, total=False):
    """Options of every member; meaning and defaults as in `delta_rule`."""

    initial_state: State | None
    output_final_state: bool
    chunk: int | None
    backend: str


def efla(q: Keys, k: Keys, v: Values, beta: Scalars, **options: Unpack[Options]) -> tuple[Values, State | None]:
    """Run EFLA: the exact flow for a time beta, whatever the norm of the key."""
    return _on_unit_keys("efla", "exact", q, k, v, beta, options)


def efla_step(q_t: Key, k_t: Key, v_t: Value, beta_t: Scalar, state: State) -> tuple[Value, State]:
    """Take one token of `efla`, for decoding."""
    return _step_on_unit_keys("efla_step", "exact", q_t, k_t, v_t, beta_t, state)


def deltanet(q: Keys, k: Keys, v: Values, beta: Scalars, **options: Unpack[Options]) -> tuple[Values, State | None]:
    """Run the delta rule of DeltaNet, erase = write = beta, on keys as given."""
    return delta_rule(q, k, v, beta, beta, **options)


def deltanet_step(q_t: Key, k_t: Key, v_t: Value, beta_t: Scalar, state: State) -> tuple[Value, State]:
    """Take one token of `deltanet`, for decoding."""
    return delta_rule_step(q_t, k_t, v_t, beta_t, beta_t, None, state)


def rk2(q: Keys, k: Keys, v: Values, beta: Scalars, **options: Unpack[Options]) -> tuple[Values, State | None]:
    """Run the second-order Runge-Kutta step; it grows without bound for beta |k|^2 > 2."""
    return _on_unit_keys("rk2", "rk2", q, k, v, beta, options)


def rk2_step(q_t: Key, k_t: Key, v_t: Value, beta_t: Scalar, state: State) -> tuple[Value, State]:
    """Take one token of `rk2`, for decoding."""
    return _step_on_unit_keys("rk2_step", "rk2", q_t, k_t, v_t, beta_t, state)


def rk4(q: Keys, k: Keys, v: Values, beta: Scalars, **options: Unpack[Options]) -> tuple[Values, State | None]:
    """Run the fourth-order Runge-Kutta step; it grows without bound for beta |k|^2 > 2.785."""
    return _on_unit_keys("rk4", "rk4", q, k, v, beta, options)


def rk4_step(q_t: Key, k_t: Key, v_t: Value, beta_t: Scalar, state: State) -> tuple[Value, State]:
    """Take one token of `rk4`, for decoding."""
    return _step_on_unit_keys("rk4_step", "rk4", q_t, k_t, v_t, beta_t, state)


def implicit(q: Keys, k: Keys, v: Values, beta: Scalars, **options: Unpack[Options]) -> tuple[Values, State | None]:
    """Run the implicit Euler step of Longhorn; it never grows."""
    return _on_unit_keys("implicit", "implicit", q, k, v, beta, options)


def implicit_step(q_t: Key, k_t: Key, v_t: Value, beta_t: Scalar, state: State) -> tuple[Value, State]:
    """Take one token of `implicit`, for decoding."""
    return _step_on_unit_keys("implicit_step", "implicit", q_t, k_t, v_t, beta_t, state)


def kaczmarz(q: Keys, k: Keys, v: Values, beta: Scalars, **options: Unpack[Options]) -> tuple[Values, State | None]:
    """Run the Kaczmarz step: erase is beta at any norm of the key well above 1e-3."""
    return _on_unit_keys("kaczmarz", "kaczmarz", q, k, v, beta, options)


def kaczmarz_step(q_t: Key, k_t: Key, v_t: Value, beta_t: Scalar, state: State) -> tuple[Value, State]:
    """Take one token of `kaczmarz`, for decoding."""
    return _step_on_unit_keys("kaczmarz_step", "kaczmarz", q_t, k_t, v_t, beta_t, state)


def gated_delta_rule(
    q: Keys, k: Keys, v: Values, beta: Scalars, log_decay: Scalars, **options: Unpack[Options]
) -> tuple[Values, State | None]:
    """Run the rule of Gated DeltaNet, on keys as given.

    The state decays first, then beta erases and writes:
    `S_t = exp(log_decay) (I - beta k k^T) S + beta k v^T`.
    """
    return delta_rule(q, k, v, beta, beta, log_decay, **options)


def gated_delta_rule_step(
    q_t: Key, k_t: Key, v_t: Value, beta_t: Scalar, log_decay_t: Scalar, state: State
) -> tuple[Value, State]:
    """Take one token of `gated_delta_rule`, for decoding."""
    return delta_rule_step(q_t, k_t, v_t, beta_t, beta_t, log_decay_t, state)


def gated_efla(
    q: Keys, k: Keys, v: Values, beta: Scalars, gate: Scalars, **options: Unpack[Options]
) -> tuple[Values, State | None]:
    """Run gated EFLA: exact flow under a decay gate in [0, 1]; gate = 1 is `efla`.

    The state shrinks by exp(gate - 1), never under 1/e per token.
    """
    _check("gated_efla", k, beta, gate)
    (key, erase, write), log_decay = gated_unit_key_form(k, beta, gate)
    return delta_rule(q, key, v, erase, write, log_decay, **options)


def gated_efla_step(
    q_t: Key, k_t: Key, v_t: Value, beta_t: Scalar, gate_t: Scalar, state: State
) -> tuple[Value, State]:
    """Take one token of `gated_efla`, for decoding."""
    _check("gated_efla_step", k_t, beta_t, gate_t)
    (key, erase, write), log_decay = gated_unit_key_form(k_t, beta_t, gate_t)
    return delta_rule_step(q_t, key, v_t, erase, write, log_decay, state)


def _on_unit_keys(
    operator: str, step: Step, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, options: Options
) -> tuple[Tensor, Tensor | None]:
    _check(operator, k, beta)
    key, erase, write = unit_key_form(k, beta, step)
    return delta_rule(q, key, v, erase, write, **options)


def _step_on_unit_keys(
    operator: str, step: Step, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    _check(operator, k, beta)
    key, erase, write = unit_key_form(k, beta, step)
    return delta_rule_step(q, key, v, erase, write, None, state)


def _check(operator: str, k: Tensor, beta: Tensor, gate: Tensor | None = None) -> None:
    """Check what `delta_rule` will not see: the scalars from which erase and write come."""
    rows = "B L H" if k.dim() == 4 else "B H"
    check_tensors(operator, {"k": (k, f"{rows} Dk"), "beta": (beta, rows), "gate": (gate, rows)})
