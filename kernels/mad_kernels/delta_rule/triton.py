"""The delta rule on a GPU: one launch each way, one program per head and block of value columns.

A program walks over the chunks of its head with the state in registers. Equations and letters are
those of `chunked`, with everything transposed in registers: Q and K [Dk, C], V, X, U and O [Dv, C],
S [Dv, Dk]. So the rows of every large product are features, which spread over the warps; tokens
are too few for that.

    A = StrictTril(diag(erase) (K^T K * D))          T = (I + A)^-1
    X = V diag(write) - S K diag(erase exp(G))       U = X T^T
    O = S Q diag(exp(G)) + U (Q^T K * D)^T           S <- exp(G_C) S + U diag(exp(G_C - G)) K^T

The backward walks from the last chunk with dS in registers. It reads back T, U and the states that
enter the chunks, so it inverts nothing and repeats no step of the forward.

Without erase, U is V diag(write) and nothing is inverted: that is `ssd`, where G groups of
neighbouring heads share their q and k.

Value columns are independent going forward. Going back, everything but d v sums over them; where a
head is cut into blocks of columns, or shares its q and k, each program writes its own share in
float32, and the shares are added in a fixed order afterwards. No atomics: equal inputs give equal
bits. Tokens past the end are read as zeros, and change nothing.

float32 values are multiplied at float32 precision. With bfloat16 values the operands of products
are rounded (`PRODUCTS`); sums, gates, the inverse and the state stay float32.

Memory of the backward, in float32 numbers per head: L (Dv + C) + (L/C) Dk Dv.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mad_kernels.blocks import (
    Tile,
    decay_factors,
    dot,
    fold,
    interpreted,
    log_decay_gradient,
    padded,
    readable,
    unfold,
    unit_lower_inverse,
    writable,
)

# By the larger padded width: forward and backward. Fixed, so that no run depends on a timing.
TILES = {
    16: (Tile(16, 16, 2, 1), Tile(16, 16, 2, 1)),
    32: (Tile(16, 32, 2, 2), Tile(16, 32, 4, 1)),
    64: (Tile(16, 64, 4, 2), Tile(16, 64, 4, 1)),
    128: (Tile(16, 64, 4, 2), Tile(16, 64, 8, 1)),
}
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
    inputs = (q, k, v, erase, write, log_decay, state)
    wanted = any(x is not None and x.requires_grad for x in inputs)
    save = wanted and torch.is_grad_enabled()
    o, final, *_ = _DeltaRule.apply(*inputs, save)
    return o, final


@no_type_check  # sizes are symbols while torch.compile traces
def tiles_of(Dk: int, Dv: int) -> tuple[Tile, Tile]:
    """Look up the tiles of the forward and the backward for a head's widths, at most 128."""
    return next(tiles for width, tiles in TILES.items() if max(Dk, Dv) <= width)


def product_of(v: Tensor) -> str:
    """Look up how operands are multiplied; the interpreter does not round them."""
    return "ieee" if interpreted() else PRODUCTS[v.dtype]


@torch.library.custom_op("mad_kernels::delta_rule_forward", mutates_args=())
@no_type_check
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    write: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, L, H, Dv), (G, Dk) = v.shape, k.shape[2:]
    o, final, U, T, states = _room(q, k, v, erase, write, log_decay, state, save)
    if 0 in (B, H, Dk, Dv):
        return o.zero_().to(v.dtype), final.zero_(), U, T, states
    tile, _ = tiles_of(Dk, Dv)
    BV = min(tile.columns, padded(Dv))
    with torch.cuda.device_of(v):
        forward_kernel[(B * H, triton.cdiv(Dv, BV))](
            *(readable(x, v) for x in (q, k, v, erase, write, log_decay, state)),
            *(o, final, U, T, states, L, H, G, Dk, Dv),
            ERASE=erase is not None,
            DECAY=log_decay is not None,
            SAVE=save,
            C=tile.C,
            LEVELS=tile.C.bit_length() - 1,
            BK=padded(Dk),
            BV=BV,
            PRODUCT=product_of(v),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return o.to(v.dtype), final, U, T, states


@_forward.register_fake
@no_type_check
def _forward_fake(q, k, v, erase, write, log_decay, state, save):
    o, *others = _room(q, k, v, erase, write, log_decay, state, save)
    return o.to(v.dtype), *others


@no_type_check
def _room(q, k, v, erase, write, log_decay, state, save):
    (B, L, H, Dv), Dk = v.shape, k.shape[-1]
    C = tiles_of(Dk, Dv)[0].C
    kept = B if save else 0
    inverted = kept if erase is not None else 0
    return (
        writable(v, B, L, H, Dv, dtype=v.dtype),
        writable(v, B, H, Dk, Dv),
        writable(v, B, L if inverted else 0, H, Dv),
        writable(v, B, L if inverted else 0, H, C),
        writable(v, B, H, -(-L // C) if kept else 0, Dk, Dv),
    )


@torch.library.custom_op("mad_kernels::delta_rule_backward", mutates_args=())
@no_type_check
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    write: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    U: Tensor,
    T: Tensor,
    states: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, L, H, Dv), (G, Dk) = v.shape, k.shape[2:]
    inputs = (q, k, v, erase, write, log_decay, state)
    if 0 in (B, L, H, Dk, Dv):
        grads = [_like(x, v) for x in inputs]
        if L == 0 and d_final is not None:
            grads[-1] = d_final.to(state.dtype, copy=True)
        return tuple(grads)
    _, tile = tiles_of(Dk, Dv)
    BV = min(tile.columns, padded(Dv))
    shares = triton.cdiv(Dv, BV)
    partial = shares > 1
    rows = [writable(v, shares, B, L, H, dtype=_dtype(x, partial)) for x in inputs]
    narrow = [writable(v, shares, B, L, H, Dk, dtype=_dtype(x, partial or H > G)) for x in (q, k)]
    d_v, d_state = (
        writable(v, B, L, H, Dv, dtype=v.dtype),
        writable(v, *state.shape, dtype=state.dtype),
    )
    with torch.cuda.device_of(v):
        backward_kernel[(B * H, shares)](
            *(readable(x, v) for x in (*inputs[:-1], U, T, states, d_o, d_final)),
            *(*narrow, d_v, rows[3], rows[4], rows[5], d_state, B, L, H, G, Dk, Dv),
            FINAL=d_final is not None,
            ERASE=erase is not None,
            DECAY=log_decay is not None,
            C=tile.C,
            BK=padded(Dk),
            BV=BV,
            PRODUCT=product_of(v),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    by_group = [x.unflatten(3, (G, H // G)) for x in narrow]
    d_q, d_k = (_added(x, (0, 4), y) for x, y in zip(by_group, (q, k), strict=True))
    scalars = zip(rows[3:6], inputs[3:6], strict=True)
    d_erase, d_write, d_log_decay = (_added(x, (0,), y) for x, y in scalars)
    return d_q, d_k, d_v.to(v.dtype), d_erase, d_write, d_log_decay, d_state.to(state.dtype)


@_backward.register_fake
@no_type_check
def _backward_fake(q, k, v, erase, write, log_decay, state, U, T, states, d_o, d_final):
    return tuple(_like(x, v) for x in (q, k, v, erase, write, log_decay, state))


def _like(x: Tensor | None, v: Tensor) -> Tensor:
    """Make zeros for the gradient of an operand; one that is None has an empty gradient."""
    return v.new_zeros(v.shape[0], 0) if x is None else x.new_zeros(x.shape)


def _dtype(x: Tensor | None, partial: bool) -> torch.dtype:
    return torch.float32 if partial or x is None else x.dtype


def _added(shares: Tensor, axes: tuple[int, ...], like: Tensor | None) -> Tensor:
    """Add up the shares of a gradient, in the dtype of its operand."""
    if like is None:
        return shares.new_empty(shares.shape[1], 0)
    single = all(shares.shape[axis] == 1 for axis in axes)
    total = shares.view(like.shape) if single else shares.sum(axes)
    return total.to(like.dtype)


@no_type_check
def _remember(ctx, inputs, output):
    *tensors, save = inputs
    _, _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.saved = save
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


@no_type_check
def _gradients(ctx, d_o, d_final, *_):
    *inputs, U, T, states = ctx.saved_tensors
    if not ctx.saved:  # a transform hid from us that gradients were wanted
        with torch.no_grad():
            _, _, U, T, states = _forward(*inputs, True)
    d_o = torch.zeros_like(inputs[2]) if d_o is None else d_o
    # torch.compile traces first-order gradients only, and no Function inside another.
    run = _backward if torch.compiler.is_compiling() else _DeltaRuleBackward.apply
    grads = run(*inputs, U, T, states, d_o, d_final)
    pairs = zip(grads, inputs, strict=True)
    return *(None if x is None else grad for grad, x in pairs), None


# Functions, not register_autograd: torch.func's transforms refuse an operator with gradients of its
# own, and take a Function around operators without.
class _DeltaRule(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_remember)
    backward = staticmethod(_gradients)

    @staticmethod
    @no_type_check
    def forward(*arguments):
        with torch.no_grad():
            return _forward(*arguments)


class _DeltaRuleBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @no_type_check
    def forward(*arguments):
        with torch.no_grad():
            return _backward(*arguments)

    @staticmethod
    @no_type_check
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    @no_type_check
    def backward(ctx, *grads):
        raise RuntimeError(
            "delta_rule: the triton backend has first-order gradients only: take 'reference'"
        )


@_forward.register_vmap
@no_type_check
def _forward_vmap(info, in_dims, *arguments):
    return unfold(info.batch_size, _forward(*fold(info.batch_size, in_dims, arguments)))


@_backward.register_vmap
@no_type_check
def _backward_vmap(info, in_dims, *arguments):
    return unfold(info.batch_size, _backward(*fold(info.batch_size, in_dims, arguments)))


@triton.jit(do_not_specialize=["L"])
@no_type_check
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    erase_ptr,
    write_ptr,
    log_decay_ptr,
    state_ptr,
    o_ptr,
    final_ptr,
    U_ptr,
    T_ptr,
    states_ptr,
    L,
    H: tl.constexpr,
    G: tl.constexpr,
    Dk: tl.constexpr,
    Dv: tl.constexpr,
    ERASE: tl.constexpr,
    DECAY: tl.constexpr,
    SAVE: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Fill o and final; with SAVE also U, T and states, for the backward."""
    head = tl.program_id(0).to(tl.int64)
    row = (head // H) * L * H + head % H
    row_k = (head // H) * L * G + head % H // (H // G)
    chunks = tl.cdiv(L, C)
    i = tl.arange(0, C)
    x, y = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    lower, below = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    at, at_T = i * H, (i * H)[:, None] * C + i[None, :]
    at_k, at_v = x[:, None] + (i * G * Dk)[None, :], y[:, None] + (i * H * Dv)[None, :]
    at_S, in_S = x[None, :] * Dv + y[:, None], (x[None, :] < Dk) & (y[:, None] < Dv)
    square = head * Dk * Dv
    S = tl.load(state_ptr + square + at_S, mask=in_S, other=0.0).to(tl.float32)
    for n in range(chunks):
        here = n * C + i < L
        in_k, in_v = here[None, :] & (x[:, None] < Dk), here[None, :] & (y[:, None] < Dv)
        Q = tl.load(q_ptr + row_k * Dk + at_k, mask=in_k, other=0.0)
        K = tl.load(k_ptr + row_k * Dk + at_k, mask=in_k, other=0.0)
        V = tl.load(v_ptr + row * Dv + at_v, mask=in_v, other=0.0)
        w = tl.load(write_ptr + row + at, mask=here, other=0.0).to(tl.float32)
        scores, read = dot(tl.trans(Q), K, PRODUCT), dot(S, Q, PRODUCT)
        if DECAY:
            steps = tl.load(log_decay_ptr + row + at, mask=here, other=0.0).to(tl.float32)
            inside, rest, pairs, whole = decay_factors(steps, C)
            scores, read = scores * pairs, read * inside[None, :]
        U = V * w[None, :]
        if ERASE:
            e = tl.load(erase_ptr + row + at, mask=here, other=0.0).to(tl.float32)
            gram, recalled = dot(tl.trans(K), K, PRODUCT), dot(S, K, PRODUCT)
            if DECAY:
                gram, recalled = gram * pairs, recalled * inside[None, :]
            T = unit_lower_inverse(tl.where(below, gram * e[:, None], 0.0), C, LEVELS)
            U = dot(U - recalled * e[None, :], tl.trans(T), PRODUCT)
        read += dot(U, tl.trans(tl.where(lower, scores, 0.0)), PRODUCT)
        tl.store(o_ptr + row * Dv + at_v, read.to(o_ptr.dtype.element_ty), mask=in_v)
        if SAVE:
            tl.store(states_ptr + square * chunks + n * Dk * Dv + at_S, S, mask=in_S)
            if ERASE:
                tl.store(U_ptr + row * Dv + at_v, U, mask=in_v)
                own = here[:, None] & (tl.program_id(1) == 0)
                tl.store(T_ptr + row * C + at_T, T, mask=own)
        if DECAY:
            S, U = S * whole, U * rest[None, :]
        S += dot(U, tl.trans(K), PRODUCT)
        row += C * H
        row_k += C * G
    tl.store(final_ptr + square + at_S, S, mask=in_S)


@triton.jit(do_not_specialize=["B", "L"])
@no_type_check
def backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    erase_ptr,
    write_ptr,
    log_decay_ptr,
    U_ptr,
    T_ptr,
    states_ptr,
    d_o_ptr,
    d_final_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    d_erase_ptr,
    d_write_ptr,
    d_log_decay_ptr,
    d_state_ptr,
    B,
    L,
    H: tl.constexpr,
    G: tl.constexpr,
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
    """Fill the gradient of every input, from the last chunk to the first."""
    head = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(L, C)
    last = (chunks - 1).to(tl.int64) * C
    row = (head // H) * L * H + head % H + last * H
    row_k = (head // H) * L * G + head % H // (H // G) + last * G
    share = tl.program_id(1).to(tl.int64) * B * L * H
    i = tl.arange(0, C)
    x, y = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    lower, below = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    at, at_T = i * H, (i * H)[:, None] * C + i[None, :]
    at_d, at_k = x[:, None] + (i * H * Dk)[None, :], x[:, None] + (i * G * Dk)[None, :]
    at_v = y[:, None] + (i * H * Dv)[None, :]
    at_S, in_S = x[None, :] * Dv + y[:, None], (x[None, :] < Dk) & (y[:, None] < Dv)
    square = head * Dk * Dv
    if FINAL:
        dS = tl.load(d_final_ptr + square + at_S, mask=in_S, other=0.0).to(tl.float32)
    else:
        dS = tl.zeros((BV, BK), tl.float32)
    for back in range(chunks):
        n = chunks - 1 - back
        here = n * C + i < L
        in_k, in_v = here[None, :] & (x[:, None] < Dk), here[None, :] & (y[:, None] < Dv)
        Q = tl.load(q_ptr + row_k * Dk + at_k, mask=in_k, other=0.0)
        K = tl.load(k_ptr + row_k * Dk + at_k, mask=in_k, other=0.0)
        V = tl.load(v_ptr + row * Dv + at_v, mask=in_v, other=0.0)
        w = tl.load(write_ptr + row + at, mask=here, other=0.0).to(tl.float32)
        dO = tl.load(d_o_ptr + row * Dv + at_v, mask=in_v, other=0.0)
        scores = tl.where(lower, dot(tl.trans(Q), K, PRODUCT), 0.0)
        dX = dot(dS, K, PRODUCT)
        if DECAY:
            steps = tl.load(log_decay_ptr + row + at, mask=here, other=0.0).to(tl.float32)
            inside, rest, pairs, whole = decay_factors(steps, C)
            scores, dX = scores * pairs, dX * rest[None, :]
        dX += dot(dO, scores, PRODUCT)
        if ERASE:
            U = tl.load(U_ptr + row * Dv + at_v, mask=in_v, other=0.0)
            T = tl.load(T_ptr + row * C + at_T, mask=here[:, None], other=0.0)
            dX = dot(dX, T, PRODUCT)
        else:
            U = V * w[None, :]
        d_write = tl.sum(dX * V, axis=0).to(d_write_ptr.dtype.element_ty)
        tl.store(d_write_ptr + share + row + at, d_write, mask=here)
        d_v = (dX * w[None, :]).to(d_v_ptr.dtype.element_ty)
        tl.store(d_v_ptr + row * Dv + at_v, d_v, mask=in_v)

        S = tl.load(states_ptr + square * chunks + n * Dk * Dv + at_S, mask=in_S, other=0.0)
        d_scores = tl.where(lower, dot(tl.trans(dO), U, PRODUCT), 0.0)
        d_q = dot(tl.trans(S), dO, PRODUCT)
        d_k = dot(tl.trans(dS), U, PRODUCT)
        if DECAY:
            by_rest = tl.sum(d_k * K, axis=0) * rest
            by_inside = tl.sum(d_q * Q, axis=0) * inside
            by_whole = tl.sum(tl.sum(S * dS, axis=1), axis=0) * whole
            by_pairs = d_scores * scores
            d_scores, dS = d_scores * pairs, dS * whole
            d_q, d_k = d_q * inside[None, :], d_k * rest[None, :]
            dO = dO * inside[None, :]
        d_q += dot(K, tl.trans(d_scores), PRODUCT)
        tl.store(d_q_ptr + (share + row) * Dk + at_d, d_q.to(d_q_ptr.dtype.element_ty), mask=in_k)
        d_k += dot(Q, d_scores, PRODUCT)
        dS += dot(dO, tl.trans(Q), PRODUCT)
        if ERASE:
            e = tl.load(erase_ptr + row + at, mask=here, other=0.0).to(tl.float32)
            gram = tl.where(below, dot(tl.trans(K), K, PRODUCT), 0.0)
            d_gram = tl.where(below, -dot(tl.trans(dX), U, PRODUCT), 0.0)  # by A, without erase
            d_erased = -dot(tl.trans(S), dX, PRODUCT)
            if DECAY:
                gram, d_erased, dX = gram * pairs, d_erased * inside[None, :], dX * inside[None, :]
            by_erased = tl.sum(d_erased * K, axis=0)
            by_gram = d_gram * gram
            d_erase = tl.sum(by_gram, axis=1) + by_erased
            d_erase = d_erase.to(d_erase_ptr.dtype.element_ty)
            tl.store(d_erase_ptr + share + row + at, d_erase, mask=here)
            d_gram *= e[:, None]
            if DECAY:
                by_inside += by_erased * e
                by_pairs += by_gram * e[:, None]
                d_gram *= pairs
            d_k += d_erased * e[None, :] + dot(K, d_gram + tl.trans(d_gram), PRODUCT)
            dS -= dot(dX * e[None, :], tl.trans(K), PRODUCT)
        if DECAY:
            d_log_decay = log_decay_gradient(by_inside, by_rest, by_pairs, by_whole, C)
            d_log_decay = d_log_decay.to(d_log_decay_ptr.dtype.element_ty)
            tl.store(d_log_decay_ptr + share + row + at, d_log_decay, mask=here)
        tl.store(d_k_ptr + (share + row) * Dk + at_d, d_k.to(d_k_ptr.dtype.element_ty), mask=in_k)
        row -= C * H
        row_k -= C * G
    tl.store(d_state_ptr + square + at_S, dS.to(d_state_ptr.dtype.element_ty), mask=in_S)
