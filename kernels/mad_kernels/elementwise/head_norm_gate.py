"""What stands behind RWKV-7's recurrence: a norm of each head, the bonus of the present token, the gate.

    n = weight (o - mean(o)) / sqrt(var(o) + eps) + bias            mean and var over a head
    out = (n + sum(r k bonus) v) g                                  the sum over a head

In bfloat16, all between is float32 and each result is rounded once.

Source: Peng et al. 2025, arXiv 2503.14456, the output of the time mixing.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mad_kernels.checks import check_tensors, working_dtype
from mad_kernels.custom_ops import first_order_only
from mad_kernels.dispatch import choose_backend
from mad_kernels.memory import array, check_in_memory, constants, in_memory, padded

BACKENDS = ("reference", "numba")
_LANES = 32


def head_norm_gate(
    o: Float[Tensor, "T H Dk"],
    r: Float[Tensor, "T H Dk"],
    k: Float[Tensor, "T H Dk"],
    v: Float[Tensor, "T H Dk"],
    g: Float[Tensor, "T H Dk"],
    weight: Float[Tensor, "H Dk"],
    bias: Float[Tensor, "H Dk"],
    bonus: Float[Tensor, "H Dk"],
    eps: float,
    *,
    backend: str = "auto",
) -> Float[Tensor, "T H Dk"]:
    """Normalise each head of T tokens, add its bonus, and gate the sum.

    Args:
        o: Outputs of the recurrence.
        r: Queries.
        k: Keys as they were written.
        v: Values.
        g: Gates, as they are multiplied.
        weight: Factor of each channel behind the norm.
        bias: Added to each channel behind the norm.
        bonus: Weight of each channel of r k.
        eps: Added to the variance, above 0.
        backend: "numba" (CPU; heads that fill whole vectors of 32, alone or side by side),
            "reference" or "auto", see `mad_kernels.dispatch`.

    Returns:
        The gated sum, in the dtype of `g`. The numba backend has gradients of first order only.

    Raises:
        ValueError: If shapes, dtypes, devices or `backend` do not fit.
    """
    axes = "T H Dk"
    given = {name: (x, axes) for name, x in zip("orkvg", (o, r, k, v, g), strict=True)}
    given |= {name: (x, "H Dk") for name, x in (("weight", weight), ("bias", bias), ("bonus", bonus))}
    sizes = check_tensors("head_norm_gate", given)
    tensors = [x for x, _ in given.values()]
    fills = _fills(sizes["H"], sizes["Dk"])
    automatic = "numba" if fills and in_memory(*tensors) else "reference"
    chosen = choose_backend("head_norm_gate", backend, BACKENDS, automatic=automatic, like=o)
    if chosen == "reference":
        return head_norm_gate_reference(o, r, k, v, g, weight, bias, bonus, eps)
    if not fills:
        raise ValueError(
            f"head_norm_gate: backend='numba' takes heads that fill vectors of {_LANES}, alone or side by side, "
            f"not H={sizes['H']} of Dk={sizes['Dk']}: leave backend 'auto'"
        )
    check_in_memory("head_norm_gate", *tensors)
    return _HeadNormGate.apply(o, r, k, v, g, weight, bias, bonus, eps)


def head_norm_gate_reference(
    o: Float[Tensor, "T H Dk"],
    r: Float[Tensor, "T H Dk"],
    k: Float[Tensor, "T H Dk"],
    v: Float[Tensor, "T H Dk"],
    g: Float[Tensor, "T H Dk"],
    weight: Float[Tensor, "H Dk"],
    bias: Float[Tensor, "H Dk"],
    bonus: Float[Tensor, "H Dk"],
    eps: float,
) -> Float[Tensor, "T H Dk"]:
    """Compute the gated sum in plain torch."""
    scale, level = (z.flatten().to(g.dtype) for z in (weight, bias))
    normed = F.group_norm(o.to(g.dtype).flatten(1), o.shape[1], scale, level, eps).view_as(o)
    own = (r * k * bonus).sum(-1, keepdim=True) * v
    return ((normed + own) * g).to(g.dtype)


def _fills(heads: int, width: int) -> bool:
    """Tell whether heads fill whole vectors, alone or side by side."""
    return width > 0 and (width % _LANES == 0 or (_LANES % width == 0 and heads * width % _LANES == 0))


def _forward(o, r, k, v, g, weight, bias, bonus, eps):
    from mad_kernels.elementwise import loops  # brings numba, which takes its time

    out = g.new_empty(g.shape)
    if out.numel():
        loops.head_norm_gate_forward(*_given(o, r, k, v, g, weight, bias, bonus, eps), array(out))
    return out


def _backward(o, r, k, v, g, weight, bias, bonus, eps, d_out):
    from mad_kernels.elementwise import loops

    grads = [x.new_empty(x.shape) for x in (o, r, k, v, g)]
    scales = (weight, bias, bonus)
    shares = [x.new_zeros(x.numel(), dtype=working_dtype(o)) for x in scales]
    if o.numel():
        results = map(array, (d_out.contiguous(), *grads, *shares))
        loops.head_norm_gate_backward(*_given(o, r, k, v, g, weight, bias, bonus, eps), *results)
    return *grads, *(d.view_as(x).to(x.dtype) for d, x in zip(shares, scales, strict=True))


def _given(o, r, k, v, g, weight, bias, bonus, eps):
    """Give all operands as the loops read them."""
    H, Dk = o.shape[1:]
    scales = (padded(x.flatten(), o) for x in (weight, bias, bonus))
    line, group = (_LANES, Dk) if Dk < _LANES else (Dk, _LANES)
    tokens = (array(x.contiguous()) for x in (o, r, k, v, g))
    return *tokens, *scales, constants(o, 1.0, 1 / Dk, eps), H * Dk, line, group


_pull = first_order_only(_backward, "head_norm_gate")


class _HeadNormGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, r, k, v, g, weight, bias, bonus, eps):
        ctx.eps = eps
        ctx.save_for_backward(o, r, k, v, g, weight, bias, bonus)
        return _forward(o, r, k, v, g, weight, bias, bonus, eps)

    @staticmethod
    def backward(ctx, d_out):
        return *_pull(*ctx.saved_tensors, ctx.eps, d_out), None
