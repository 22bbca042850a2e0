"""Mamba's selective scan through the compiled loops of `loops`: tensors in, tensors out.

The backward keeps the inputs and the state before every chunk of C tokens: L (2 D + 2 N) +
(L/C) D N numbers per sequence, where autograd through the token loop keeps several L D N.

Legend: W sets of decay rates: sequences share one in blocks of B/W, which is how stacked calls
bring each their own; slabs are 32 channels wide, see `loops`.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from mad_kernels.custom_ops import allocate_gradients, filled, widened, with_gradients
from mad_kernels.memory import arrays

_CHUNK = 32
_LANES = 32


def selective_scan_compiled(
    x: Float[Tensor, "B L D"],
    dt: Float[Tensor, "B L D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "B L N"],
    c: Float[Tensor, "B L N"],
    state: Float[Tensor, "B D N"],
    chunk: int | None = None,
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B D N"]]:
    """Scan all tokens; arguments as in `selective_scan`, already checked."""
    C = max(1, min(chunk or _CHUNK, x.shape[1]))
    y, final = _run(*widened(x, x, dt, a[None], b, c, state), C)
    return y.to(x.dtype), final


def _allocate(x, dt, a, b, c, state, C, save):
    """Make room for y, final, and the states before each chunk, in slabs."""
    (B, L, D), N = x.shape, b.shape[-1]
    states = (B if save else 0, -(-L // C), -(-D // _LANES) * _LANES * N)
    return x.new_empty(x.shape), x.new_empty(state.shape), x.new_empty(states)


def _forward(x, dt, a, b, c, state, C, save):
    from mad_kernels.selective_scan import loops  # brings numba, which takes its time

    y, final, states = _allocate(x, dt, a, b, c, state, C, save)
    S = _to_slabs(state).clone()
    for rows, rates in _sets(x, a):
        inputs = (x[rows], dt[rows], _to_slabs(rates), b[rows], c[rows], S[rows])
        loops.forward(*arrays(*inputs), C, *arrays(y[rows], states[rows]))
    return y, final.copy_(_from_slabs(S, *state.shape[1:])), states


def _backward(x, dt, a, b, c, state, states, d_y, d_final, C):
    from mad_kernels.selective_scan import loops

    d_y, dS = filled(d_y, x), _to_slabs(filled(d_final, state)).clone()
    d_x, d_dt, d_a, d_b, d_c, d_state = allocate_gradients(x, dt, a, b, c, state)
    for (rows, rates), d_rates in zip(_sets(x, a), d_a, strict=True):
        A = _to_slabs(rates)
        inputs = (x[rows], dt[rows], A, b[rows], c[rows], states[rows], d_y[rows])
        dA = A.new_empty(A.shape)
        results = (dS[rows], d_x[rows], d_dt[rows], dA, d_b[rows], d_c[rows])
        loops.backward(*arrays(*inputs), C, *arrays(*results))
        d_rates.copy_(_from_slabs(dA, *rates.shape))
    return d_x, d_dt, d_a, d_b, d_c, d_state.copy_(_from_slabs(dS, *state.shape[1:]))


_run = with_gradients(
    *("selective_scan", "numba", "x dt a b c state", "SymInt C"),
    forward=_forward,
    backward=_backward,
    allocate=_allocate,
    kept=(0,),
)


def _sets(x, a):
    """Give the sequences that share decay rates, and these."""
    share = x.shape[0] // a.shape[0]
    return [(slice(i * share, (i + 1) * share), rates) for i, rates in enumerate(a)]


def _to_slabs(x: Tensor) -> Tensor:
    """Turn [... D N] into flat slabs of 32 channels, [... W/32 * N * 32], filled up with zeros."""
    x = pad(x, (0, 0, 0, -x.shape[-2] % _LANES))
    return x.unflatten(-2, (x.shape[-2] // _LANES, _LANES)).mT.contiguous().flatten(-3)


def _from_slabs(x: Tensor, channels: int, width: int) -> Tensor:
    """Turn flat slabs back into [... D N]."""
    slabs = -(-channels // _LANES)
    return x.unflatten(-1, (slabs, width, _LANES)).mT.flatten(-3, -2)[..., :channels, :].contiguous()
