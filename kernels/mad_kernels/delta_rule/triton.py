"""The delta rule on a GPU, chunk by chunk: two launches each way.

Equations and letters are those of `chunked`. In registers everything is transposed, Q and K
[Dk, C], V, X, U and O [Dv, C], S [Dv, Dk]: the rows of every large product are features, which
spread over the warps; tokens are too few for that.

    A = StrictTril(diag(erase) (K^T K * D))    T = (I + A)^-1        P = Tril(Q^T K * D)
    X = V diag(write) - S K diag(erase exp(G))                       U = X T^T
    O = S Q diag(exp(G)) + U P^T               S <- exp(G_C) S + U diag(exp(G_C - G)) K^T

    prepare    every chunk by itself: P and T, which no state enters
    forward    32 value columns of a head, first chunk to last, S in registers
    sweep      32 value columns of a head, last chunk to first, dS in registers
    gather     every chunk by itself: all gradients but the state's, from S, dS, U, dX

Value columns are independent in forward and sweep. Sums over them are taken in gather, by one
program and in a fixed order, as it walks over the blocks of S and dS in memory. No atomics: equal
inputs give equal bits. Tokens past the end are read as zeros, and change nothing.

Without erase, U is V diag(write) and nothing is inverted: that is `ssd`, where G groups of
neighbouring heads share their q and k. Each head then writes its own gradients of q and k, in
float32, and they are added afterwards.

float32 values are multiplied at float32 precision. With bfloat16 values the operands of products
are rounded (`PRODUCTS`); sums, gates, the inverse and the state stay float32.

Memory of the backward, in float32 numbers per head: L (2 Dv + 2 C) + 2 (L/C) Dk Dv, of which
L Dv + (L/C) Dk Dv only while it runs.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mad_kernels.blocks import (
    decay_ends,
    decay_pairs,
    dot,
    interpreted,
    load_tokens,
    log_decay_gradient,
    long_dot,
    padded,
    readable,
    store_tokens,
    unit_lower_inverse,
    writable,
)
from mad_kernels.custom_ops import allocate_gradients, with_gradients

# Fixed, so that no run depends on a timing.
CHUNK = 16  # tokens
BLOCK = 32  # rows or columns of a state that one program holds, where it need not hold all
# Warps by the larger padded width: of prepare and gather, of forward and sweep.
WARPS = {16: (2, 2), 32: (4, 4), 64: (4, 4), 128: (4, 8)}
PRODUCTS = {torch.bfloat16: "tf32", torch.float32: "tf32x3"}


def delta_rule_triton(
    q: Float[Tensor, "B L G Dk"],
    k: Float[Tensor, "B L G Dk"],
    v: Float[Tensor, "B L H Dv"],
    erase: Float[Tensor, "B L H"] | None,
    write: Float[Tensor, "B L H"],
    log_decay: Float[Tensor, "B L H"] | None,
    state: Float[Tensor, "B H Dk Dv"],
) -> tuple[Float[Tensor, "B L H Dv"], Float[Tensor, "B H Dk Dv"]]:
    """Apply the delta rule on a GPU; arguments as in `delta_rule`, already checked.

    An erase that is None erases nothing; G divides H.
    """
    return _run(q, k, v, erase, write, log_decay, state)


@no_type_check  # sizes are symbols while torch.compile traces
def options_of(Dk: int, Dv: int, *, erase: bool, decay: bool) -> tuple[dict, dict]:
    """Settle how kernels are built for a head's widths, at most 128.

    Returns:
        Options of prepare and gather, which walk over blocks of keys and values, and those of
        forward and sweep, which hold a block of values and all keys.
    """
    widest = max(Dk, Dv)
    walking, holding = next(warps for width, warps in WARPS.items() if widest <= width)
    common = {"ERASE": erase, "DECAY": decay, "C": CHUNK, "num_stages": 1}
    common["BV"] = min(BLOCK, padded(Dv))
    BK = padded(Dk)
    walk = common | {"BK": min(BLOCK, BK), "num_warps": walking}
    return walk, common | {"BK": BK, "num_warps": holding}


def product_of(v: Tensor) -> str:
    """Look up how operands are multiplied; the interpreter does not round them."""
    return "ieee" if interpreted() else PRODUCTS[v.dtype]


@no_type_check
def _forward(q, k, v, erase, write, log_decay, state, save):
    (B, L, H, Dv), (G, Dk) = v.shape, k.shape[2:]
    o, final, P, T, U, states = _allocate(q, k, v, erase, write, log_decay, state, save)
    if 0 in (B, H, Dk, Dv):
        return o.zero_(), final.zero_(), P, T, U, states
    q, k, v_, e, w, g, S = (readable(x, v) for x in (q, k, v, erase, write, log_decay, state))
    o = writable(v, *o.shape, dtype=v.dtype) if interpreted() else o
    walk, hold = options_of(Dk, Dv, erase=erase is not None, decay=log_decay is not None)
    product = product_of(v)
    with torch.cuda.device_of(v):
        if L:
            del walk["BV"]
            prepare_kernel[(B * H * triton.cdiv(L, CHUNK),)](
                *(q, k, e, g, P, T, L, H, G, Dk), LEVELS=CHUNK.bit_length() - 1, PRODUCT=product, **walk
            )
        forward_kernel[(B * H, triton.cdiv(Dv, hold["BV"]))](
            *(q, k, v_, e, w, g, S, P, T, o, final, U, states, L, H, G, Dk, Dv), SAVE=save, PRODUCT=product, **hold
        )
    return o.to(v.dtype), final, P, T, U, states


@no_type_check  # sizes are symbols while torch.compile traces
def _allocate(q, k, v, erase, write, log_decay, state, save):
    """Make room for o, final, P, T, U and states."""
    (B, L, H, Dv), Dk = v.shape, k.shape[-1]
    inverted = 0 if erase is None else L
    return (
        v.new_empty(B, L, H, Dv),
        writable(v, B, H, Dk, Dv),
        writable(v, B, L, H, CHUNK),
        writable(v, B, inverted, H, CHUNK),
        writable(v, B, inverted if save else 0, H, Dv),
        writable(v, B, H, -(-L // CHUNK) if save else 0, Dk, Dv),
    )


@no_type_check
def _backward(q, k, v, erase, write, log_decay, state, P, T, U, states, d_o, d_final):
    (B, L, H, Dv), (G, Dk) = v.shape, k.shape[2:]
    inputs = (q, k, v, erase, write, log_decay, state)
    if 0 in (B, L, H, Dk, Dv):
        grads = [x.zero_() for x in allocate_gradients(*inputs)]
        if L == 0 and d_final is not None:
            grads[-1] = d_final.to(state.dtype, copy=True)
        return tuple(grads)
    shared = torch.float32 if H > G else None
    d_q, d_k = (writable(v, B, L, H, Dk, dtype=shared or x.dtype) for x in (q, k))
    d_v, d_erase, d_write, d_log_decay, d_state = (
        writable(v, *x.shape, dtype=x.dtype) for x in allocate_gradients(*inputs)[2:]
    )
    d_X, d_states = writable(v, *v.shape), writable(v, *states.shape)
    walk, hold = options_of(Dk, Dv, erase=erase is not None, decay=log_decay is not None)
    product, sizes = product_of(v), (L, H, G, Dk, Dv)
    d_o = torch.zeros_like(v) if d_o is None else d_o
    q_, k_, v_, e, w, g, dO, dF = (readable(x, v) for x in (*inputs[:-1], d_o, d_final))
    with torch.cuda.device_of(v):
        sweep_kernel[(B * H, triton.cdiv(Dv, hold["BV"]))](
            *(q_, k_, e, g, P, T, dO, dF, d_X, d_states, d_state, *sizes),
            FINAL=d_final is not None,
            PRODUCT=product,
            **hold,
        )
        gather_kernel[(B * H * triton.cdiv(L, CHUNK),)](
            *(q_, k_, v_, e, w, g, P, U, states, dO, d_X, d_states),
            *(d_q, d_k, d_v, d_erase, d_write, d_log_decay, *sizes),
            PRODUCT=product,
            **walk,
        )
    if H > G:
        d_q, d_k = (x.unflatten(2, (G, H // G)).sum(3) for x in (d_q, d_k))
    grads = (d_q, d_k, d_v, d_erase, d_write, d_log_decay, d_state)
    pairs = zip(grads, inputs, strict=True)
    return tuple(grad if x is None else grad.to(x.dtype) for grad, x in pairs)


_run = with_gradients(
    *("delta_rule", "triton", "q k v erase? write log_decay? state"),
    forward=_forward,
    backward=_backward,
    allocate=_allocate,
    kept=(0, 0, 0, 0),
)


@triton.jit(do_not_specialize=["L", "H", "G"])
@no_type_check
def prepare_kernel(
    q_ptr,
    k_ptr,
    erase_ptr,
    log_decay_ptr,
    P_ptr,
    T_ptr,
    L,
    H,
    G,
    Dk: tl.constexpr,
    ERASE: tl.constexpr,
    DECAY: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Fill P, and with ERASE also T: all that does not depend on the state, chunk by chunk."""
    chunks = tl.cdiv(L, C)
    head, n = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    row = (head // H * L + n * C) * H + head % H
    row_k = (head // H * L + n * C) * G + head % H // (H // G)
    i = tl.arange(0, C)
    at, here = row + i * H, n * C + i < L
    P, A = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for first in range(0, Dk, BK):
        x = first + tl.arange(0, BK)
        at_k, in_k = (row_k + i * G)[None, :] * Dk + x[:, None], here[None, :] & (x[:, None] < Dk)
        K = tl.load(k_ptr + at_k, mask=in_k, other=0.0)
        P += dot(tl.trans(tl.load(q_ptr + at_k, mask=in_k, other=0.0)), K, PRODUCT)
        if ERASE:
            A += dot(tl.trans(K), K, PRODUCT)
    P = tl.where(i[:, None] >= i[None, :], P, 0.0)
    if DECAY:
        pairs = decay_pairs(load_tokens(log_decay_ptr, at, here), C)
        P *= pairs
    at_P = at[:, None] * C + i[None, :]
    tl.store(P_ptr + at_P, P, mask=here[:, None])
    if ERASE:
        A = tl.where(i[:, None] > i[None, :], A, 0.0)
        if DECAY:
            A *= pairs
        A *= load_tokens(erase_ptr, at, here)[:, None]
        tl.store(T_ptr + at_P, unit_lower_inverse(A, C, LEVELS), mask=here[:, None])


@triton.jit(do_not_specialize=["L", "H", "G"])
@no_type_check
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    erase_ptr,
    write_ptr,
    log_decay_ptr,
    state_ptr,
    P_ptr,
    T_ptr,
    o_ptr,
    final_ptr,
    U_ptr,
    states_ptr,
    L,
    H,
    G,
    Dk: tl.constexpr,
    Dv: tl.constexpr,
    ERASE: tl.constexpr,
    DECAY: tl.constexpr,
    SAVE: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Fill o and final, from the first chunk to the last; with SAVE also U and states."""
    head = tl.program_id(0).to(tl.int64)
    row = (head // H) * L * H + head % H
    row_k = (head // H) * L * G + head % H // (H // G)
    i, x, y = tl.arange(0, C), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    at_k, at_v = x[:, None] + (i * G * Dk)[None, :], y[:, None] + (i * H * Dv)[None, :]
    at_P = (i * H)[:, None] * C + i[None, :]
    at_S, in_S = x[None, :] * Dv + y[:, None], (x[None, :] < Dk) & (y[:, None] < Dv)
    at_chunk = head * tl.cdiv(L, C) * Dk * Dv
    S = tl.load(state_ptr + head * Dk * Dv + at_S, mask=in_S, other=0.0).to(tl.float32)
    for n in range(tl.cdiv(L, C)):
        if SAVE:
            tl.store(states_ptr + at_chunk + at_S, S, mask=in_S)
        here = n * C + i < L
        in_k, in_v = here[None, :] & (x[:, None] < Dk), here[None, :] & (y[:, None] < Dv)
        K = tl.load(k_ptr + row_k * Dk + at_k, mask=in_k, other=0.0)
        Q = tl.load(q_ptr + row_k * Dk + at_k, mask=in_k, other=0.0)
        V = tl.load(v_ptr + row * Dv + at_v, mask=in_v, other=0.0)
        U = V * load_tokens(write_ptr, row + i * H, here)[None, :]
        if ERASE:
            both = tl.reshape(tl.join(K.to(tl.float32), Q.to(tl.float32)), (BK, 2 * C))
            both = long_dot(S, both, PRODUCT)
            recalled, read = tl.split(tl.reshape(both, (BV, C, 2)))
        else:
            read = long_dot(S, Q, PRODUCT)
        if DECAY:
            steps = load_tokens(log_decay_ptr, row + i * H, here)
            inside, rest, whole = decay_ends(steps, C)
            S, read = S * whole, read * inside[None, :]
        if ERASE:
            e = load_tokens(erase_ptr, row + i * H, here)
            if DECAY:
                e *= inside
            T = tl.load(T_ptr + row * C + at_P, mask=here[:, None], other=0.0)
            U = dot(U - recalled * e[None, :], tl.trans(T), PRODUCT)
            if SAVE:
                tl.store(U_ptr + row * Dv + at_v, U, mask=in_v)
        P = tl.load(P_ptr + row * C + at_P, mask=here[:, None], other=0.0)
        read += dot(U, tl.trans(P), PRODUCT)
        tl.store(o_ptr + row * Dv + at_v, read.to(o_ptr.dtype.element_ty), mask=in_v)
        if DECAY:
            U = U * rest[None, :]
        S += dot(U, tl.trans(K), PRODUCT)
        row += C * H
        row_k += C * G
        at_chunk += Dk * Dv
    tl.store(final_ptr + head * Dk * Dv + at_S, S, mask=in_S)


@triton.jit(do_not_specialize=["L", "H", "G"])
@no_type_check
def sweep_kernel(
    q_ptr,
    k_ptr,
    erase_ptr,
    log_decay_ptr,
    P_ptr,
    T_ptr,
    d_o_ptr,
    d_final_ptr,
    d_X_ptr,
    d_states_ptr,
    d_state_ptr,
    L,
    H,
    G,
    Dk: tl.constexpr,
    Dv: tl.constexpr,
    FINAL: tl.constexpr,
    ERASE: tl.constexpr,
    DECAY: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Fill d_X, d_states and d_state, from the last chunk to the first."""
    head = tl.program_id(0).to(tl.int64)
    last = (tl.cdiv(L, C) - 1).to(tl.int64)
    row = (head // H * L + last * C) * H + head % H
    row_k = (head // H * L + last * C) * G + head % H // (H // G)
    i, x, y = tl.arange(0, C), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    at_k, at_v = x[:, None] + (i * G * Dk)[None, :], y[:, None] + (i * H * Dv)[None, :]
    at_P = (i * H)[:, None] * C + i[None, :]
    at_S, in_S = x[None, :] * Dv + y[:, None], (x[None, :] < Dk) & (y[:, None] < Dv)
    at_chunk = (head * (last + 1) + last) * Dk * Dv
    dS = tl.zeros((BV, BK), tl.float32)
    if FINAL:
        dS += tl.load(d_final_ptr + head * Dk * Dv + at_S, mask=in_S, other=0.0)
    for back in range(tl.cdiv(L, C)):
        tl.store(d_states_ptr + at_chunk + at_S, dS, mask=in_S)
        here = (last - back) * C + i < L
        in_k, in_v = here[None, :] & (x[:, None] < Dk), here[None, :] & (y[:, None] < Dv)
        K = tl.load(k_ptr + row_k * Dk + at_k, mask=in_k, other=0.0)
        dX = long_dot(dS, K, PRODUCT)
        if DECAY:
            steps = load_tokens(log_decay_ptr, row + i * H, here)
            inside, rest, whole = decay_ends(steps, C)
            dX, dS = dX * rest[None, :], dS * whole
        dO = tl.load(d_o_ptr + row * Dv + at_v, mask=in_v, other=0.0)
        P = tl.load(P_ptr + row * C + at_P, mask=here[:, None], other=0.0)
        dX += dot(dO, P, PRODUCT)
        if ERASE:
            T = tl.load(T_ptr + row * C + at_P, mask=here[:, None], other=0.0)
            dX = dot(dX, T, PRODUCT)
        tl.store(d_X_ptr + row * Dv + at_v, dX, mask=in_v)
        Q = tl.load(q_ptr + row_k * Dk + at_k, mask=in_k, other=0.0)
        if DECAY:
            dO = dO * inside[None, :]
        dS += dot(dO, tl.trans(Q), PRODUCT)
        if ERASE:
            e = load_tokens(erase_ptr, row + i * H, here)
            if DECAY:
                e *= inside
            dS -= dot(dX * e[None, :], tl.trans(K), PRODUCT)
        row -= C * H
        row_k -= C * G
        at_chunk -= Dk * Dv
    at_S += head * Dk * Dv
    tl.store(d_state_ptr + at_S, dS.to(d_state_ptr.dtype.element_ty), mask=in_S)


@triton.jit(do_not_specialize=["L", "H", "G"])
@no_type_check
def gather_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    erase_ptr,
    write_ptr,
    log_decay_ptr,
    P_ptr,
    U_ptr,
    states_ptr,
    d_o_ptr,
    d_X_ptr,
    d_states_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    d_erase_ptr,
    d_write_ptr,
    d_log_decay_ptr,
    L,
    H,
    G,
    Dk: tl.constexpr,
    Dv: tl.constexpr,
    ERASE: tl.constexpr,
    DECAY: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Fill the gradient of every input but the state, each chunk by itself."""
    chunks = tl.cdiv(L, C)
    head, n = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    row = (head // H * L + n * C) * H + head % H
    row_k = (head // H * L + n * C) * G + head % H // (H // G)
    at_chunk = (head * chunks + n) * Dk * Dv
    i = tl.arange(0, C)
    at, here = row + i * H, n * C + i < L
    w = load_tokens(write_ptr, at, here)
    d_P, d_A, d_write = along_values(v_ptr, U_ptr, d_o_ptr, d_X_ptr, d_v_ptr, at, here, w, Dv, ERASE, C, BV, PRODUCT)
    store_tokens(d_write_ptr, at, here, d_write)
    by_keys = tl.zeros((C,), tl.float32)
    gram = tl.zeros((C, C), tl.float32)
    if ERASE:
        e = load_tokens(erase_ptr, at, here)
    if DECAY:
        steps = load_tokens(log_decay_ptr, at, here)
        inside, rest, whole = decay_ends(steps, C)
        pairs = decay_pairs(steps, C)
        at_P = at[:, None] * C + i[None, :]
        by_pairs = d_P * tl.load(P_ptr + at_P, mask=here[:, None], other=0.0)
        by_inside, by_rest = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        by_whole = tl.zeros((BK,), tl.float32)
        d_P, d_A = d_P * pairs, d_A * pairs
    for first in range(0, Dk, BK):
        x = first + tl.arange(0, BK)
        d_q, d_k, d_recall, d_whole = along_states(
            *(v_ptr, U_ptr, states_ptr, d_o_ptr, d_X_ptr, d_states_ptr),
            *(at, here, w, at_chunk, x, Dk, Dv, ERASE, DECAY, C, BK, BV, PRODUCT),
        )
        in_k, at_d = here[None, :] & (x[:, None] < Dk), at[None, :] * Dk + x[:, None]
        at_k = (row_k + i * G)[None, :] * Dk + x[:, None]
        Q = tl.load(q_ptr + at_k, mask=in_k, other=0.0)
        K = tl.load(k_ptr + at_k, mask=in_k, other=0.0)
        if DECAY:
            d_q, d_k = d_q * inside[None, :], d_k * rest[None, :]
            by_inside += tl.sum(d_q * Q, axis=0)
            by_rest += tl.sum(d_k * K, axis=0)
            by_whole += d_whole
        d_q += dot(K, tl.trans(d_P), PRODUCT)
        d_k += dot(Q, d_P, PRODUCT)
        if ERASE:
            if DECAY:
                d_recall *= inside[None, :]
            by_keys += tl.sum(d_recall * K, axis=0)
            gram += dot(tl.trans(K), K, PRODUCT)
            through_A = d_A * e[:, None]
            d_k += d_recall * e[None, :] + dot(K, through_A + tl.trans(through_A), PRODUCT)
        tl.store(d_q_ptr + at_d, d_q.to(d_q_ptr.dtype.element_ty), mask=in_k)
        tl.store(d_k_ptr + at_d, d_k.to(d_k_ptr.dtype.element_ty), mask=in_k)
    if ERASE:
        d_A *= gram
        store_tokens(d_erase_ptr, at, here, tl.sum(d_A, axis=1) + by_keys)
    if DECAY:
        if ERASE:
            by_inside += by_keys * e
            by_pairs += d_A * e[:, None]
        by_whole = tl.sum(by_whole, axis=0) * whole
        d_log_decay = log_decay_gradient(by_inside, by_rest, by_pairs, by_whole, C)
        store_tokens(d_log_decay_ptr, at, here, d_log_decay)


@triton.jit
@no_type_check
def along_values(
    v_ptr,
    U_ptr,
    d_o_ptr,
    d_X_ptr,
    d_v_ptr,
    at,
    here,
    w,
    Dv: tl.constexpr,
    ERASE: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Fill d_v; give the gradients of P, of A without erase, and of write: sums over values."""
    d_P, d_A = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    d_write = tl.zeros((C,), tl.float32)
    for first in range(0, Dv, BV):
        y = first + tl.arange(0, BV)
        at_v, in_v = at[None, :] * Dv + y[:, None], here[None, :] & (y[:, None] < Dv)
        V = tl.load(v_ptr + at_v, mask=in_v, other=0.0)
        dX = tl.load(d_X_ptr + at_v, mask=in_v, other=0.0)
        tl.store(d_v_ptr + at_v, (dX * w[None, :]).to(d_v_ptr.dtype.element_ty), mask=in_v)
        d_write += tl.sum(dX * V, axis=0)
        U = V * w[None, :]
        if ERASE:
            U = tl.load(U_ptr + at_v, mask=in_v, other=0.0)
            d_A -= dot(tl.trans(dX), U, PRODUCT)
        dO = tl.load(d_o_ptr + at_v, mask=in_v, other=0.0)
        d_P += dot(tl.trans(dO), U, PRODUCT)
    i = tl.arange(0, C)
    d_P = tl.where(i[:, None] >= i[None, :], d_P, 0.0)
    d_A = tl.where(i[:, None] > i[None, :], d_A, 0.0)
    return d_P, d_A, d_write


@triton.jit
@no_type_check
def along_states(
    v_ptr,
    U_ptr,
    states_ptr,
    d_o_ptr,
    d_X_ptr,
    d_states_ptr,
    at,
    here,
    w,
    at_chunk,
    x,
    Dk: tl.constexpr,
    Dv: tl.constexpr,
    ERASE: tl.constexpr,
    DECAY: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Give S dO^T, dS U^T, -S dX^T and the rows of S * dS, for the rows x of the states."""
    d_q, d_k = tl.zeros((BK, C), tl.float32), tl.zeros((BK, C), tl.float32)
    d_recall, d_whole = tl.zeros((BK, C), tl.float32), tl.zeros((BK,), tl.float32)
    for first in range(0, Dv, BV):
        y = first + tl.arange(0, BV)
        at_v, in_v = at[None, :] * Dv + y[:, None], here[None, :] & (y[:, None] < Dv)
        at_S, in_S = x[:, None] * Dv + y[None, :], (x[:, None] < Dk) & (y[None, :] < Dv)
        S = tl.load(states_ptr + at_chunk + at_S, mask=in_S, other=0.0)
        dO = tl.load(d_o_ptr + at_v, mask=in_v, other=0.0)
        d_q += dot(S, dO, PRODUCT)
        if ERASE:
            dX = tl.load(d_X_ptr + at_v, mask=in_v, other=0.0)
            d_recall -= dot(S, dX, PRODUCT)
            U = tl.load(U_ptr + at_v, mask=in_v, other=0.0)
        else:
            U = tl.load(v_ptr + at_v, mask=in_v, other=0.0) * w[None, :]
        dS = tl.load(d_states_ptr + at_chunk + at_S, mask=in_S, other=0.0)
        d_k += dot(dS, U, PRODUCT)
        if DECAY:
            d_whole += tl.sum(S * dS, axis=1)
    return d_q, d_k, d_recall, d_whole
