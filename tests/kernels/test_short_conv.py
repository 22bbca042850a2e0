"""The short convolution: every backend against the float64 token loop, values and gradients.

Tolerances are relative L2 errors against the float64 reference on the same (rounded) inputs; for
bfloat16, a multiple of the error that the reference itself makes on those inputs.
"""

import inspect

import pytest
import torch

import mad_kernels as mk

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
BFLOAT16_MULTIPLE = 2.0

B, D = 3, 7
NAMES = ("y", "final_state", "x", "weight", "bias", "initial_state")


def relative(x, y):
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm().clamp_min(1e-300)).item() if y.numel() else 0.0


def inputs(L, *, K=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = ((B, L, D), (D, K), (D,), (B, D, K - 1))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def run(operator, tensors, **options):
    x, weight, bias, S = leaves = [z.detach().clone().requires_grad_() for z in tensors]
    y, final = operator(x, weight, bias, initial_state=S, output_final_state=True, **options)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(z.shape, generator=g, dtype=torch.float64) for z in (y, final)]
    loss = sum((z.double() * w).sum() for z, w in zip((y, final), weights, strict=True))
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


def assert_close(got, want, tolerance):
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert relative(x, y) <= tolerance, (name, relative(x, y))


def reference(tensors, **options):
    return run(mk.short_conv, [x.double() for x in tensors], backend="reference", **options)


def test_the_reference_is_the_equation():
    x, weight, bias, S = inputs(5)
    y, final = mk.short_conv(x, weight, bias, initial_state=S, output_final_state=True, backend="reference")
    line = torch.cat([S[1, 2], x[1, :, 2]])
    want = [bias[2] + (weight[2] * line[t : t + 4]).sum() for t in range(5)]
    torch.testing.assert_close(y[1, :, 2], torch.stack(want))
    assert torch.equal(final[1, 2], x[1, 2:, 2])


@pytest.mark.parametrize("backend", ["fused", "numba"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("L", [1, 2, 3, 4, 17, 100])
def test_backends_equal_the_reference_in_value_and_gradient(L, dtype, K, activation, backend):
    tensors = inputs(L, K=K, dtype=dtype)
    got = run(mk.short_conv, tensors, activation=activation, backend=backend)
    assert [x.dtype for x in got] == [dtype] * 6
    assert_close(got, reference(tensors, activation=activation), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["fused", "numba"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_bfloat16_errs_at_most_twice_as_much_as_the_reference(activation, backend):
    tensors = inputs(200, dtype=torch.bfloat16)
    own = run(mk.short_conv, tensors, activation=activation, backend="reference")
    got = run(mk.short_conv, tensors, activation=activation, backend=backend)
    truth = reference(tensors, activation=activation)
    for name, x, y, z in zip(NAMES, got, own, truth, strict=True):
        assert x.dtype == torch.bfloat16
        assert relative(x, z) <= BFLOAT16_MULTIPLE * relative(y, z), (name, relative(x, z))


def test_autocast_changes_nothing():
    tensors = inputs(40, dtype=torch.float32)
    plain = run(mk.short_conv, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(mk.short_conv, tensors)
    assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


@pytest.mark.parametrize("backend", ["reference", "fused", "numba"])
@pytest.mark.parametrize("cut", [0, 1, 2, 9, 20])
def test_a_state_carried_across_a_split_equals_the_whole(backend, cut):
    def split(x, weight, bias, *, initial_state, output_final_state):
        options = {"output_final_state": output_final_state, "backend": backend}
        y1, S = mk.short_conv(x[:, :cut], weight, bias, initial_state=initial_state, **options)
        y2, S = mk.short_conv(x[:, cut:], weight, bias, initial_state=S, **options)
        return torch.cat([y1, y2], dim=1), S

    tensors = inputs(20)
    assert_close(run(split, tensors), run(mk.short_conv, tensors, backend=backend), 1e-12)


def test_no_output_depends_on_a_later_token():
    x, weight, bias, _ = inputs(12)
    x.requires_grad_()
    y, _ = mk.short_conv(x, weight, bias, activation="silu")
    (grad,) = torch.autograd.grad(y[:, :6].sum(), x)
    assert (grad[:, 6:] == 0).all()
    assert (grad[:, :6] != 0).all()


@pytest.mark.parametrize("backend", ["reference", "fused", "numba"])
def test_gradcheck(backend):
    leaves = [x.requires_grad_() for x in inputs(5)]

    def operator(x, weight, bias, S):
        options = {"initial_state": S, "output_final_state": True, "backend": backend}
        return mk.short_conv(x, weight, bias, activation="silu", **options)

    assert torch.autograd.gradcheck(operator, leaves)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels", [(3, 1, 3), (40, 33, 64)])
def test_parts_equal_the_whole_cut(channels, dtype):
    g = torch.Generator().manual_seed(3)
    D = sum(channels)
    wide = torch.randn(2, 9, D + 5, generator=g, dtype=torch.float64).to(dtype)
    weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((D, 4), (D,)))

    def results(backend, dtype):
        x, w, b = leaves = [z.to(dtype).requires_grad_() for z in (wide, weight, bias)]
        options = {"activation": "silu", "backend": backend}
        parts = mk.short_conv_split(x[..., 2 : 2 + D], w, b, channels, **options)  # a slice
        # Of three kinds: a slice, one that repeats a number, and one in an order of its own.
        loss = (parts[0] * parts[0]).sum() + 3 * parts[1].sum() + (parts[2].mT * 2).square().sum()
        return *parts, *torch.autograd.grad(loss, leaves)

    got, want = results("numba", dtype), results("reference", torch.float64)
    assert [x.shape[-1] for x in got[:3]] == list(channels)
    wanted = [relative(x, y) for x, y in zip(results("reference", dtype), want, strict=True)]
    for x, y, own in zip(got, want, wanted, strict=True):
        assert relative(x, y) <= max(2 * own, TOLERANCE[dtype])


def test_parts_may_be_wider_than_their_input():
    x, weight, bias, _ = inputs(9, dtype=torch.bfloat16)
    parts = mk.short_conv_split(x, weight, bias, (3, 4), dtype=torch.float32)
    exact = mk.short_conv(x.double(), weight.double(), bias.double(), backend="reference")[0]
    assert relative(torch.cat(parts, dim=-1), exact) < 1e-6


def test_cuts_that_do_not_fit_are_refused():
    x, weight, bias, _ = inputs(5)
    with pytest.raises(ValueError, match=r"widths=\(3, 3\) must be positive and add up to D=7"):
        mk.short_conv_split(x, weight, bias, (3, 3))


def test_loops_refuse_what_has_no_memory():
    x, weight, _, _ = inputs(5)
    with pytest.raises(ValueError, match="short_conv: backend='numba' takes plain tensors"):
        torch.func.grad(lambda z: mk.short_conv(z, weight, backend="numba")[0].sum())(x)
    found = torch.func.grad(lambda z: mk.short_conv(z, weight)[0].sum())(x)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(mk.short_conv(leaf, weight, backend="numba")[0].sum(), leaf)
    assert relative(found, want) < 1e-12


def test_second_order_gradients_are_refused():
    x, weight, bias, _ = inputs(5)
    y, _ = mk.short_conv(x.requires_grad_(), weight, bias)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="short_conv has first-order gradients only"):
        grad.sum().backward()


@pytest.mark.parametrize("activation", [None, "silu"])
def test_step_equals_the_parallel_form(activation):
    x, weight, bias, S = inputs(10)
    options = {"initial_state": S, "output_final_state": True}
    y, final = mk.short_conv(x, weight, bias, activation=activation, **options)
    for t in range(10):
        y_t, S = mk.short_conv_step(x[:, t], weight, bias, S, activation=activation)
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-12, atol=1e-12)
    assert torch.equal(S, final)


def test_strided_inputs_give_the_same_values():
    x, weight, bias, S = inputs(20)
    turned = [x.mT.contiguous().mT, weight.mT.contiguous().mT, bias, S.mT.contiguous().mT]
    assert_close(run(mk.short_conv, turned), run(mk.short_conv, (x, weight, bias, S)), 1e-14)


@pytest.mark.parametrize("backend", ["reference", "fused", "numba"])
@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 6, 5), (2, 6, 0)])
def test_empty_inputs_work(shape, backend):
    x, weight = torch.ones(shape, requires_grad=True), torch.ones(shape[2], 4)
    y, final = mk.short_conv(x, weight, output_final_state=True, backend=backend)
    assert y.shape == shape
    assert final.shape == (shape[0], shape[2], 3)
    (y.sum() + final.sum()).backward()


def test_wrong_states_and_activations_are_refused():
    x, weight, bias, S = inputs(5)
    short_conv = inspect.unwrap(mk.short_conv)  # a runtime shape checker would speak first
    with pytest.raises(ValueError, match=r"state keeps 2 inputs, but K=4 taps look back on 3"):
        short_conv(x, weight, bias, initial_state=S[..., 1:])
    with pytest.raises(ValueError, match=r"activation='gelu' is not built in"):
        short_conv(x, weight, bias, activation="gelu")
