"""Every member and backend of the delta rule against the float64 token loop, values and gradients.

Tolerances are relative L2 errors against the float64 reference on the same (rounded) inputs; for
bfloat16, a multiple of the error that the reference itself makes on those inputs.
"""

import inspect
import sys

import pytest
import torch
from torch.nn.functional import normalize, softplus

import mad_kernels as mk
from mad_kernels import dispatch
from mad_kernels.delta_rule import l2_normalize
from mad_kernels.delta_rule.chunked import unit_lower_inverse
from mad_kernels.delta_rule.reference import delta_rule_token

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
BFLOAT16_MULTIPLE = 2.0
# Under this a gradient is zero up to rounding, and its relative error means nothing.
BFLOAT16_FLOOR = 1e-6

FAST = ("chunked", "numba")
BACKENDS = ("reference", *FAST)

LENGTHS = (1, 15, 16, 17, 100, 130)
B, H, DK, DV = 2, 3, 8, 5
NAMES = ("o", "final_state", "q", "k", "v", "erase", "write", "log_decay", "initial_state")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(x, y):
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm().clamp_min(1e-300)).item() if y.numel() else 0.0


def inputs(L, *, dtype=torch.float64, seed=0, decay=True, Dk=DK, Dv=DV):
    g = generator(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    k = normalize(normal(B, L, H, Dk), dim=-1)
    erase = torch.rand(B, L, H, generator=g, dtype=torch.float64)
    write = torch.rand(B, L, H, generator=g, dtype=torch.float64)
    log_decay = -torch.rand(B, L, H, generator=g, dtype=torch.float64).square() * 3
    S = normal(B, H, Dk, Dv)
    tensors = [normal(B, L, H, Dk), k, normal(B, L, H, Dv), erase, write]
    tensors += [log_decay if decay else None, S]
    return [None if x is None else x.to(dtype) for x in tensors]


def run(operator, tensors, **options):
    """Outputs and the gradient of every tensor, the last one being the initial state."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    *arguments, S = leaves
    o, final = operator(*arguments, initial_state=S, output_final_state=True, **options)
    g = generator(99)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (o, final)]
    loss = sum((x.double() * w).sum() for x, w in zip((o, final), weights, strict=True))
    wanted = [x for x in leaves if x is not None]
    return [o.detach(), final.detach(), *torch.autograd.grad(loss, wanted)]


def assert_close(got, want, tolerance):
    for name, x, y in zip(NAMES, got, want, strict=False):
        assert torch.isfinite(x).all(), name
        assert relative(x, y) <= tolerance, (name, relative(x, y))


def wide(tensors):
    return [None if x is None else x.double() for x in tensors]


def reference(tensors, operator=mk.delta_rule):
    return run(operator, wide(tensors), backend="reference")


# ---- the reference itself: the equation, written out with matrices


def test_the_reference_is_the_equation():
    q, k, v, erase, write, log_decay, S = inputs(6)
    o, final = mk.delta_rule(
        q, k, v, erase, write, log_decay, initial_state=S, output_final_state=True, backend="reference"
    )
    state = S[1, 2]
    for t in range(6):
        at = (1, t, 2)
        kk = torch.outer(k[at], k[at])
        state = log_decay[at].exp() * (torch.eye(DK, dtype=k.dtype) - erase[at] * kk) @ state
        state = state + write[at] * torch.outer(k[at], v[at])
        torch.testing.assert_close(o[at], state.T @ q[at], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(final[1, 2], state, rtol=1e-13, atol=1e-13)


# ---- the fast forms against the reference


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_equal_the_reference(backend, L, dtype, decay):
    tensors = inputs(L, dtype=dtype, decay=decay)
    names = [n for n in NAMES if decay or n != "log_decay"]
    got, want = run(mk.delta_rule, tensors, backend=backend), reference(tensors)
    for name, x, y in zip(names, got, want, strict=True):
        assert relative(x, y) <= TOLERANCE[dtype], (name, relative(x, y))
        assert x.dtype == dtype


@pytest.mark.parametrize("widths", [(1, 1), (31, 33), (32, 64), (65, 7)])
@pytest.mark.parametrize("backend", FAST)
def test_widths_around_a_register_and_over_several_slabs(backend, widths):
    Dk, Dv = widths
    for decay in (False, True):
        tensors = inputs(70, dtype=torch.float32, decay=decay, Dk=Dk, Dv=Dv)
        got, want = run(mk.delta_rule, tensors, backend=backend), reference(tensors)
        assert_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_errs_at_most_twice_as_much_as_the_reference(backend, decay, width):
    tensors = inputs(100, dtype=torch.bfloat16, decay=decay, Dk=width, Dv=width)
    truth = reference(tensors)
    own = run(mk.delta_rule, tensors, backend="reference")
    got = run(mk.delta_rule, tensors, backend=backend)
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == torch.float32
    for name, x, y, z in zip(NAMES, got, own, truth, strict=False):
        allowed = BFLOAT16_MULTIPLE * relative(y, z) + BFLOAT16_FLOOR
        assert relative(x, z) <= allowed, (name, relative(x, z), relative(y, z))


@pytest.mark.parametrize("backend", FAST)
def test_mixed_bfloat16_tensors_and_float32_scalars_keep_their_dtypes(backend):
    tensors = inputs(20, dtype=torch.float32)
    tensors[:3] = [x.bfloat16() for x in tensors[:3]]
    got = run(mk.delta_rule, tensors, backend=backend)
    assert [x.dtype for x in got[2:]] == [x.dtype for x in tensors]
    assert relative(got[5], reference(tensors)[5]) < 1e-2


@pytest.mark.parametrize("backend", FAST)
def test_autocast_changes_nothing(backend):
    tensors = inputs(40, dtype=torch.float32)
    plain = run(mk.delta_rule, tensors, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(mk.delta_rule, tensors, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


@pytest.mark.parametrize("L", [16, 100])
@pytest.mark.parametrize("backend", FAST)
def test_chunk_length_does_not_matter(backend, L):
    tensors = inputs(L)
    want = run(mk.delta_rule, tensors, chunk=16, backend=backend)
    for chunk in (1, 2, 5, 8, 32, 64, 200):
        assert_close(run(mk.delta_rule, tensors, chunk=chunk, backend=backend), want, 1e-13)


def test_blocks_of_sequences_do_not_matter(monkeypatch):
    tensors = inputs(16)
    want = run(mk.delta_rule, tensors, backend="chunked")
    monkeypatch.setattr(sys.modules[unit_lower_inverse.__module__], "_BLOCK_NUMBERS", 1)
    assert_close(run(mk.delta_rule, tensors, backend="chunked"), want, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [0, 7, 16, 33, 40])
def test_a_state_carried_across_a_split_equals_the_whole(backend, cut):
    tensors = inputs(40)

    def split(*arguments, initial_state, output_final_state):
        first = [x[:, :cut] for x in arguments]
        second = [x[:, cut:] for x in arguments]
        options = {"output_final_state": output_final_state, "backend": backend}
        o1, S = mk.delta_rule(*first, initial_state=initial_state, **options)
        o2, S = mk.delta_rule(*second, initial_state=S, **options)
        return torch.cat([o1, o2], dim=1), S

    assert_close(run(split, tensors), run(mk.delta_rule, tensors, backend=backend), 1e-13)


@pytest.mark.parametrize("t", [0, 14, 15, 16, 30, 38])
@pytest.mark.parametrize("backend", FAST)
def test_no_output_depends_on_a_later_token(backend, t):
    *tensors, S = inputs(40)
    leaves = [x.clone().requires_grad_() for x in tensors]
    o, _ = mk.delta_rule(*leaves, initial_state=S, chunk=16, backend=backend)
    for grad in torch.autograd.grad(o[:, : t + 1].sum(), leaves):
        assert (grad[:, t + 1 :] == 0).all()
        assert (grad[:, : t + 1] != 0).any()


@pytest.mark.parametrize("backend", FAST)
def test_strong_decay_stays_finite_and_exact(backend):
    tensors = inputs(50)
    tensors[5] = tensors[5] * 300
    tensors[5][:, ::7] = -torch.inf
    got, want = run(mk.delta_rule, tensors, backend=backend), reference(tensors)
    assert_close(got, want, 1e-12)


# ---- repeated keys: where a series for the inverse blows up


def repeated_keys(kind, L, dtype):
    g = generator(3)
    if kind == "identical":
        which = torch.zeros(B, L, H, dtype=torch.long)
    elif kind == "vocabulary of 4":
        which = torch.randint(0, 4, (B, L, H), generator=g)
    else:
        which = torch.randint(1, 16, (B, L, H), generator=g)
        which[torch.rand(B, L, H, generator=g) < 0.7] = 0
    table = normalize(torch.randn(16, 16, generator=g, dtype=torch.float64), dim=-1)
    return table[which].to(dtype)


@pytest.mark.parametrize("chunk", [16, 64, 128])
@pytest.mark.parametrize("kind", ["identical", "vocabulary of 4", "70 % blanks"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", FAST)
def test_repeated_keys_stay_exact(backend, kind, chunk, dtype):
    tensors = inputs(130, dtype=dtype, decay=False, Dk=16)
    tensors[1] = repeated_keys(kind, 130, dtype)
    tensors[3] = torch.full_like(tensors[3], 0.999)
    got = run(mk.delta_rule, tensors, chunk=chunk, backend=backend)
    assert_close(got[:5], reference(tensors)[:5], TOLERANCE[dtype])
    assert_close(got[5:], reference(tensors)[5:], 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("C", [1, 2, 3, 16, 64, 100])
@pytest.mark.parametrize("kind", ["identical", "vocabulary of 4", "70 % blanks"])
def test_entries_of_the_inverse_stay_at_most_one(kind, C):
    k = repeated_keys(kind, C, torch.float32).transpose(1, 2).flatten(0, 1)
    A = (0.999 * k @ k.mT).tril(-1)
    T = unit_lower_inverse(A)
    eye = torch.eye(C, dtype=torch.float64)
    assert T.abs().max() <= 1 + 1e-5
    assert (T.double() @ (eye + A.double()) - eye).abs().max() < 1e-4
    exact = torch.linalg.solve_triangular(eye + A.double(), eye, upper=False)
    assert relative(T, exact) < 2e-6


# ---- gradcheck, second order


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_zero_keys_and_zero_erase(backend, decay):
    q, k, v, erase, write, log_decay, S = (
        None if x is None else x[:1, ..., :1, :2] if x.dim() == 4 else x[:1, ..., :1] for x in inputs(5, decay=decay)
    )
    S = inputs(5)[-1][:1, :1, :2, :2]
    k[:, 1], erase[:, 2], write[:, 3] = 0, 0, 0
    leaves = [None if x is None else x.clone().requires_grad_() for x in (q, k, v, erase, write, log_decay, S)]

    def operator(q, k, v, erase, write, log_decay, S):
        options = {"initial_state": S, "output_final_state": True, "backend": backend}
        return mk.delta_rule(q, k, v, erase, write, log_decay, chunk=3, **options)

    assert torch.autograd.gradcheck(operator, leaves)


@pytest.mark.parametrize("backend", FAST)
def test_second_order_gradients_are_refused(backend):
    q, k, v, erase, write, *_ = inputs(4)
    q.requires_grad_()
    o, _ = mk.delta_rule(q, k, v, erase, write, backend=backend)
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad.sum().backward()


@pytest.mark.parametrize("wanted", range(7))
@pytest.mark.parametrize("backend", FAST)
def test_a_single_wanted_gradient_equals_that_of_all(backend, wanted):
    tensors = inputs(20)
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
    *arguments, S = leaves
    options = {"output_final_state": True, "backend": backend}
    o, final = mk.delta_rule(*arguments, initial_state=S, **options)
    g = generator(99)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (o, final)]
    loss = (o * weights[0]).sum() + (final * weights[1]).sum()
    (grad,) = torch.autograd.grad(loss, leaves[wanted])
    assert torch.equal(grad, run(mk.delta_rule, tensors, backend=backend)[2 + wanted])


@pytest.mark.parametrize("backend", FAST)
def test_a_loss_on_the_final_state_alone_has_gradients(backend):
    tensors = inputs(20)

    def last_state(*arguments, **options):
        o, S = mk.delta_rule(*arguments, **options)
        return torch.zeros_like(o), S

    got = run(last_state, tensors, backend=backend)
    leaves = [x.clone().requires_grad_() for x in tensors]
    *arguments, S = leaves
    _, final = mk.delta_rule(*arguments, initial_state=S, output_final_state=True, backend="reference")
    g = generator(99)
    torch.randn(B, 20, H, DV, generator=g, dtype=torch.float64)
    weight = torch.randn(final.shape, generator=g, dtype=torch.float64)
    want = torch.autograd.grad((final * weight).sum(), leaves[1:])
    assert (got[2] == 0).all()
    assert_close(got[3:], want, 1e-12)


# ---- layouts and edges


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_give_the_same_bytes(backend):
    tensors = inputs(20)

    def strided(x):
        y = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]
        return y.transpose(0, 1).contiguous().transpose(0, 1).copy_(x)

    got = run(mk.delta_rule, tensors, backend=backend)
    want = run(mk.delta_rule, [strided(x) for x in tensors], backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors[:6]]
    o, _ = mk.delta_rule(*turned, backend=backend)
    assert torch.equal(o, mk.delta_rule(*tensors[:6], backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0, 3, 4, 5), (0, 7, 3, 4, 5), (2, 7, 0, 4, 5), (2, 7, 3, 0, 5), (2, 7, 3, 4, 0)])
def test_empty_inputs_work(shape, backend):
    b, L, h, Dk, Dv = shape
    shapes = [(b, L, h, Dk), (b, L, h, Dk), (b, L, h, Dv), (b, L, h), (b, L, h), (b, L, h)]
    leaves = [torch.ones(s, requires_grad=True) for s in (*shapes, (b, h, Dk, Dv))]
    *arguments, S = leaves
    o, final = mk.delta_rule(*arguments, initial_state=S, output_final_state=True, backend=backend)
    assert o.shape == (b, L, h, Dv)
    assert final.shape == (b, h, Dk, Dv)
    if L == 0:
        assert torch.equal(final, S)
    (o.sum() + final.sum()).backward()
    assert all(x.grad is None or x.grad.shape == x.shape for x in leaves)


# ---- the family


def alpha_of(step, beta, lambda_):
    """The textbook step size, in float64, on raw keys."""
    x = beta * lambda_
    return {
        "deltanet": beta,
        "rk2": beta * (1 - x / 2),
        "rk4": beta * (1 - x / 2 + x**2 / 6 - x**3 / 24),
        "efla": beta * mk.phi(x),
        "implicit": beta / (1 + x),
        "kaczmarz": beta / (lambda_ + 1e-6),
    }[step]


def raw_key_form(step):
    """Member `step` as the token loop on raw keys with its alpha: what the members must equal."""

    def operator(q, k, v, beta, *, initial_state, output_final_state):
        alpha = alpha_of(step, beta, k.square().sum(-1))
        options = {"initial_state": initial_state, "output_final_state": output_final_state}
        return mk.delta_rule(q, k, v, alpha, alpha, backend="reference", **options)

    return operator


FAMILY = ("deltanet", "rk2", "rk4", "efla", "implicit", "kaczmarz")
FREE = ("efla", "implicit", "kaczmarz")


def family_inputs(L, norms, *, dtype=torch.float64, seed=0):
    q, k, v, beta, *_, S = inputs(L, seed=seed)
    g = generator(7)
    if norms == "spread":
        k = k * torch.empty(B, L, H, 1, dtype=torch.float64).uniform_(-9, 9, generator=g).exp()
    elif norms == "zeros":
        k = k * (torch.rand(B, L, H, 1, generator=g) < 0.5)
    else:
        k = k * torch.rand(B, L, H, 1, generator=g, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, beta, S)]


@pytest.mark.parametrize("norms", ["unit", "zeros"])
@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", FAST)
def test_members_equal_their_textbook_step_on_raw_keys(backend, member, norms, dtype):
    tensors = family_inputs(40, norms, dtype=dtype)
    got = run(getattr(mk, member), tensors, backend=backend)
    want = run(raw_key_form(member), wide(tensors))
    assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("member", FREE)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", FAST)
def test_key_norms_from_e_minus_9_to_e_9_stay_exact_per_token(backend, member, dtype):
    tensors = family_inputs(64, "spread", dtype=dtype)
    tensors[1][:, ::9] = 0
    got = run(getattr(mk, member), tensors, backend=backend)
    want = run(raw_key_form(member), wide(tensors))
    assert_close(got, want, 2 * TOLERANCE[dtype])
    # Gradients by k run over 18 powers of e: each token has to be right at its own scale. The
    # reference itself loses digits there to cancellation, so the bar is lower.
    scale = want[3].norm(dim=-1)
    error = (got[3].double() - want[3]).norm(dim=-1) / scale
    assert error.max() < {torch.float64: 1e-6, torch.float32: 2e-4}[dtype]


@pytest.mark.parametrize("norm", [0.0, 1e-30, 1e-20, 1e-18, 1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("member", FREE)
@pytest.mark.parametrize("backend", FAST)
def test_gradients_are_finite_and_right_at_any_norm(backend, member, norm):
    q, k, v, beta, S = family_inputs(8, "unit")
    k = normalize(k, dim=-1) * norm
    tensors = [x.float() for x in (q, k, v, beta, S)]
    got = run(getattr(mk, member), tensors, backend=backend)
    want = run(raw_key_form(member), wide(tensors))
    # The raw-key reference itself cancels at large norms, where exact gradients by beta are 0.
    kept = 5 if norm > 100 else 7
    assert_close(got[:kept], want[:kept], 1e-5)
    assert all(torch.isfinite(x).all() for x in got)


def test_efla_at_zero_keys_still_feels_the_key():
    q, k, v, beta, _ = family_inputs(6, "unit", dtype=torch.float32)
    k = torch.zeros_like(k).requires_grad_()
    o, _ = mk.efla(q, k, v, beta)
    o.sum().backward()
    assert (k.grad.norm(dim=-1) > 0).all()


@pytest.mark.parametrize("member", ["efla", "implicit", "kaczmarz", "rk4"])
def test_gradcheck_of_members_with_a_zero_key(member):
    q, k, v, beta, _ = (x[:1] for x in family_inputs(4, "unit"))
    k[:, 1] = 0
    step = 1e-5 if member == "kaczmarz" else 1e-6
    leaves = [x.clone().requires_grad_() for x in (q, k, v, beta)]
    options = {"eps": step, "atol": 1e-4, "rtol": 1e-3}
    # Kaczmarz bends at |k| = 1e-3, too sharp for a finite difference at zero.
    if member == "kaczmarz":
        leaves[1].data[:, 1] = 0.3
    assert torch.autograd.gradcheck(lambda *x: getattr(mk, member)(*x, chunk=3)[0], leaves, **options)


def test_unit_keys_softplus_and_exact_step_are_the_delta_rule_with_sigmoid():
    q, k, v, _, S = family_inputs(50, "unit")
    k = normalize(k, dim=-1)
    logit = torch.randn(B, 50, H, generator=generator(5), dtype=torch.float64)

    def exact(q, k, v, logit, **options):
        return mk.efla(q, k, v, softplus(logit), **options)

    def euler(q, k, v, logit, **options):
        return mk.deltanet(q, k, v, torch.sigmoid(logit), **options)

    got, want = run(exact, (q, k, v, logit, S)), run(euler, (q, k, v, logit, S))
    for i in (0, 1, 2, 4, 5, 6):
        assert relative(got[i], want[i]) < 1e-12
    # By k, only the part along the sphere is shared: efla also sees |k|.
    along = [x - (x * k).sum(-1, keepdim=True) * k for x in (got[3], want[3])]
    assert relative(*along) < 1e-12


def test_gated_efla_solves_its_equation():
    q, k, v, beta, S = family_inputs(1, "unit")
    gate = torch.rand(B, 1, H, generator=generator(2), dtype=torch.float64)
    _, final = mk.gated_efla(q, k, v, beta, gate, initial_state=S, output_final_state=True)
    b, h = 1, 2
    key, value, a, rate = k[b, 0, h], v[b, 0, h], gate[b, 0, h], beta[b, 0, h]
    # dS/ds = M S + R over unit time, as one matrix exponential.
    M = -(1 - a) * torch.eye(DK, dtype=k.dtype) - a * rate * torch.outer(key, key)
    R = rate * torch.outer(key, value)
    joined = torch.zeros(DK + DV, DK + DV, dtype=k.dtype)
    joined[:DK, :DK], joined[:DK, DK:] = M, R
    flow = torch.linalg.matrix_exp(joined)
    want = flow[:DK, :DK] @ S[b, h] + flow[:DK, DK:]
    torch.testing.assert_close(final[b, h], want, rtol=1e-12, atol=1e-12)


def test_efla_solves_its_equation_and_is_gated_efla_without_gate():
    tensors = family_inputs(30, "zeros")
    ones = torch.ones_like(tensors[3])

    def ungated(q, k, v, beta, **options):
        return mk.gated_efla(q, k, v, beta, ones, **options)

    assert_close(run(ungated, tensors), run(mk.efla, tensors), 1e-12)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", FAST)
def test_gated_members_equal_the_reference(backend, dtype):
    q, k, v, beta, S = family_inputs(40, "zeros", dtype=dtype)
    gate = torch.rand(B, 40, H, generator=generator(4), dtype=torch.float64).to(dtype)

    def raw(q, k, v, beta, gate, *, initial_state, output_final_state):
        lambda_ = k.square().sum(-1)
        erase = gate * beta * mk.phi(gate * beta * lambda_)
        write = beta * mk.phi((1 - gate) + gate * beta * lambda_)
        options = {"initial_state": initial_state, "output_final_state": output_final_state}
        return mk.delta_rule(q, k, v, erase, write, gate - 1, backend="reference", **options)

    tensors = (q, k, v, beta, gate, S)
    got = run(mk.gated_efla, tensors, backend=backend)
    assert_close(got, run(raw, wide(tensors)), TOLERANCE[dtype])
    tensors = (q, normalize(k, dim=-1), v, beta, -gate, S)
    got = run(mk.gated_delta_rule, tensors, backend=backend)
    want = reference((q, tensors[1], v, beta, beta, -gate, S))
    assert_close(got[:2], want[:2], TOLERANCE[dtype])


@pytest.mark.parametrize("member", [*FAMILY, "gated_delta_rule", "gated_efla"])
@pytest.mark.parametrize("backend", FAST)
def test_step_equals_the_parallel_form(backend, member):
    q, k, v, beta, S = family_inputs(20, "zeros")
    extra = []
    if member.startswith("gated"):
        gate = torch.rand(B, 20, H, generator=generator(4), dtype=torch.float64)
        extra = [gate - 1 if member == "gated_delta_rule" else gate]
    options = {"output_final_state": True, "backend": backend}
    o, final = getattr(mk, member)(q, k, v, beta, *extra, initial_state=S, **options)
    step = getattr(mk, f"{member}_step")
    for t in range(20):
        o_t, S = step(*(x[:, t] for x in (q, k, v, beta, *extra)), S)
        torch.testing.assert_close(o_t, o[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(S, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_primitive_step_equals_the_parallel_form_and_keeps_dtypes(backend):
    *tensors, S = inputs(20, dtype=torch.float32)
    options = {"output_final_state": True, "backend": backend}
    o, final = mk.delta_rule(*tensors, initial_state=S, **options)
    state = S
    for t in range(20):
        o_t, state = mk.delta_rule_step(*(x[:, t] for x in tensors), state)
        assert relative(o_t, o[:, t]) < 2e-6
    assert relative(state, final) < 2e-6
    q, k, v, *scalars = (x[:, 0].bfloat16() for x in tensors)
    o_t, state = delta_rule_token(q, k, v, *scalars, S)
    assert (o_t.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_efla_errs_at_most_twice_as_much_as_the_reference(backend):
    tensors = family_inputs(100, "unit", dtype=torch.bfloat16)
    truth = run(mk.efla, wide(tensors), backend="reference")
    own = run(mk.efla, tensors, backend="reference")
    got = run(mk.efla, tensors, backend=backend)
    for x, y, z in zip(got, own, truth, strict=True):
        assert relative(x, z) <= BFLOAT16_MULTIPLE * relative(y, z) + BFLOAT16_FLOOR


def test_stable_members_never_let_the_state_grow():
    q, k, v, beta, S = family_inputs(200, "spread", dtype=torch.float32)
    for member in FREE:
        _, final = getattr(mk, member)(
            q, k, 0 * v, 50 * beta if member != "kaczmarz" else beta, initial_state=S, output_final_state=True
        )
        assert (torch.linalg.matrix_norm(final, 2) <= torch.linalg.matrix_norm(S, 2) * (1 + 1e-5)).all()


def test_unknown_steps_are_refused():
    k, beta = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match="no member of the family"):
        inspect.unwrap(mk.unit_key_form)(k, beta, "midpoint")  # a runtime type checker speaks first


@pytest.mark.parametrize("step", mk.STEPS)
def test_unit_key_form_is_alpha_split_over_a_unit_key(step):
    _, k, _, beta, _ = family_inputs(10, "unit")
    key, erase, write = mk.unit_key_form(k, beta, step)
    lambda_ = k.square().sum(-1)
    name = {"euler": "deltanet", "exact": "efla"}.get(step, step)
    alpha = alpha_of(name, beta, lambda_)
    torch.testing.assert_close(key.norm(dim=-1), torch.ones_like(beta))
    torch.testing.assert_close(erase, alpha * lambda_)
    torch.testing.assert_close(write[..., None] * key, alpha[..., None] * k)


# ---- unit keys in one pass


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [1, 16, 31, 32, 33, 100])
def test_unit_vectors_and_their_gradients_are_right_at_any_width(width, dtype, numba, monkeypatch):
    monkeypatch.setattr(dispatch, "_HAS_NUMBA", numba)
    g = generator(11)
    x = torch.randn(3, 5, width, generator=g, dtype=torch.float64).to(dtype)
    x[0, 0], x[1, 1], x[2, 2] = 0, x[1, 1] * 1e-9, x[2, 2] * 1e6
    pull = torch.randn(x.shape, generator=g, dtype=torch.float64)
    results = []
    for run, dtype_ in ((l2_normalize, dtype), (normalize, torch.float64)):
        leaf = x.to(dtype_).requires_grad_()
        y = run(leaf) if run is l2_normalize else normalize(leaf, dim=-1, eps=1e-6)
        results.append([y.detach(), *torch.autograd.grad(y, leaf, pull.to(dtype_))])
    # Along a long vector the gradient cancels: what is left has the size of the pull's rounding.
    scale = pull.norm(dim=-1, keepdim=True) / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    error = [(z.double() - w).abs() for z, w in zip(*results, strict=True)]
    assert results[0][0].dtype == dtype
    assert error[0].max() <= TOLERANCE[dtype]
    assert (error[1] <= TOLERANCE[dtype] * scale).all()


def test_a_vector_that_is_not_finite_leaves_the_others_alone():
    x = torch.randn(4, 40, generator=generator(12))
    want = l2_normalize(x)
    x[1, 39], x[2, 3] = torch.nan, torch.inf
    got = l2_normalize(x.requires_grad_())
    (slope,) = torch.autograd.grad(got.sum(), x)
    assert torch.equal(got[[0, 3]], want[[0, 3]])
    assert torch.isfinite(slope[[0, 3]]).all()
    assert got[1].isnan().all()


@pytest.mark.parametrize("step", mk.STEPS)
def test_steps_of_loops_and_of_torch_agree(step, monkeypatch):
    tensors = family_inputs(20, "spread" if step not in ("rk2", "rk4") else "zeros")
    results = []
    for numba in (True, False):
        monkeypatch.setattr(dispatch, "_HAS_NUMBA", numba)
        k, beta = (x.clone().requires_grad_() for x in (tensors[1], tensors[3]))
        form = mk.unit_key_form(k, beta, step)
        pulls = [torch.ones_like(x) for x in form]
        results.append([*form, *torch.autograd.grad(form, (k, beta), pulls)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_long_sequences_keep_the_error_flat(backend):
    tensors = [x[:1, :, :1] if x.dim() > 2 else x for x in inputs(2048, dtype=torch.float32, decay=True)[:6]]
    o, _ = mk.delta_rule(*tensors, backend=backend)
    want, _ = mk.delta_rule(*wide(tensors), backend="chunked", chunk=64)
    assert relative(o, want) < 2e-6
