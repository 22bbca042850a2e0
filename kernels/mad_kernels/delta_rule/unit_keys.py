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

Keys and norms take one pass over memory each way, in compiled loops where they can run
(`unit_key_loops`); the rest is a few operations on one number per token.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import working_dtype
from mad_kernels.custom_ops import first_order_only, stack
from mad_kernels.dispatch import runs_compiled_loops
from mad_kernels.phi import phi, phi_value

Step = Literal["euler", "rk2", "rk4", "exact", "implicit", "kaczmarz"]
STEPS: tuple[Step, ...] = ("euler", "rk2", "rk4", "exact", "implicit", "kaczmarz")

# Below its floor a key's square would underflow, and with it the whole of beta lambda.
_NORM_FLOOR = {torch.float32: 1e-18, torch.float64: 1e-150}
_KACZMARZ_EPSILON = 1e-6
_CURE = "write the step in plain torch and call delta_rule(backend='reference')"


class UnitKeyForm(NamedTuple):
    """One token's step on a unit key."""

    key: Tensor  # [... Dk]
    erase: Tensor  # [...]
    write: Tensor  # [...]


def unit_key_form(k: Float[Tensor, "*axes Dk"], beta: Float[Tensor, "*axes"], step: Step = "exact") -> UnitKeyForm:
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
    key, norm = _unit_keys(k)
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
    key, norm = _unit_keys(k)
    beta, gate = beta.to(norm.dtype), gate.to(norm.dtype)
    erase, _ = _StepStrengths.apply(gate * beta, norm, "exact")
    write = beta * norm * phi((1 - gate) + gate * beta * norm.square())
    return UnitKeyForm(key, erase, write), gate - 1


def l2_normalize(x: Float[Tensor, "*axes D"], floor: float = 1e-6) -> Float[Tensor, "*axes D"]:
    """Scale the last axis to unit length, as queries and the keys of DeltaNet are.

    Args:
        x: Vectors; zero stays zero.
        floor: Vectors shorter than this are divided by it instead of by their length.

    Returns:
        Unit vectors in float32 (float64 for float64), like `unit_key_form`.
    """
    return _UnitKeys.apply(x.to(working_dtype(x)).contiguous(), floor)[0]


def _unit_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    wide = k.to(working_dtype(k)).contiguous()
    return _UnitKeys.apply(wide, _NORM_FLOOR[wide.dtype])


@torch.library.custom_op("mad_kernels::unit_keys_forward", mutates_args=())
def _unit_keys_forward(k: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    if not runs_compiled_loops(k):
        norm = torch.linalg.vector_norm(k, dim=-1).clamp_min(floor)
        return k / norm[..., None], norm
    from mad_kernels.delta_rule import unit_key_loops  # brings numba, which takes its time

    k = k.detach().contiguous()
    key, norm = torch.empty_like(k), k.new_empty(k.shape[:-1])
    x, *results = (z.flatten().numpy() for z in (k, key, norm))
    unit_key_loops.forward(x, x.dtype.type(floor), *results)
    return key, norm


@torch.library.custom_op("mad_kernels::unit_keys_backward", mutates_args=())
def _unit_keys_backward(key: Tensor, norm: Tensor, d_key: Tensor, d_norm: Tensor, floor: float) -> Tensor:
    if not runs_compiled_loops(key):
        along = torch.where(norm > floor, d_norm - (d_key * key).sum(-1) / norm, 0)
        return d_key / norm[..., None] + key * along[..., None]
    from mad_kernels.delta_rule import unit_key_loops

    d_k = key.new_empty(key.shape)
    # Contiguous first: a gradient that repeats one number stays so when it is flattened.
    inputs = (x.detach().contiguous().flatten().numpy() for x in (key, norm, d_key, d_norm))
    floor = d_k.numpy().dtype.type(floor)
    unit_key_loops.backward(*inputs, floor, d_k.flatten().numpy())
    return d_k


@_unit_keys_forward.register_fake
def _unit_keys_forward_fake(k, floor):
    return k.new_empty(k.shape), k.new_empty(k.shape[:-1])


@_unit_keys_backward.register_fake
def _unit_keys_backward_fake(key, norm, d_key, d_norm, floor):
    return key.new_empty(key.shape)


@_unit_keys_forward.register_vmap
def _unit_keys_forward_vmap(info, in_dims, k, floor):
    return _unit_keys_forward(k.movedim(in_dims[0], 0), floor), (0, 0)


@_unit_keys_backward.register_vmap
def _unit_keys_backward_vmap(info, in_dims, *arguments):
    *stacked, floor = stack(info.batch_size, in_dims, arguments)
    return _unit_keys_backward(*stacked, floor), 0


_pull_unit_keys = first_order_only(_unit_keys_backward, "unit_key_form", _CURE)


class _UnitKeys(torch.autograd.Function):
    """k -> k/|k| and |k|, the norm held at a floor where the gradient stays that of k/floor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(k, floor):
        with torch.no_grad():
            return _unit_keys_forward(k, floor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.floor = inputs[1]
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx, d_key, d_norm):
        key, norm = ctx.saved_tensors
        return _pull_unit_keys(key, norm, d_key, d_norm, ctx.floor), None


class _StepStrengths(torch.autograd.Function):
    """beta, |k| -> erase = x r(x), write = beta |k| r(x), by erase' alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(beta, norm, step):
        factor, _ = _factor_and_slope(beta, norm, step)
        write = beta * norm * factor
        erase = -torch.expm1(-beta * norm.square()) if step == "exact" else write * norm
        return erase, write

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.step = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, d_erase, d_write):
        return *_pull_strengths(*ctx.saved_tensors, d_erase, d_write, ctx.step), None


def _strengths_backward(beta, norm, d_erase, d_write, step):
    factor, slope = _factor_and_slope(beta, norm, step)
    # Kaczmarz's factor is free of beta, so there both strengths are linear in beta.
    by_beta = factor if step == "kaczmarz" else slope
    d_beta = norm * by_beta * (d_erase * norm + d_write)
    d_norm = beta * (2 * norm * slope * d_erase + (2 * slope - factor) * d_write)
    return d_beta, d_norm


_pull_strengths = first_order_only(_strengths_backward, "unit_key_form", _CURE)


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
