"""RMSNorm, gates and the token shift: the loops against plain torch in float64, values and gradients.

Tolerances are relative L2 errors against float64 on the same (rounded) inputs; for bfloat16, a
multiple of the error that plain torch itself makes on those inputs.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mad_kernels as mk

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}
DTYPES = [*TOLERANCE, torch.bfloat16]
EPS = 0.1  # large: at width 1 the gradient of x vanishes with it
# Widths that divide a vector, of a vector, of several, and in between; rows that fill no vector.
SHAPES = [(3, 5, D) for D in (1, 2, 3, 8, 16, 24, 32, 33, 100, 128)] + [(150, 64), (16,), (1, 1, 7)]


def relative(x, y):
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm().clamp_min(1e-300)).item()


def drawn(*shapes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def gradients(operator, tensors, slopes):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    results = operator(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    slopes = [g.to(y.dtype) for g, y in zip(slopes, results, strict=True)]
    return *results, *torch.autograd.grad(results, leaves, slopes)


def compare(operator, tensors, slopes):
    """Hold the loops to plain torch in float64."""
    dtype = tensors[0].dtype
    got = gradients(lambda *x: operator(*x, backend="numba"), tensors, slopes)
    own = gradients(lambda *x: operator(*x, backend="reference"), tensors, slopes)
    wide = [x.double() for x in tensors]
    want = gradients(lambda *x: operator(*x, backend="reference"), wide, slopes)
    assert [x.dtype for x in got] == [x.dtype for x in own]
    for x, y, z in zip(got, own, want, strict=True):
        allowed = TOLERANCE.get(dtype) or max(2 * relative(y, z), 2e-6)
        assert relative(x, z) <= allowed, (relative(x, z), relative(y, z))


def norm(x, weight, **options):
    return mk.rms_norm(x, weight, EPS, **options)


def add_norm(x, r, weight, **options):
    return mk.add_rms_norm(x, r, weight, EPS, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_equals_plain_torch(shape, dtype):
    x, weight, slope = drawn(shape, shape[-1:], shape, dtype=dtype)
    compare(norm, [x, weight], [slope])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_residual_and_its_norm_equal_plain_torch(shape, dtype):
    x, r, weight, *slopes = drawn(shape, shape, shape[-1:], shape, shape, dtype=dtype)
    compare(add_norm, [x, r, weight], slopes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_equals_plain_torch(shape, dtype):
    *front, width = shape
    h, slope = drawn((*front, 2 * width), shape, dtype=dtype)
    compare(mk.swiglu, [4 * h], [slope])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_skip_and_gate_equal_plain_torch(shape, dtype):
    y, u, z, skip, slope = drawn(*[shape] * 3, shape[-1:], shape, dtype=dtype)
    compare(mk.skip_gate, [y, u, 4 * z, skip], [slope])


def test_a_gate_in_bfloat16_meets_float32():
    y, u, z, skip, slope = drawn(*[(2, 5, 40)] * 3, (40,), (2, 5, 40), dtype=torch.float32)
    z = z.bfloat16()
    got = gradients(lambda y, u, z, d: mk.skip_gate(y, u, slices(z), d, backend="numba"), [y, u, z, skip], [slope])
    want = gradients(mk.skip_gate, [t.double() for t in (y, u, z, skip)], [slope])
    assert [t.dtype for t in got] == [*[torch.float32] * 3, torch.bfloat16, torch.float32]
    for p, q, limit in zip(got, want, [2e-6] * 3 + [4e-3, 2e-6], strict=True):
        assert relative(p, q) < limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 16, 2), (1, 4, 8), (70, 8, 16), (5, 1, 32), (2, 3, 32), (3, 2, 64), (2, 1, 96)])
def test_norm_bonus_and_gate_of_heads_equal_plain_torch(shape, dtype):
    tensors = drawn(*[shape] * 5, *[shape[1:]] * 3, dtype=dtype)
    compare(lambda *x, **options: mk.head_norm_gate(*x, EPS, **options), tensors, drawn(shape, dtype=dtype, seed=1))


def test_heads_between_vectors_take_plain_torch():
    tensors = drawn(*[(2, 3, 8)] * 5, *[(3, 8)] * 3)
    with mk.record_backends() as ran:
        mk.head_norm_gate(*tensors, EPS)
    assert ran == {"head_norm_gate:reference"}
    with pytest.raises(ValueError, match="takes heads that fill vectors of 32"):
        mk.head_norm_gate(*tensors, EPS, backend="numba")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rows"), [((3, 5, 7), 6), ((2, 1, 32), 1), ((1, 9, 100), 2), ((4, 3, 64), 3)])
def test_the_token_shift_equals_plain_torch(shape, rows, dtype):
    x, mix, *slopes = drawn(shape, (rows, shape[-1]), *[shape] * rows, dtype=dtype)
    compare(mk.token_shift, [x, mix], slopes)


def test_a_shift_reads_parts_of_a_projection_and_gradients_that_repeat():
    x, mix, slope = drawn((2, 5, 36), (2, 36), (2, 5, 36))
    slopes = [slope, slope[:, :1].expand(2, 5, 36)]
    want = gradients(mk.token_shift, [x, mix], slopes)
    got = gradients(lambda x, mix: mk.token_shift(slices(x), mix, backend="numba"), [x, mix], slopes)
    for p, q in zip(got, want, strict=True):
        assert relative(p, q) < 1e-13


def test_a_branch_in_bfloat16_joins_a_stream_in_float32():
    x, weight, d_sum, dy = drawn((9, 40), (40,), (9, 40), (9, 40), dtype=torch.float32)
    r = drawn((9, 40), dtype=torch.bfloat16, seed=1)[0]
    s, y, dx, dr, d_weight = gradients(add_norm, [x, r, weight], [d_sum, dy])
    assert [z.dtype for z in (s, y, dx, dr)] == [*[torch.float32] * 3, torch.bfloat16]
    assert torch.equal(s, x + r)
    assert torch.equal(dr, dx.bfloat16())
    want = gradients(add_norm, [z.double() for z in (x, r, weight)], [d_sum, dy])
    assert relative(d_weight, want[4]) < 2e-6


def test_the_output_may_be_rounded_on_its_way():
    x, weight, slope = drawn((9, 40), (40,), (9, 40), dtype=torch.float32)
    narrow = gradients(lambda *z: norm(*z, dtype=torch.bfloat16), [x, weight], [slope])
    cast = gradients(lambda *z: norm(*z).bfloat16(), [x, weight], [slope])
    assert all(torch.equal(p, q) for p, q in zip(narrow, cast, strict=True))


def slices(x):
    """The same numbers where a part of a projection stands."""
    return torch.cat([x, x.new_full((*x.shape[:-1], 3), 7.0)], dim=-1)[..., : x.shape[-1]]


def turned(x):
    """The same numbers, the first axis fastest."""
    return x.T.contiguous().T


@pytest.mark.parametrize("laid_out", [slices, turned])
@pytest.mark.parametrize("width", [16, 36])
def test_strides_do_not_matter(width, laid_out):
    x, r, weight, d_sum, dy = drawn(*[(6, width)] * 2, (width,), *[(6, width)] * 2)
    arguments = [x, r, weight], [d_sum, dy]
    want = gradients(add_norm, *arguments)
    got = gradients(
        lambda x, r, weight: add_norm(laid_out(x), laid_out(r), weight),
        arguments[0],
        [laid_out(g) for g in arguments[1]],
    )
    assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))
    want = gradients(mk.swiglu, [x], [dy[:, : width // 2]])
    got = gradients(lambda x: mk.swiglu(laid_out(x)), [x], [laid_out(dy)[:, : width // 2]])
    assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))


@pytest.mark.parametrize("operator", ["rms_norm", "add_rms_norm", "swiglu"])
def test_a_gradient_that_repeats_one_number_is_read_right(operator):
    x, r, weight = drawn((5, 8), (5, 8), (8,))
    run, tensors = {
        "rms_norm": (norm, [x, weight]),
        "add_rms_norm": (lambda *z: sum(add_norm(*z)), [x, r, weight]),
        "swiglu": (mk.swiglu, [x]),
    }[operator]
    leaves = [z.requires_grad_() for z in tensors]
    y = run(*leaves)
    repeated = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    spelled = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    assert all(torch.equal(p, q) for p, q in zip(repeated, spelled, strict=True))
    rows = torch.arange(1.0, 1 + y.shape[1]).to(y).expand(y.shape)  # one row, again and again
    repeated = torch.autograd.grad(y, leaves, rows, retain_graph=True)
    spelled = torch.autograd.grad(y, leaves, rows.clone(memory_format=torch.contiguous_format))
    assert all(torch.equal(p, q) for p, q in zip(repeated, spelled, strict=True))


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_its_gradient(used):
    x, r, weight = (z.requires_grad_() for z in drawn((5, 8), (5, 8), (8,)))

    def grads(backend):
        y = add_norm(x, r, weight, backend=backend)[used]
        return torch.autograd.grad(y.square().sum(), (x, r, weight), allow_unused=True)

    for p, q in zip(grads("numba"), grads("reference"), strict=True):
        assert relative(p, torch.zeros_like(p) if q is None else q) < 1e-13


def test_gradients_of_a_shifted_difference_agree():
    x, r, weight = (z.requires_grad_() for z in drawn((4, 6), (4, 6), (6,)))
    assert torch.autograd.gradcheck(lambda *z: add_norm(*z, backend="numba"), (x, r, weight))
    assert torch.autograd.gradcheck(lambda h: mk.swiglu(h, backend="numba"), (x,))


@pytest.mark.parametrize("call", [norm, lambda x, _, **k: mk.swiglu(x, **k)])
def test_second_order_gradients_are_refused(call):
    x, weight = (z.requires_grad_() for z in drawn((4, 6), (6,)))
    (grad,) = torch.autograd.grad(call(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has first-order gradients only here: take backend"):
        grad.sum().backward()


@pytest.mark.parametrize("call", [norm, lambda x, _, **k: mk.swiglu(x, **k)])
def test_what_has_no_memory_takes_plain_torch(call):
    x, weight = drawn((3, 4, 6), (6,))

    def loss(x):
        return call(x, weight).square().sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    assert relative(torch.func.vmap(torch.func.grad(loss))(x), want) < 1e-13
    with pytest.raises(ValueError, match="backend='numba' takes plain tensors"):
        torch.func.grad(lambda x: call(x, weight, backend="numba").sum())(x)
    assert call(x.to("meta"), weight.to("meta")).device.type == "meta"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(x), mode.from_tensor(weight)).shape[:2] == (3, 4)


COMPILE = """
import torch, mad_kernels as mk
x, weight = torch.arange(24.0).view(3, 8) / 24, torch.ones(8)
taps = torch.ones(8, 2)
for call in (
    lambda x: mk.rms_norm(x, weight, 1e-5),
    lambda x: mk.swiglu(x),
    lambda x: mk.skip_gate(x, x, x, weight),
    lambda x: mk.token_shift(x[None], torch.ones(2, 8))[1],
    lambda x: mk.short_conv_split(x[None], taps, None, (3, 5), activation="silu")[1],
):
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), call(x))
"""


def test_the_compiler_sees_plain_torch():
    # A process of its own: torch.compile cannot look into the shape checker of the tests.
    environment = {"PYTHONPATH": str(Path(mk.__file__).parents[1]), "PATH": ""}
    command = [sys.executable, "-W", "error::UserWarning", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(0, 6), (3, 0)])
def test_empty_inputs_work(shape):
    x, r, weight = (torch.ones(s, requires_grad=True) for s in (shape, shape, shape[1:]))
    s, y = add_norm(x, r, weight, backend="numba")
    (s.sum() + y.sum() + mk.swiglu(x, backend="numba").sum()).backward()
    assert x.grad is not None and x.grad.shape == shape


def test_nan_and_infinity_stay_where_they_are():
    h = torch.tensor([[float("nan"), 1.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    y = mk.swiglu(h, backend="numba")
    assert y.isnan().tolist() == [[True, False], [False, False]]
    y = norm(torch.cat([h, h]), torch.ones(4), backend="numba")
    assert y.isnan().all(1).tolist() == [True, False, True, False]


def test_arguments_that_do_not_fit_are_refused():
    x = torch.ones(3, 6)
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(5,\) but x has \(3, 6\)"):
        mk.rms_norm.__wrapped__(x, torch.ones(5), EPS)
    with pytest.raises(ValueError, match=r"rms_norm: eps=-1e-05 must be at least 0"):
        mk.rms_norm(x, torch.ones(6), -1e-5)
    with pytest.raises(ValueError, match=r"skip_gate: z has shape \(3, 5\) but y has \(3, 6\)"):
        mk.skip_gate.__wrapped__(x, x, x[:, :5], torch.ones(6))
    with pytest.raises(ValueError, match=r"swiglu: h has shape \(3, 5\), but its last axis"):
        mk.swiglu.__wrapped__(x[:, :5])
