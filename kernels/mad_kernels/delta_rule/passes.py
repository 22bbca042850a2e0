"""The two passes of the delta rule on a CPU as operators of torch, for any backend that has them.

    forward(q, k, v, erase, write, log_decay, state, C, save) -> o, final, U, states, T
    backward(q, k, v, erase, write, log_decay, state, U, states, T, d_o, d_final, C) -> seven gradients

Tensors are contiguous and of one dtype, the working one; `erase` None erases nothing, `log_decay`
None keeps the state whole. Kept for the backward, beside the inputs, are the pseudo values U
[B L H Dv], the states [n B H Dk Dv] that enter the n chunks of C tokens and, by a backend that
inverts, T [n B H C C]; without `save` all three are empty. What else a backward needs, it computes
again.

Legend: U the rows u of S <- g S + k u^T, T = (I + A)^-1; see `loops` and `chunked`.
"""

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor

from mad_kernels.custom_ops import widened, with_gradients


def allocate_forward(q, k, v, erase, write, log_decay, state, C, save, *, inverts):
    """Make room for o, final, U, states and T."""
    B, L, H, Dv = v.shape
    n = -(-L // C)
    kept = B if save else 0
    U, states = (kept, L, H, Dv), (n, kept, *state.shape[1:])
    T = (n, kept if inverts and erase is not None else 0, H, C, C)
    return tuple(v.new_empty(shape) for shape in (v.shape, state.shape, U, states, T))


def register_passes(backend: str, forward: Callable, backward: Callable, *, inverts: bool) -> Callable[..., tuple]:
    """Register the passes of a backend, and give the function that has their gradients.

    The function takes tensors as `delta_rule` does, then C, and returns o in the dtype of v, and
    the final state.
    """
    passes = with_gradients(
        *("delta_rule", backend, "q k v erase? write log_decay? state", "SymInt C"),
        forward=forward,
        backward=backward,
        allocate=partial(allocate_forward, inverts=inverts),
        kept=(0, 1, 1),
    )

    def run(
        q: Float[Tensor, "B L H Dk"],
        k: Float[Tensor, "B L H Dk"],
        v: Float[Tensor, "B L H Dv"],
        erase: Float[Tensor, "B L H"] | None,
        write: Float[Tensor, "B L H"],
        log_decay: Float[Tensor, "B L H"] | None,
        state: Float[Tensor, "B H Dk Dv"],
        C: int,
    ) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
        o, final = passes(*widened(v, q, k, v, erase, write, log_decay, state), C)
        return o.to(v.dtype), final

    return run
