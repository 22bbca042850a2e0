"""Diagonal plus low rank: every backend against the float64 token loop, values and gradients.

Tolerances are relative L2 errors against the float64 reference on the same (rounded) inputs; for
bfloat16, a multiple of the error that the reference itself makes on those inputs.
"""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import mad_kernels as mk
from mad_kernels import dispatch
from mad_kernels.dplr.compiled import dplr_compiled
from mad_kernels.dplr.reference import dplr_token

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
BFLOAT16_MULTIPLE = 2.0
# Under this a gradient is zero up to rounding, and its relative error means nothing.
BFLOAT16_FLOOR = 1e-6

FAST = ("chunked", "numba")
BACKENDS = ("reference", *FAST)

# Around the chunks of both backends, 16 and 64.
LENGTHS = (1, 2, 15, 16, 17, 64, 65, 130)
B, H, DK, DV = 2, 3, 8, 5
NAMES = ("o", "final_state", "q", "k", "v", "log_decay", "a", "b", "initial_state")

corrections = pytest.mark.parametrize("correction", [False, True])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(x, y):
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm().clamp_min(1e-300)).item() if y.numel() else 0.0


def inputs(L, *, dtype=torch.float64, seed=0, correction=True, Dk=DK, Dv=DV, heads=H):
    g = generator(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    q, k, v = (normal(B, L, heads, D) for D in (Dk, Dk, Dv))
    log_decay = -uniform(B, L, heads, Dk).square() * 3
    b = normalize(normal(B, L, heads, Dk), dim=-1)
    a = -b * uniform(B, L, heads, Dk)
    tensors = [q, k, v, log_decay, *((a, b) if correction else (None, None))]
    return cast([*tensors, normal(B, heads, Dk, Dv)], dtype)


def cast(tensors, dtype):
    return [None if x is None else x.to(dtype) for x in tensors]


def run(operator, tensors, **options):
    """Outputs and the gradient of every tensor, the last one being the initial state."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    *arguments, S = leaves
    o, final = operator(*arguments, initial_state=S, output_final_state=True, **options)
    wanted = [x for x in leaves if x is not None]
    # Without tokens, or with a loss on the state alone, not all of them are part of the graph.
    grads = torch.autograd.grad(weighed(o, final), wanted, materialize_grads=True)
    return [o.detach(), final.detach(), *grads]


def weighed(o, final):
    g = generator(99)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (o, final)]
    return sum((x.double() * w).sum() for x, w in zip((o, final), weights, strict=True))


def reference(tensors):
    return run(mk.dplr, cast(tensors, torch.float64), backend="reference")


def names(tensors):
    given_ = [name for name, x in zip(NAMES[2:], tensors, strict=True) if x is not None]
    return (*NAMES[:2], *given_)


def assert_close(got, want, tolerance, labels=NAMES):
    for name, x, y in zip(labels, got, want, strict=True):
        assert torch.isfinite(x).all(), name
        assert relative(x, y) <= tolerance, (name, relative(x, y))


# ---- the reference itself: the equation, written out with matrices


@corrections
def test_the_reference_is_the_equation(correction):
    q, k, v, log_decay, a, b, S = inputs(6, correction=correction)
    options = {"initial_state": S, "output_final_state": True, "backend": "reference"}
    o, final = mk.dplr(q, k, v, log_decay, a, b, **options)
    state = S[1, 2]
    for t in range(6):
        at = (1, t, 2)
        transition = torch.diag(log_decay[at].exp())
        if correction:
            transition = transition + torch.outer(a[at], b[at])
        state = transition @ state + torch.outer(k[at], v[at])
        torch.testing.assert_close(o[at], state.T @ q[at], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(final[1, 2], state, rtol=1e-13, atol=1e-13)


# ---- what it has to equal for particular arguments


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_decay_for_all_channels_and_a_along_b_are_the_delta_rule(backend):
    g = generator(5)
    q, k, v, _, _, b, S = inputs(70)
    k = b  # unit keys
    shape = (B, 70, H)
    erase, write, rate = (torch.rand(*shape, generator=g, dtype=torch.float64) for _ in range(3))

    def as_dplr(q, k, v, erase, write, log_decay, **options):
        log_decay = log_decay[..., None]
        a = -log_decay.exp() * erase[..., None] * k
        every = log_decay.expand_as(k)
        return mk.dplr(q, k, write[..., None] * v, every, a, k, **options, backend=backend)

    tensors = (q, k, v, erase, write, -rate, S)
    want = run(mk.delta_rule, tensors, backend="reference")
    got = run(as_dplr, tensors)
    assert_close(got, want, 1e-12, range(len(got)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_decay_and_no_correction_are_linear_attention(backend):
    q, k, v, log_decay, *_ = inputs(70, correction=False)
    o, _ = mk.dplr(q, k, v, torch.zeros_like(log_decay), backend=backend)
    scores = torch.einsum("blhk,bshk->bhls", q, k).tril()
    torch.testing.assert_close(o, torch.einsum("bhls,bshv->blhv", scores, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_corrections_equal_none(backend):
    q, k, v, log_decay, *_, S = inputs(40, correction=False)
    zero = torch.zeros_like(k)
    options = {"initial_state": S, "output_final_state": True, "backend": backend}
    got = mk.dplr(q, k, v, log_decay, zero, zero, **options)
    for x, y in zip(got, mk.dplr(q, k, v, log_decay, **options), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


# ---- the fast forms against the reference


@corrections
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_equal_the_reference(backend, L, dtype, correction):
    tensors = inputs(L, dtype=dtype, correction=correction)
    got = run(mk.dplr, tensors, backend=backend)
    assert_close(got, reference(tensors), TOLERANCE[dtype], names(tensors))
    assert all(x.dtype == dtype for x in got)


@settings(max_examples=40, deadline=None)
@given(
    backend=st.sampled_from(FAST),
    L=st.integers(0, 70),
    heads=st.integers(1, 3),
    Dk=st.integers(1, 40),
    Dv=st.integers(1, 40),
    correction=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_reference(backend, L, heads, Dk, Dv, correction, seed):
    tensors = inputs(L, correction=correction, Dk=Dk, Dv=Dv, heads=heads, seed=seed)
    got = run(mk.dplr, tensors, backend=backend)
    assert_close(got, reference(tensors), 1e-12, names(tensors))


@corrections
@pytest.mark.parametrize("widths", [(1, 1), (31, 33), (32, 64), (65, 7)])
@pytest.mark.parametrize("backend", FAST)
def test_widths_around_a_register_and_over_several_slabs(backend, widths, correction):
    Dk, Dv = widths
    tensors = inputs(70, dtype=torch.float32, correction=correction, Dk=Dk, Dv=Dv)
    got = run(mk.dplr, tensors, backend=backend)
    assert_close(got, reference(tensors), TOLERANCE[torch.float32], names(tensors))


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 16, 200])
def test_tokens_between_kept_states_do_not_matter(chunk):
    def by_chunks(*arguments, initial_state, output_final_state):
        assert output_final_state
        return dplr_compiled(*arguments, initial_state, chunk)

    tensors = inputs(50)
    assert_close(run(by_chunks, tensors), run(mk.dplr, tensors, backend="numba"), 1e-13)


@corrections
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_errs_at_most_twice_as_much_as_the_reference(backend, width, correction):
    options = {"dtype": torch.bfloat16, "correction": correction}
    tensors = inputs(100, Dk=width, Dv=width, **options)
    truth, own = reference(tensors), run(mk.dplr, tensors, backend="reference")
    got = run(mk.dplr, tensors, backend=backend)
    assert (got[0].dtype, got[1].dtype) == (torch.bfloat16, torch.float32)
    for name, x, y, z in zip(names(tensors), got, own, truth, strict=True):
        allowed = BFLOAT16_MULTIPLE * relative(y, z) + BFLOAT16_FLOOR
        assert relative(x, z) <= allowed, (name, relative(x, z), relative(y, z))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_bfloat16_tensors_and_float32_decays_keep_their_dtypes(backend):
    tensors = inputs(20, dtype=torch.float32)
    tensors[:3] = [x.bfloat16() for x in tensors[:3]]
    got = run(mk.dplr, tensors, backend=backend)
    assert got[0].dtype == torch.bfloat16
    assert [x.dtype for x in got[2:]] == [x.dtype for x in tensors]
    assert relative(got[5], reference(tensors)[5]) < 1e-2


@pytest.mark.parametrize("backend", FAST)
def test_autocast_changes_nothing(backend):
    def inside(*arguments, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mk.dplr(*arguments, **options)

    tensors = inputs(40, dtype=torch.float32)
    got, want = (run(f, tensors, backend=backend) for f in (inside, mk.dplr))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


# ---- where fast forms break: strong decay, repeated keys


@corrections
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", FAST)
def test_strong_decay_stays_finite_and_exact(backend, dtype, correction):
    tensors = inputs(130, dtype=dtype, correction=correction)
    tensors[3] = tensors[3] * 300  # down to exp(-900); some channels of some tokens keep all
    tensors[3][:, ::3] /= 3000
    tensors[3][:, ::7, :, ::2] = -torch.inf
    tensors[3][:, ::5, :, 1::2] = 0
    got = run(mk.dplr, tensors, backend=backend)
    assert_close(got, reference(tensors), TOLERANCE[dtype], names(tensors))


@pytest.mark.parametrize("forget", [1.0, 0.0])
@pytest.mark.parametrize("backend", FAST)
def test_a_short_decay_behind_a_strong_one_keeps_its_digits(backend, forget):
    tensors = inputs(40, dtype=torch.float32)
    tensors[3][:, ::4] = -80 * forget
    tensors[3][:, 1::4] = -1e-3
    got = run(mk.dplr, tensors, backend=backend)
    assert_close(got, reference(tensors), TOLERANCE[torch.float32])


@pytest.mark.parametrize("kind", ["identical", "vocabulary of 4", "70 % blanks"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", FAST)
def test_repeated_keys_stay_exact(backend, kind, dtype):
    g, L = generator(3), 130
    if kind == "identical":
        which = torch.zeros(B, L, H, dtype=torch.long)
    elif kind == "vocabulary of 4":
        which = torch.randint(0, 4, (B, L, H), generator=g)
    else:
        which = torch.randint(1, 16, (B, L, H), generator=g)
        which[torch.rand(B, L, H, generator=g) < 0.7] = 0
    q, _, v, log_decay, _, _, S = inputs(L, Dk=16)
    b = normalize(torch.randn(16, 16, generator=g, dtype=torch.float64), dim=-1)[which]
    tensors = cast([q, b, v, log_decay * 1e-4, -0.999 * b, b, S], dtype)
    got = run(mk.dplr, tensors, backend=backend)
    assert_close(got, reference(tensors), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("backend", FAST)
def test_long_sequences_keep_the_error_flat(backend):
    *tensors, _ = inputs(1024, dtype=torch.float32, heads=1)
    tensors = [x[:1] for x in tensors]
    o, _ = mk.dplr(*tensors, backend=backend)
    want, _ = mk.dplr(*cast(tensors, torch.float64), backend="reference")
    assert relative(o, want) < 2e-6


# ---- state, causality, gradients one by one


@corrections
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [0, 7, 16, 64, 70])
def test_a_state_carried_across_a_split_equals_the_whole(backend, cut, correction):
    def split(*arguments, initial_state, output_final_state):
        first = [None if x is None else x[:, :cut] for x in arguments]
        second = [None if x is None else x[:, cut:] for x in arguments]
        options = {"output_final_state": output_final_state, "backend": backend}
        o1, S = mk.dplr(*first, initial_state=initial_state, **options)
        o2, S = mk.dplr(*second, initial_state=S, **options)
        return torch.cat([o1, o2], dim=1), S

    tensors = inputs(70, correction=correction)
    whole = run(mk.dplr, tensors, backend=backend)
    assert_close(run(split, tensors), whole, 1e-12, names(tensors))


@pytest.mark.parametrize("t", [0, 14, 15, 16, 63, 64, 68])
@pytest.mark.parametrize("backend", FAST)
def test_no_output_depends_on_a_later_token(backend, t):
    *tensors, S = inputs(70)
    leaves = [x.clone().requires_grad_() for x in tensors]
    o, _ = mk.dplr(*leaves, initial_state=S, backend=backend)
    for grad in torch.autograd.grad(o[:, : t + 1].sum(), leaves):
        assert (grad[:, t + 1 :] == 0).all()
        assert (grad[:, : t + 1] != 0).any()


@corrections
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_zero_keys_and_no_decay(backend, correction):
    *tensors, S = inputs(5, correction=correction)
    tensors = [None if x is None else x[:1, :, :1, :2].clone() for x in tensors]
    tensors[1][:, 1], tensors[3][:, 2] = 0, 0
    leaves = [None if x is None else x.requires_grad_() for x in (*tensors, S[:1, :1, :2, :2])]

    def operator(*arguments):
        *rest, S = arguments
        return mk.dplr(*rest, initial_state=S, output_final_state=True, backend=backend)

    assert torch.autograd.gradcheck(operator, leaves)


def test_second_order_gradients_are_refused():
    *tensors, _ = inputs(4)
    tensors[0].requires_grad_()
    o, _ = mk.dplr(*tensors, backend="numba")
    (grad,) = torch.autograd.grad(o.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only here: take backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("wanted", range(7))
@pytest.mark.parametrize("backend", FAST)
def test_a_single_wanted_gradient_equals_that_of_all(backend, wanted):
    tensors = inputs(20)
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
    *arguments, S = leaves
    options = {"output_final_state": True, "backend": backend}
    loss = weighed(*mk.dplr(*arguments, initial_state=S, **options))
    (grad,) = torch.autograd.grad(loss, leaves[wanted])
    want = run(mk.dplr, tensors, backend=backend)[2 + wanted]
    torch.testing.assert_close(grad, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", FAST)
def test_a_loss_on_the_final_state_alone_has_gradients(backend):
    def last_state(*arguments, **options):
        o, S = mk.dplr(*arguments, **options)
        return torch.zeros_like(o), S

    tensors = inputs(20)
    got = run(last_state, tensors, backend=backend)
    leaves = [x.clone().requires_grad_() for x in tensors]
    *arguments, S = leaves
    options = {"initial_state": S, "output_final_state": True, "backend": "reference"}
    o, final = mk.dplr(*arguments, **options)
    want = torch.autograd.grad(weighed(torch.zeros_like(o), final), leaves[1:])
    assert (got[2] == 0).all()
    assert_close(got[3:], want, 1e-12, NAMES[3:])


def test_nothing_is_kept_for_a_backward_that_will_not_come():
    *tensors, _ = inputs(5)
    with torch.no_grad():
        o, _ = mk.dplr(tensors[0].requires_grad_(), *tensors[1:], backend="numba")
    assert not o.requires_grad


# ---- one token at a time


@corrections
@pytest.mark.parametrize("backend", FAST)
def test_step_equals_the_parallel_form(backend, correction):
    *tensors, S = inputs(20, correction=correction)
    options = {"initial_state": S, "output_final_state": True, "backend": backend}
    o, final = mk.dplr(*tensors, **options)
    for t in range(20):
        o_t, S = mk.dplr_step(*(None if x is None else x[:, t] for x in tensors), S)
        torch.testing.assert_close(o_t, o[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(S, final, rtol=1e-12, atol=1e-12)


def test_a_token_keeps_dtypes():
    *tensors, S = inputs(1, dtype=torch.float32)
    o_t, state = dplr_token(*(x[:, 0].bfloat16() for x in tensors), S)
    assert (o_t.dtype, state.dtype) == (torch.bfloat16, torch.float32)


# ---- layouts and edges


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_give_the_same_bytes(backend):
    def strided(x):
        y = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]
        return y.transpose(0, 1).contiguous().transpose(0, 1).copy_(x)

    tensors = inputs(20)
    got = run(mk.dplr, tensors, backend=backend)
    *turned, S = [strided(x) for x in tensors]
    o, _ = mk.dplr(*turned, initial_state=S, backend=backend)
    assert torch.equal(o, got[0])
    want = run(mk.dplr, [*turned, S], backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    *wide, S = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in tensors]
    assert not wide[0].is_contiguous()
    assert torch.equal(mk.dplr(*wide, initial_state=S, backend=backend)[0], got[0])


@corrections
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0, 3, 4, 5), (0, 7, 3, 4, 5), (2, 7, 0, 4, 5), (2, 7, 3, 0, 5), (2, 7, 3, 4, 0)])
def test_empty_inputs_work(shape, backend, correction):
    b, L, h, Dk, Dv = shape
    shapes = [(b, L, h, Dk), (b, L, h, Dk), (b, L, h, Dv), (b, L, h, Dk)]
    shapes += [(b, L, h, Dk)] * 2 * correction
    leaves = [torch.ones(s, requires_grad=True) for s in (*shapes, (b, h, Dk, Dv))]
    *arguments, S = leaves
    options = {"initial_state": S, "output_final_state": True, "backend": backend}
    o, final = mk.dplr(*arguments, **options)
    assert (o.shape, final.shape) == ((b, L, h, Dv), (b, h, Dk, Dv))
    if L == 0:
        assert torch.equal(final, S)
    (o.sum() + final.sum()).backward()
    assert all(x.grad is None or x.grad.shape == x.shape for x in leaves)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_sequence_that_is_not_finite_leaves_the_next_alone(value):
    both = [x.clone() for x in inputs(70)]
    for x in both:
        x[0] = value
    alone = [x[1:] for x in both]
    got, want = (run_finite(tensors) for tensors in (both, alone))
    assert all(torch.equal(x[-1:], y) for x, y in zip(got, want, strict=True))


def run_finite(tensors):
    """Outputs and gradients by a loss that is the same for the last sequence, alone or not."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    *arguments, S = leaves
    o, final = mk.dplr(*arguments, initial_state=S, output_final_state=True, backend="numba")
    loss = o.square().sum() + final.square().sum()
    return [o.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


# ---- choice of a backend, and what is refused


def test_backends_are_chosen_and_recorded(monkeypatch):
    *tensors, _ = inputs(3)
    with mk.record_backends() as ran:
        mk.dplr(*tensors)
    assert ran == {"dplr:numba"}
    monkeypatch.setenv(dispatch.VARIABLE, "dplr:reference")
    with mk.record_backends() as ran:
        mk.dplr(*tensors)
        mk.dplr(*tensors, backend="chunked")
    assert ran == {"dplr:reference", "dplr:chunked"}
    monkeypatch.delenv(dispatch.VARIABLE)
    monkeypatch.setattr(dispatch, "_numba_is_installed", lambda: False)
    with mk.record_backends() as ran:
        mk.dplr(*tensors)
    assert ran == {"dplr:chunked"}


def test_a_correction_of_one_part_is_refused():
    q, k, v, log_decay, a, b, S = inputs(3)
    # Unwrapped: a runtime shape checker, where one is active, would speak first.
    operator, step = inspect.unwrap(mk.dplr), inspect.unwrap(mk.dplr_step)
    with pytest.raises(ValueError, match=r"dplr: a is given but b is None: .* give b too"):
        operator(q, k, v, log_decay, a)
    with pytest.raises(ValueError, match=r"dplr_step: b is given but a is None"):
        step(*(x[:, 0] for x in (q, k, v, log_decay)), None, b[:, 0], S)
    with pytest.raises(ValueError, match=r"dplr: log_decay has shape .* 3 axes, but takes 4"):
        operator(q, k, v, log_decay[..., 0])
    with pytest.raises(ValueError, match=r"dplr: b has Dk=7 but q has Dk=8"):
        operator(q, k, v, log_decay, a, b[..., :7])
