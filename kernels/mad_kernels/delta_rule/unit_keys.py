"""Steps of the delta family as erase and write strengths on unit keys.

Within a token, k and v stand still and the state follows dS/ds = -k k^T S + k v^T for a time beta.
With lambda = |k|^2, x = beta lambda and the step's factor r(x), the token is

    S <- (I - alpha k k^T) S + alpha k v^T,    alpha = beta r(x)

    euler     r = 1                            the delta rule
    rk2, rk4  r = the first 2 or 4 terms of 1 - x/2 + x^2/6 - x^3/24
    exact     r = phi(x) = (1 - exp(-x)) / x   EFLA
    implicit  r = 1 / (1 + x)                  Longhorn
    kaczmarz  r = 1 / (lambda + epsilon)

and equals the delta rule on the unit key k/|k| with erase = x r and write = beta |k| r, so no large
or tiny key enters a matrix product. One slope gives both gradients, erase'(x): d write/d beta =
|k| erase' and d write/d|k| = beta (2 erase' - r). At k = 0, k/|k| has no limit; the norm is held at
a floor there, which leaves write k/|k| = alpha k and its gradient exact.

Source: arXiv 2512.12602v4 Eq. 15 (exact), Eq. 68 (gated); its v3 (Runge-Kutta); arXiv 2407.14207,
the implicit online update. Departure: unit keys inside, with separate erase and write.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mad_kernels.checks import working_dtype
from mad_kernels.phi import phi, phi_value

Step = Literal["euler", "rk2", "rk4", "exact", "implicit", "kaczmarz"]
STEPS: tuple[Step, ...] = ("euler", "rk2", "rk4", "exact", "implicit", "kaczmarz")

# Below its floor a key's square would underflow, and with it the whole of beta lambda.
_NORM_FLOOR = {torch.float32: 1e-18, torch.float64: 1e-150}
_KACZMARZ_EPSILON = 1e-6


class UnitKeyForm(NamedTuple):
    """One token's step on a unit key."""

    key: Tensor  # [... Dk]
    erase: Tensor  # [...]
    write: Tensor  # [...]


def unit_key_form(
    k: Float[Tensor, "*axes Dk"], beta: Float[Tensor, "*axes"], step: Step = "exact"
) -> UnitKeyForm:
    """Rewrite a step of a raw key as erase and write strengths on its unit key.

    Args:
        k: Raw keys, of any norm, zero included.
        beta: Time to flow, at least 0.
        step: Which member of the family.

    Returns:
        Unit keys, erase and write in float32 (float64 for float64).

    Raises:
        ValueError: If `step` is no member of the family.
    """
    if step not in STEPS:
        names = ", ".join(STEPS)
        raise ValueError(f"unit_key_form: step={step!r} is no member of the family: take {names}")
    key, norm = _UnitKeys.apply(k)
    erase, write = _StepStrengths.apply(beta.to(norm.dtype), norm, step)
    return UnitKeyForm(key, erase, write)


def gated_unit_key_form(
    k: Float[Tensor, "*axes Dk"], beta: Float[Tensor, "*axes"], gate: Float[Tensor, "*axes"]
) -> tuple[UnitKeyForm, Float[Tensor, "*axes"]]:
    """Rewrite gated EFLA's step on unit keys.

    The step is the flow of dS/ds = -(1 - gate) S - gate beta k k^T S + beta k v^T over unit time.

    Args:
        k: Raw keys, of any norm, zero included.
        beta: Learning rate, at least 0.
        gate: Decay gate, in [0, 1]; 1 gives EFLA.

    Returns:
        The form on unit keys, and the log decay gate - 1.

    Source: arXiv 2512.12602v4 Eq. 68.
    """
    key, norm = _UnitKeys.apply(k)
    beta, gate = beta.to(norm.dtype), gate.to(norm.dtype)
    erase, _ = _StepStrengths.apply(gate * beta, norm, "exact")
    write = beta * norm * phi((1 - gate) + gate * beta * norm.square())
    return UnitKeyForm(key, erase, write), gate - 1


class _UnitKeys(torch.autograd.Function):
    """k -> k/|k| and |k|, the norm held at a floor where the gradient stays that of k/floor."""

    @staticmethod
    def forward(ctx, k):
        wide = k.to(working_dtype(k))
        norm = torch.linalg.vector_norm(wide, dim=-1)
        floor = _NORM_FLOOR[wide.dtype]
        free = norm > floor
        norm = norm.clamp_min(floor)
        key = wide / norm[..., None]
        ctx.dtype = k.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(key, norm, free)
        return key, norm

    @staticmethod
    @once_differentiable
    def backward(ctx, d_key, d_norm):
        key, norm, free = ctx.saved_tensors
        if d_key is None:
            d_key = torch.zeros_like(key)
        along = -(d_key * key).sum(-1) / norm
        if d_norm is not None:
            along = along + d_norm
        along = torch.where(free, along, 0)
        return (d_key / norm[..., None] + key * along[..., None]).to(ctx.dtype)


class _StepStrengths(torch.autograd.Function):
    """beta, |k| -> erase = x r(x), write = beta |k| r(x), by erase' alone."""

    @staticmethod
    def forward(ctx, beta, norm, step):
        factor, _ = _factor_and_slope(beta, norm, step)
        ctx.step = step
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(beta, norm)
        write = beta * norm * factor
        erase = -torch.expm1(-beta * norm.square()) if step == "exact" else write * norm
        return erase, write

    @staticmethod
    @once_differentiable
    def backward(ctx, d_erase, d_write):
        beta, norm = ctx.saved_tensors
        factor, slope = _factor_and_slope(beta, norm, ctx.step)
        d_erase = torch.zeros_like(norm) if d_erase is None else d_erase
        d_write = torch.zeros_like(norm) if d_write is None else d_write
        # Kaczmarz's factor is free of beta, so there both strengths are linear in beta.
        by_beta = factor if ctx.step == "kaczmarz" else slope
        d_beta = norm * by_beta * (d_erase * norm + d_write)
        d_norm = beta * (2 * norm * slope * d_erase + (2 * slope - factor) * d_write)
        return d_beta, d_norm, None


def _factor_and_slope(beta: Tensor, norm: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Give r and erase'(x); for kaczmarz, erase/beta by lambda takes the place of erase'(x)."""
    lambda_ = norm.square()
    x = beta * lambda_
    match step:
        case "euler":
            return torch.ones_like(x), torch.ones_like(x)
        case "rk2":
            return 1 - x / 2, 1 - x
        case "rk4":
            return 1 - x / 2 * (1 - x / 3 * (1 - x / 4)), 1 - x * (1 - x / 2 * (1 - x / 3))
        case "exact":
            return phi_value(x), torch.exp(-x)
        case "implicit":
            return 1 / (1 + x), 1 / (1 + x).square()
        case "kaczmarz":
            factor = 1 / (lambda_ + _KACZMARZ_EPSILON)
            return factor, _KACZMARZ_EPSILON * factor.square()
