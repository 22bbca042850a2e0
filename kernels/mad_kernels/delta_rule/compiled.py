"""The delta rule through the compiled loops of `loops`: tensors in, tensors out, on one CPU thread.

The backward keeps the inputs, the pseudo values u and the state before every chunk of C tokens:
per head L (2 Dk + 2 Dv) + (L/C) Dk Dv numbers. Two calls on equal inputs give equal bits, whether
the loops were compiled now or long ago; another kind of processor may round differently.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mad_kernels.custom_ops import allocate_gradients, filled
from mad_kernels.delta_rule.passes import allocate_forward, register_passes
from mad_kernels.memory import arrays

# Tokens between two kept states. Under decay a chunk's states are all held at once, in the cache.
_CHUNK, _CHUNK_WITH_DECAY = 128, 64


def delta_rule_compiled(
    q: Float[Tensor, "B L H Dk"],
    k: Float[Tensor, "B L H Dk"],
    v: Float[Tensor, "B L H Dv"],
    erase: Float[Tensor, "B L H"] | None,
    write: Float[Tensor, "B L H"],
    log_decay: Float[Tensor, "B L H"] | None,
    state: Float[Tensor, "B H Dk Dv"],
    chunk: int | None = None,
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Apply the delta rule token by token; arguments as in `delta_rule`, already checked.

    An erase that is None erases nothing.
    """
    chunk = chunk or (_CHUNK if log_decay is None else _CHUNK_WITH_DECAY)
    C = max(1, min(chunk, v.shape[1]))
    return _run(q, k, v, erase, write, log_decay, state, C)


def _forward(q, k, v, erase, write, log_decay, state, C, save):
    from mad_kernels.delta_rule import loops  # brings numba, which takes its time

    results = allocate_forward(q, k, v, erase, write, log_decay, state, C, save, inverts=False)
    e, decay = _scalars(erase, write, log_decay)
    loops.forward(*arrays(q, k, v, e, write, decay, state), C, *arrays(*results[:-1]))
    return results


def _backward(q, k, v, erase, write, log_decay, state, U, states, T, d_o, d_final, C):
    from mad_kernels.delta_rule import loops

    grads = allocate_gradients(q, k, v, erase, write, log_decay, state)
    e, decay = _scalars(erase, write, log_decay)
    inputs = arrays(q, k, v, e, write, decay, states, U, filled(d_o, v), filled(d_final, state))
    d_q, d_k, d_v, d_erase, d_write, d_log_decay, d_state = grads
    de = torch.empty_like(e) if erase is None else d_erase
    dg = None if log_decay is None else d_log_decay.zero_()
    loops.backward(*inputs, C, *arrays(d_q, d_k, d_v, de, d_write, dg, d_state))
    return grads


def _scalars(erase: Tensor | None, write: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give erase and decay as the loops read them."""
    e = torch.zeros_like(write) if erase is None else erase
    return e, None if log_decay is None else log_decay.exp()


_run = register_passes("numba", _forward, _backward, inverts=False)
