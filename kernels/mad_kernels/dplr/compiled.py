"""Diagonal plus low rank through the compiled loops of `loops`: tensors in, tensors out.

One CPU thread. The backward keeps the inputs, what b has read, and the state before every chunk of
C tokens: per head L (5 Dk + 2 Dv) + (L/C) Dk Dv numbers, without a and b L (3 Dk + Dv) and states.
"""

from jaxtyping import Float
from torch import Tensor

from mad_kernels.custom_ops import allocate_gradients, filled, widened, with_gradients
from mad_kernels.memory import arrays

# Tokens between two kept states. Longer costs cache, shorter costs memory.
_CHUNK = 64


def dplr_compiled(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    log_decay: Float[Tensor, "B L H Dk"],
    a: Float[Tensor, "B L H Dk"] | None,
    b: Float[Tensor, "B L H Dk"] | None,
    state: Float[Tensor, "B H Dk Dv"],
    chunk: int | None = None,
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Run the recurrence token by token; arguments as in `dplr`, already checked."""
    C = max(1, min(chunk or _CHUNK, v.shape[1]))
    o, final = _run(*widened(v, q, k, v, log_decay, a, b, state), C)
    return o.to(v.dtype), final


def _allocate(q, k, v, log_decay, a, b, state, C, save):
    """Make room for o, final, what b has read, and the states before each chunk."""
    B, L, H, Dv = v.shape
    recalled = (B if save and a is not None else 0, L, H, Dv)
    states = (B if save else 0, H, -(-L // C), *state.shape[2:])
    return tuple(v.new_empty(shape) for shape in (v.shape, state.shape, recalled, states))


def _forward(q, k, v, log_decay, a, b, state, C, save):
    from mad_kernels.dplr import loops  # brings numba, which takes its time

    results = _allocate(q, k, v, log_decay, a, b, state, C, save)
    loops.forward(*arrays(q, k, v, log_decay.exp(), a, b, state), C, *arrays(*results))
    return results


def _backward(q, k, v, log_decay, a, b, state, recalled, states, d_o, d_final, C):
    from mad_kernels.dplr import loops

    given = (q, k, v, log_decay, a, b, state)
    grads = allocate_gradients(*given)
    inputs = arrays(q, k, v, log_decay.exp(), a, b, recalled, states, filled(d_o, v), filled(d_final, state))
    pairs = zip(grads, given, strict=True)
    loops.backward(*inputs, C, *arrays(*(None if x is None else grad for grad, x in pairs)))
    return grads


_run = with_gradients(
    *("dplr", "numba", "q k v log_decay a? b? state", "SymInt C"),
    forward=_forward,
    backward=_backward,
    allocate=_allocate,
    kept=(0, 0),
)
