"""Mamba's selective scan on a GPU: one launch each way, one program per sequence and channels.

    E = exp(dt a)        S_t = E_t S_{t-1} + dt_t x_t b_t        y_t = sum_n c_t S_t

A program walks over chunks of C tokens with the states of its channels in registers. All E and all
inputs of a chunk are laid out at once, [C, channels, N]; what is left to do token by token is one
multiplication and one addition.

The backward reads back the state before each chunk, from the last to the first, replays the chunk,
and runs dS backwards through it:

    dS_t = c_t dy_t + E_{t+1} dS_{t+1}    d c_t = sum_d dy_t S_t    d b_t = sum_d dS_t dt_t x_t
    d(dt_t x_t) = sum_n dS_t b_t          d(dt_t a) = dS_t E_t S_{t-1}

Gradients of b and c sum over channels, those of a over tokens and sequences: each program writes
its own share in float32, and the shares are added in a fixed order afterwards. No atomics: equal
inputs give equal bits. Tokens past the end have dt = 0, and change nothing.

Memory of the backward, in float32 numbers per sequence: (L/C) D N, and while it runs 2 L D N / BD
+ D N, where BD is the number of channels of a program.

Legend: D channels, N state width, W sets of decay rates: sequences share one in blocks of B/W,
which is how stacked calls bring each their own.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mad_kernels.blocks import interpreted, readable, writable
from mad_kernels.custom_ops import with_gradients

# Fixed, so that no run depends on a timing.
CHUNK = 8  # tokens
STATES = 256  # numbers of the state in one program
WARPS = 4


def selective_scan_triton(
    x: Float[Tensor, "B L D"],
    dt: Float[Tensor, "B L D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "B L N"],
    c: Float[Tensor, "B L N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B D N"]]:
    """Scan all tokens on a GPU; arguments as in `selective_scan`, already checked."""
    return _run(x, dt, a[None], b, c, state)


@no_type_check  # sizes are symbols while torch.compile traces
def sizes_of(D: int, N: int) -> tuple[int, int]:
    """Settle how many channels a program takes, and its padded state width."""
    BN = max(4, 1 << (N - 1).bit_length())
    return min(max(1, STATES // BN), 1 << (D - 1).bit_length()), BN


@no_type_check
def _forward(x, dt, a, b, c, state, save):
    B, L, D = x.shape
    N = b.shape[-1]
    y, final, states = _allocate(x, dt, a, b, c, state, save)
    if 0 in (B, D, N):
        return y.zero_(), final, states
    y = writable(x, *y.shape, dtype=x.dtype) if interpreted() else y
    BD, BN = sizes_of(D, N)
    with torch.cuda.device_of(x):
        forward_kernel[(B, triton.cdiv(D, BD))](
            *(readable(z, x) for z in (x, dt, a, b, c, state)),
            *(y, final, states, B // a.shape[0], L, D, N),
            SAVE=save,
            C=CHUNK,
            BD=BD,
            BN=BN,
            num_warps=WARPS,
            num_stages=1,
        )
    return y.to(x.dtype), final, states


@no_type_check  # sizes are symbols while torch.compile traces
def _allocate(x, dt, a, b, c, state, save):
    """Make room for y, final and the states before each chunk."""
    (B, L, D), N = x.shape, b.shape[-1]
    return (x.new_empty(B, L, D), writable(x, B, D, N), writable(x, B, -(-L // CHUNK) if save else 0, D, N))


@no_type_check
def _backward(x, dt, a, b, c, state, states, d_y, d_final):
    (B, L, D), (W, _, N) = x.shape, a.shape
    inputs = (x, dt, a, b, c, state)
    if 0 in (B, L, D, N):
        grads = [torch.zeros_like(z) for z in inputs]
        if L == 0 and d_final is not None:
            grads[-1] = d_final.to(state.dtype, copy=True)
        return tuple(grads)
    BD, BN = sizes_of(D, N)
    blocks = triton.cdiv(D, BD)
    d_x, d_dt, d_state = (writable(x, *z.shape, dtype=z.dtype) for z in (x, dt, state))
    d_a = writable(x, B, D, N)
    d_b, d_c = (writable(x, blocks, B, L, N) for _ in range(2))
    d_y = torch.zeros_like(x) if d_y is None else d_y
    with torch.cuda.device_of(x):
        backward_kernel[(B, blocks)](
            *(readable(z, x) for z in (x, dt, a, b, c, states, d_y, d_final)),
            *(d_x, d_dt, d_a, d_b, d_c, d_state, B // W, L, D, N),
            FINAL=d_final is not None,
            C=CHUNK,
            BD=BD,
            BN=BN,
            num_warps=WARPS,
            num_stages=1,
        )
    grads = (d_x, d_dt, d_a.unflatten(0, (W, B // W)).sum(1), d_b.sum(0), d_c.sum(0), d_state)
    return tuple(grad.to(z.dtype) for grad, z in zip(grads, inputs, strict=True))


_run = with_gradients(
    *("selective_scan", "triton", "x dt a b c state"),
    forward=_forward,
    backward=_backward,
    allocate=_allocate,
    kept=(0,),
)


@triton.jit(do_not_specialize=["share", "L"])
@no_type_check
def forward_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    state_ptr,
    y_ptr,
    final_ptr,
    states_ptr,
    share,
    L,
    D: tl.constexpr,
    N: tl.constexpr,
    SAVE: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """Fill y and final, from the first chunk to the last; with SAVE also states."""
    sequence = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BN)
    at_S, in_S = d[:, None] * N + n[None, :], (d[:, None] < D) & (n[None, :] < N)
    a = tl.load(a_ptr + sequence // share * D * N + at_S, mask=in_S, other=0.0).to(tl.float32)
    S = tl.load(state_ptr + sequence * D * N + at_S, mask=in_S, other=0.0).to(tl.float32)
    chunks = tl.cdiv(L, C)
    for chunk in range(chunks):
        if SAVE:
            tl.store(states_ptr + (sequence * chunks + chunk) * D * N + at_S, S, mask=in_S)
        t = chunk * C + tl.arange(0, C)
        at_x, in_x = ((sequence * L + t)[:, None] * D + d[None, :], (t[:, None] < L) & (d[None, :] < D))
        at_b, in_b = ((sequence * L + t)[:, None] * N + n[None, :], (t[:, None] < L) & (n[None, :] < N))
        x, dt, b = load(x_ptr, at_x, in_x), load(dt_ptr, at_x, in_x), load(b_ptr, at_b, in_b)
        E, poured = laid_out(x, dt, a, b)
        before, S = replay(S, E, poured, C, BD, BN)
        after = E * before + poured
        y = tl.sum(after * load(c_ptr, at_b, in_b)[:, None, :], axis=2)
        tl.store(y_ptr + at_x, y.to(y_ptr.dtype.element_ty), mask=in_x)
    tl.store(final_ptr + sequence * D * N + at_S, S, mask=in_S)


@triton.jit(do_not_specialize=["share", "L"])
@no_type_check
def backward_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    states_ptr,
    d_y_ptr,
    d_final_ptr,
    d_x_ptr,
    d_dt_ptr,
    d_a_ptr,
    d_b_ptr,
    d_c_ptr,
    d_state_ptr,
    share,
    L,
    D: tl.constexpr,
    N: tl.constexpr,
    FINAL: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """Fill the gradient of every input, from the last chunk to the first."""
    sequence, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, n = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BN)
    at_S, in_S = d[:, None] * N + n[None, :], (d[:, None] < D) & (n[None, :] < N)
    own = block * tl.num_programs(0) * L * N  # this program's share of d b and d c
    a = tl.load(a_ptr + sequence // share * D * N + at_S, mask=in_S, other=0.0).to(tl.float32)
    dS, d_a = tl.zeros((BD, BN), tl.float32), tl.zeros((BD, BN), tl.float32)
    if FINAL:
        dS += tl.load(d_final_ptr + sequence * D * N + at_S, mask=in_S, other=0.0)
    chunks = tl.cdiv(L, C)
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * C + tl.arange(0, C)
        at_x, in_x = ((sequence * L + t)[:, None] * D + d[None, :], (t[:, None] < L) & (d[None, :] < D))
        at_b, in_b = ((sequence * L + t)[:, None] * N + n[None, :], (t[:, None] < L) & (n[None, :] < N))
        x, dt, b = load(x_ptr, at_x, in_x), load(dt_ptr, at_x, in_x), load(b_ptr, at_b, in_b)
        S = load(states_ptr + (sequence * chunks + chunk) * D * N, at_S, in_S)
        E, poured = laid_out(x, dt, a, b)
        before, S = replay(S, E, poured, C, BD, BN)
        d_y = load(d_y_ptr, at_x, in_x)[:, :, None]
        d_c = tl.sum(d_y * (E * before + poured), axis=1)
        tl.store(d_c_ptr + own + at_b, d_c, mask=in_b)
        d_after, dS = pull(dS, E, d_y * load(c_ptr, at_b, in_b)[:, None, :], C, BD, BN)
        tl.store(d_b_ptr + own + at_b, tl.sum(d_after * (dt * x)[:, :, None], axis=1), mask=in_b)
        d_poured = tl.sum(d_after * b[:, None, :], axis=2)
        tl.store(d_x_ptr + at_x, (d_poured * dt).to(d_x_ptr.dtype.element_ty), mask=in_x)
        exponent = d_after * E * before
        d_dt = d_poured * x + tl.sum(exponent * a[None, :, :], axis=2)
        tl.store(d_dt_ptr + at_x, d_dt.to(d_dt_ptr.dtype.element_ty), mask=in_x)
        d_a += tl.sum(exponent * dt[:, :, None], axis=0)
    tl.store(d_a_ptr + sequence * D * N + at_S, d_a, mask=in_S)
    at_S += sequence * D * N
    tl.store(d_state_ptr + at_S, dS.to(d_state_ptr.dtype.element_ty), mask=in_S)


@triton.jit
@no_type_check
def load(pointer, at, within):
    """Load as float32, 0 outside."""
    return tl.load(pointer + at, mask=within, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def laid_out(x, dt, a, b):
    """Give E and dt x b of a chunk, [C BD BN]."""
    return tl.exp(dt[:, :, None] * a[None, :, :]), (dt * x)[:, :, None] * b[:, None, :]


@triton.jit
@no_type_check
def replay(S, E, poured, C: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Run S over a chunk; give the state before each token [C BD BN], and the last one."""
    before = tl.zeros((C, BD, BN), tl.float32)
    for t in tl.static_range(C):
        # Tokens lie within a thread: the mask is known to the compiler, and costs nothing.
        at_t = (tl.arange(0, C) == t)[:, None, None]
        before = tl.where(at_t, S[None, :, :], before)
        S = S * tl.sum(tl.where(at_t, E, 0.0), axis=0) + tl.sum(tl.where(at_t, poured, 0.0), axis=0)
    return before, S


@triton.jit
@no_type_check
def pull(dS, E, given, C: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Run dS back over a chunk; give the gradient of the state after each token, and the first."""
    d_after = tl.zeros((C, BD, BN), tl.float32)
    for back in tl.static_range(C):
        at_t = (tl.arange(0, C) == C - 1 - back)[:, None, None]
        dS += tl.sum(tl.where(at_t, given, 0.0), axis=0)
        d_after = tl.where(at_t, dS[None, :, :], d_after)
        dS *= tl.sum(tl.where(at_t, E, 0.0), axis=0)
    return d_after, dS
