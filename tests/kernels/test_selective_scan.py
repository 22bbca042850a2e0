"""Mamba's selective scan: the compiled form against the float64 token loop, values and gradients.

Tolerances are relative L2 errors against the float64 reference on the same (rounded) inputs; for
bfloat16, a multiple of the error that the reference itself makes on those inputs.
"""

import inspect

import pytest
import torch

import mad_kernels as mk

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
BFLOAT16_MULTIPLE = 2.0
BFLOAT16_FLOOR = 1e-6

BACKENDS = ("reference", "numba")
LENGTHS = (1, 31, 32, 33, 100)
B, D, N = 2, 40, 6
NAMES = ("y", "final_state", "x", "dt", "a", "b", "c", "initial_state")


def relative(x, y):
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm().clamp_min(1e-300)).item() if y.numel() else 0.0


def inputs(L, *, dtype=torch.float64, largest_dt=2.0, channels=D, width=N):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    dt = torch.rand(B, L, channels, generator=g, dtype=torch.float64).square() * largest_dt
    a = -torch.rand(channels, width, generator=g, dtype=torch.float64) * 2 - 0.1
    tensors = (normal(B, L, channels), dt, a, normal(B, L, width), normal(B, L, width))
    return [x.to(dtype) for x in (*tensors, normal(B, channels, width))]


def run(operator, tensors, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    *arguments, S = leaves
    y, final = operator(*arguments, initial_state=S, output_final_state=True, **options)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (y, final)]
    loss = sum((x.double() * w).sum() for x, w in zip((y, final), weights, strict=True))
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


def reference(tensors):
    return run(mk.selective_scan, [x.double() for x in tensors], backend="reference")


def assert_close(got, want, tolerance):
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert torch.isfinite(x).all(), name
        assert relative(x, y) <= tolerance, (name, relative(x, y))


def test_the_reference_is_the_equation():
    x, dt, a, b, c, S = inputs(4)
    options = {"output_final_state": True, "backend": "reference"}
    y, final = mk.selective_scan(x, dt, a, b, c, initial_state=S, **options)
    for d in range(0, D, 7):
        state = S[1, d]
        for t in range(4):
            decay = torch.exp(dt[1, t, d] * a[d])
            state = decay * state + dt[1, t, d] * x[1, t, d] * b[1, t]
            torch.testing.assert_close(y[1, t, d], state @ c[1, t])
        torch.testing.assert_close(final[1, d], state)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("L", LENGTHS)
def test_values_and_gradients_equal_the_reference(L, dtype):
    tensors = inputs(L, dtype=dtype)
    got = run(mk.selective_scan, tensors, backend="numba")
    assert_close(got, reference(tensors), TOLERANCE[dtype])
    assert all(x.dtype == dtype for x in got)


@pytest.mark.parametrize("widths", [(1, 1), (31, 3), (32, 16), (65, 2)])
def test_widths_around_a_register(widths):
    channels, width = widths
    tensors = inputs(40, dtype=torch.float32, channels=channels, width=width)
    got = run(mk.selective_scan, tensors, backend="numba")
    assert_close(got, reference(tensors), TOLERANCE[torch.float32])


@pytest.mark.parametrize("largest_dt", [0.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_zero_and_large_dt_stay_exact(dtype, largest_dt):
    tensors = inputs(70, dtype=dtype, largest_dt=largest_dt)
    *got, got_state = run(mk.selective_scan, tensors, backend="numba")
    *want, want_state = reference(tensors)
    for name, x, y in zip(NAMES, got, want, strict=False):
        assert torch.isfinite(x).all(), name
        assert relative(x, y) <= TOLERANCE[dtype], (name, relative(x, y))
    # So little of the first state is left that float32 has no digits for it.
    error = (got_state.double() - want_state).norm()
    assert error <= TOLERANCE[dtype] * want_state.norm() + 1e-30


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_exponential_is_right_from_zero_to_underflow(dtype):
    exponent = -torch.logspace(-9, 2.8, 4001, dtype=torch.float64).to(dtype)
    ones = torch.ones(1, 1, exponent.numel(), dtype=dtype)
    a, none = exponent[:, None], ones.new_zeros(1, 1, 1)
    options = {"initial_state": ones.mT, "output_final_state": True, "backend": "numba"}
    _, final = mk.selective_scan(ones, ones, a, none, none, **options)
    got, want = final.flatten().double(), exponent.double().exp()
    limit = {torch.float64: (1e-15, 1e-307), torch.float32: (3e-7, 1.2e-38)}[dtype]
    assert ((got - want).abs() <= limit[0] * want + limit[1]).all()
    assert got[-1] == 0 or dtype == torch.float64


def test_bfloat16_errs_at_most_twice_as_much_as_the_reference():
    tensors = inputs(100, dtype=torch.bfloat16)
    truth, own = reference(tensors), run(mk.selective_scan, tensors, backend="reference")
    got = run(mk.selective_scan, tensors, backend="numba")
    for x, y, z in zip(got, own, truth, strict=True):
        assert x.dtype == y.dtype
        assert relative(x, z) <= BFLOAT16_MULTIPLE * relative(y, z) + BFLOAT16_FLOOR


def test_autocast_changes_nothing():
    tensors = inputs(40, dtype=torch.float32)
    plain = run(mk.selective_scan, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(mk.selective_scan, tensors)
    assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [0, 7, 32, 40])
def test_a_state_carried_across_a_split_equals_the_whole(backend, cut):
    def split(x, dt, a, b, c, *, initial_state, output_final_state):
        first = [z[:, :cut] for z in (x, dt, b, c)]
        second = [z[:, cut:] for z in (x, dt, b, c)]
        options = {"output_final_state": output_final_state, "backend": backend}
        y1, S = mk.selective_scan(*first[:2], a, *first[2:], initial_state=initial_state, **options)
        y2, S = mk.selective_scan(*second[:2], a, *second[2:], initial_state=S, **options)
        return torch.cat([y1, y2], dim=1), S

    tensors = inputs(40)
    whole = run(mk.selective_scan, tensors, backend=backend)
    assert_close(run(split, tensors), whole, 1e-12)


@pytest.mark.parametrize("t", [0, 30, 31, 32, 38])
def test_no_output_depends_on_a_later_token(t):
    *tensors, S = inputs(40)
    leaves = [x.clone().requires_grad_() for x in tensors]
    y, _ = mk.selective_scan(*leaves, initial_state=S, backend="numba")
    for x, grad in zip(leaves, torch.autograd.grad(y[:, : t + 1].sum(), leaves), strict=True):
        if x.dim() > 2:
            assert (grad[:, t + 1 :] == 0).all()
            assert (grad[:, : t + 1] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    x, dt, a, b, c, S = inputs(5)
    dt[:, 2] = 0
    tensors = [x[:1, :, :3], dt[:1, :, :3], a[:3, :2], b[:1, :, :2], c[:1, :, :2], S[:1, :3, :2]]
    leaves = [z.clone().requires_grad_() for z in tensors]

    def operator(*arguments):
        *rest, S = arguments
        options = {"output_final_state": True, "backend": backend}
        return mk.selective_scan(*rest, initial_state=S, **options)

    assert torch.autograd.gradcheck(operator, leaves)


def test_second_order_gradients_are_refused():
    *tensors, _ = inputs(4)
    tensors[0].requires_grad_()
    y, _ = mk.selective_scan(*tensors, backend="numba")
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only here: take backend='reference'"):
        grad.sum().backward()


def test_step_equals_the_parallel_form():
    x, dt, a, b, c, S = inputs(20)
    options = {"output_final_state": True, "backend": "numba"}
    y, final = mk.selective_scan(x, dt, a, b, c, initial_state=S, **options)
    for t in range(20):
        y_t, S = mk.selective_scan_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], S)
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(S, final, rtol=1e-12, atol=1e-12)


def test_strided_inputs_give_the_same_bytes():
    tensors = inputs(20)
    turned = [x.mT.contiguous().mT for x in tensors]
    got, want = run(mk.selective_scan, turned), run(mk.selective_scan, tensors)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0, 4, 5), (0, 7, 4, 5), (2, 7, 0, 5), (2, 7, 4, 0)])
def test_empty_inputs_work(shape, backend):
    b, L, d, n = shape
    shapes = [(b, L, d), (b, L, d), (d, n), (b, L, n), (b, L, n), (b, d, n)]
    *arguments, S = leaves = [torch.ones(s, requires_grad=True) for s in shapes]
    options = {"output_final_state": True, "backend": backend}
    y, final = mk.selective_scan(*arguments, initial_state=S, **options)
    assert (y.shape, final.shape) == ((b, L, d), (b, d, n))
    (y.sum() + final.sum()).backward()
    assert all(x.grad is None or x.grad.shape == x.shape for x in leaves)


def test_shapes_that_do_not_fit_are_refused():
    x, dt, a, b, c, _ = inputs(4)
    with pytest.raises(ValueError, match=r"selective_scan: a has D=39 but x has D=40"):
        # Unwrapped: a runtime shape checker, where one is active, would speak first.
        inspect.unwrap(mk.selective_scan)(x, dt, a[:39], b, c)
