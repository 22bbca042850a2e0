"""Mamba-2's state space: every backend against the float64 token loop, values and gradients.

Tolerances are relative L2 errors against the float64 reference on the same (rounded) inputs; for
bfloat16, a multiple of the error that the reference itself makes on those inputs.
"""

import pytest
import torch

import mad_kernels as mk

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
BFLOAT16_MULTIPLE = 2.0
BFLOAT16_FLOOR = 1e-6

FAST = ("chunked", "numba")
BACKENDS = ("reference", *FAST)

LENGTHS = (1, 15, 16, 17, 33, 100, 130)
B, H, P, N = 2, 4, 5, 6
NAMES = ("y", "final_state", "x", "dt", "a", "b", "c", "initial_state")


def relative(x, y):
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm().clamp_min(1e-300)).item() if y.numel() else 0.0


def inputs(L, *, groups=2, dtype=torch.float64, largest_dt=2.0):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    dt = torch.rand(B, L, H, generator=g, dtype=torch.float64).square() * largest_dt
    a = -torch.rand(H, generator=g, dtype=torch.float64) * 2 - 0.1
    tensors = (normal(B, L, H, P), dt, a, normal(B, L, groups, N), normal(B, L, groups, N))
    return [x.to(dtype) for x in (*tensors, normal(B, H, N, P))]


def run(operator, tensors, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    *arguments, S = leaves
    y, final = operator(*arguments, initial_state=S, output_final_state=True, **options)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (y, final)]
    loss = sum((x.double() * w).sum() for x, w in zip((y, final), weights, strict=True))
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


def reference(tensors):
    return run(mk.ssd, [x.double() for x in tensors], backend="reference")


def assert_close(got, want, tolerance):
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert torch.isfinite(x).all(), name
        assert relative(x, y) <= tolerance, (name, relative(x, y))


def test_the_reference_is_the_equation():
    x, dt, a, b, c, S = inputs(5)
    y, final = mk.ssd(x, dt, a, b, c, initial_state=S, output_final_state=True, backend="reference")
    for h in range(H):
        state = S[1, h]
        for t in range(5):
            state = (dt[1, t, h] * a[h]).exp() * state
            state = state + dt[1, t, h] * torch.outer(b[1, t, h // 2], x[1, t, h])
            torch.testing.assert_close(y[1, t, h], state.T @ c[1, t, h // 2])
        torch.testing.assert_close(final[1, h], state)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients_equal_the_reference(backend, L, dtype, groups):
    tensors = inputs(L, dtype=dtype, groups=groups)
    assert_close(run(mk.ssd, tensors, backend=backend), reference(tensors), TOLERANCE[dtype])


@pytest.mark.parametrize("largest_dt", [0.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", FAST)
def test_zero_and_large_dt_stay_exact(backend, dtype, largest_dt):
    tensors = inputs(70, dtype=dtype, largest_dt=largest_dt)
    *got, got_state = run(mk.ssd, tensors, backend=backend)
    *want, want_state = reference(tensors)
    for name, x, y in zip(NAMES, got, want, strict=False):
        assert torch.isfinite(x).all(), name
        assert relative(x, y) <= TOLERANCE[dtype], (name, relative(x, y))
    # So little of the first state is left that float32 has no digits for it.
    error = (got_state.double() - want_state).norm()
    assert error <= TOLERANCE[dtype] * want_state.norm() + 1e-30


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_errs_at_most_twice_as_much_as_the_reference(backend):
    tensors = inputs(100, dtype=torch.bfloat16)
    truth, own = reference(tensors), run(mk.ssd, tensors, backend="reference")
    for x, y, z in zip(run(mk.ssd, tensors, backend=backend), own, truth, strict=True):
        assert x.dtype == y.dtype
        assert relative(x, z) <= BFLOAT16_MULTIPLE * relative(y, z) + BFLOAT16_FLOOR


@pytest.mark.parametrize("backend", FAST)
def test_autocast_changes_nothing(backend):
    tensors = inputs(40, dtype=torch.float32)
    plain = run(mk.ssd, tensors, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(mk.ssd, tensors, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_chunk_length_does_not_matter(backend):
    tensors = inputs(70)
    want = run(mk.ssd, tensors, backend=backend)
    for chunk in (1, 3, 16, 64, 200):
        assert_close(run(mk.ssd, tensors, chunk=chunk, backend=backend), want, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [0, 7, 32, 40])
def test_a_state_carried_across_a_split_equals_the_whole(backend, cut):
    def split(x, dt, a, b, c, *, initial_state, output_final_state):
        y1, S = mk.ssd(
            x[:, :cut],
            dt[:, :cut],
            a,
            b[:, :cut],
            c[:, :cut],
            initial_state=initial_state,
            output_final_state=True,
            backend=backend,
        )
        y2, S = mk.ssd(
            x[:, cut:],
            dt[:, cut:],
            a,
            b[:, cut:],
            c[:, cut:],
            initial_state=S,
            output_final_state=output_final_state,
            backend=backend,
        )
        return torch.cat([y1, y2], dim=1), S

    tensors = inputs(40)
    assert_close(run(split, tensors), run(mk.ssd, tensors, backend=backend), 1e-12)


@pytest.mark.parametrize("t", [0, 15, 31, 38])
@pytest.mark.parametrize("backend", FAST)
def test_no_output_depends_on_a_later_token(backend, t):
    *tensors, S = inputs(40)
    leaves = [x.clone().requires_grad_() for x in tensors]
    y, _ = mk.ssd(*leaves, initial_state=S, chunk=16, backend=backend)
    for x, grad in zip(leaves, torch.autograd.grad(y[:, : t + 1].sum(), leaves), strict=True):
        if x.dim() > 1:
            assert (grad[:, t + 1 :] == 0).all()
            assert (grad[:, : t + 1] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    x, dt, a, b, c, S = inputs(5, groups=1)
    dt[:, 2] = 0
    tensors = [x[:1, :, :2, :2], dt[:1, :, :2], a[:2], b[:1, ..., :2], c[:1, ..., :2]]
    leaves = [z.clone().requires_grad_() for z in (*tensors, S[:1, :2, :2, :2])]

    def operator(*arguments):
        *rest, S = arguments
        return mk.ssd(*rest, initial_state=S, output_final_state=True, chunk=2, backend=backend)

    assert torch.autograd.gradcheck(operator, leaves)


@pytest.mark.parametrize("backend", FAST)
def test_second_order_gradients_are_refused(backend):
    *tensors, _ = inputs(4)
    tensors[0].requires_grad_()
    y, _ = mk.ssd(*tensors, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", FAST)
def test_step_equals_the_parallel_form(backend):
    x, dt, a, b, c, S = inputs(20)
    options = {"output_final_state": True, "backend": backend}
    y, final = mk.ssd(x, dt, a, b, c, initial_state=S, **options)
    for t in range(20):
        y_t, S = mk.ssd_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], S)
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(S, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_give_the_same_values(backend):
    tensors = inputs(20)
    turned = [x.mT.contiguous().mT if x.dim() > 1 else x for x in tensors]
    want = run(mk.ssd, tensors, backend=backend)
    assert_close(run(mk.ssd, turned, backend=backend), want, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0, 4, 5, 1, 6), (0, 7, 4, 5, 2, 6), (2, 7, 4, 0, 2, 6), (2, 7, 4, 5, 2, 0)])
def test_empty_inputs_work(shape, backend):
    b, L, h, p, g, n = shape
    shapes = [(b, L, h, p), (b, L, h), (h,), (b, L, g, n), (b, L, g, n), (b, h, n, p)]
    *arguments, S = leaves = [torch.ones(s, requires_grad=True) for s in shapes]
    y, final = mk.ssd(*arguments, initial_state=S, output_final_state=True, backend=backend)
    assert (y.shape, final.shape) == ((b, L, h, p), (b, h, n, p))
    (y.sum() + final.sum()).backward()
    assert all(x.grad is None or x.grad.shape == x.shape for x in leaves)


def test_groups_that_do_not_divide_the_heads_are_refused():
    x, dt, a, b, c, _ = inputs(4)
    with pytest.raises(ValueError, match=r"ssd: b has G=3 groups, which must divide H=4"):
        mk.ssd(x, dt, a, b.repeat(1, 1, 2, 1)[:, :, :3], c.repeat(1, 1, 2, 1)[:, :, :3])
