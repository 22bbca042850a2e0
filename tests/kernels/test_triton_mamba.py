"""The GPU kernels of Mamba's parts in triton's interpreter: the selective scan, the convolution.

As in `test_triton`: values and gradients against float64 on a CPU; `make gpu` repeats the
comparisons on the device.
"""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
import torch

import mad_kernels as mk

if find_spec("triton") is None:
    pytest.skip("needs the package triton: pip install '.[triton]'", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from mad_kernels import blocks
from mad_kernels.selective_scan.triton import selective_scan_triton
from mad_kernels.short_conv.triton import short_conv_triton

# triton 3.6 reads sizes in a way that numpy announces it will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert blocks.interpreted(), "triton was imported before this file"


def relative(x, y):
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm().clamp_min(1e-300)).item() if y.numel() else 0.0


def scan_inputs(L, *, B=2, D=20, N=6, largest_dt=2.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(L)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    dt = torch.rand(B, L, D, generator=g, dtype=torch.float64).square() * largest_dt
    a = -torch.rand(D, N, generator=g, dtype=torch.float64) * 2 - 0.1
    tensors = (normal(B, L, D), dt, a, normal(B, L, N), normal(B, L, N), normal(B, D, N))
    return [x.to(dtype) for x in tensors]


def conv_inputs(L, *, B=2, D=70, K=4, bias=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(L)
    shapes = [(B, L, D), (D, K), (D,) if bias else None, (B, D, K - 1)]
    return [None if s is None else torch.randn(s, generator=g).to(dtype) for s in shapes]


def run(operator, tensors, **options):
    """Outputs and the gradient of every tensor, the last one being the initial state."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    *arguments, S = leaves
    y, final = operator(*arguments, initial_state=S, output_final_state=True, **options)
    g = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (y, final)]
    loss = sum((x.double() * w).sum() for x, w in zip((y, final), weights, strict=True))
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [y.detach(), final.detach(), *grads]


def assert_exact(operator, tensors, **options):
    got = run(operator, tensors, backend="triton", **options)
    wide = [None if x is None else x.double() for x in tensors]
    want = run(operator, wide, backend="reference", **options)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(x).all(), i
        assert relative(x, y) <= TOLERANCE, (i, relative(x, y))
    return got


@pytest.mark.parametrize("L", [1, 7, 8, 9, 40])
def test_selective_scan_equals_the_reference_in_value_and_gradient(L):
    with mk.record_backends() as ran:
        got = assert_exact(mk.selective_scan, scan_inputs(L))
    assert "selective_scan:triton" in ran
    assert all(x.dtype == torch.float32 for x in got)


@pytest.mark.parametrize(("D", "N"), [(1, 1), (3, 128), (70, 4), (17, 16)])
def test_widths_of_the_scan_do_not_matter(D, N):
    assert_exact(mk.selective_scan, scan_inputs(10, B=1, D=D, N=N))


@pytest.mark.parametrize("largest_dt", [0.0, 50.0, 1e4])
def test_zero_and_large_dt_stay_exact(largest_dt):
    tensors = scan_inputs(20, largest_dt=largest_dt)
    tensors[-1].zero_()  # of another first state, nothing is left that float32 has digits for
    assert_exact(mk.selective_scan, tensors)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("L", [1, 2, 3, 4, 31, 70])
def test_short_conv_equals_the_reference_in_value_and_gradient(L, K, activation):
    tensors = conv_inputs(L, K=K, bias=K != 2)
    with mk.record_backends() as ran:
        got = assert_exact(convolve, tensors, activation=activation)
    assert "short_conv:triton" in ran
    assert all(x.dtype == torch.float32 for x in got)


def convolve(x, weight, bias, **options):
    return mk.short_conv(x, weight, bias, **options)


@pytest.mark.parametrize("operator", [mk.selective_scan, convolve])
def test_bfloat16_tensors_keep_their_dtypes(operator):
    tensors = (conv_inputs if operator is convolve else scan_inputs)(20, dtype=torch.bfloat16)
    got = run(operator, tensors, backend="triton")
    want = run(operator, [x.double() for x in tensors], backend="reference")
    own = run(operator, tensors, backend="reference")
    assert [x.dtype for x in got] == [x.dtype for x in own]
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        rounding = relative(y.to(x.dtype), y)
        assert relative(x, y) <= 2 * rounding + TOLERANCE, i


@pytest.mark.parametrize("operator", [mk.selective_scan, convolve])
def test_equal_inputs_give_equal_bits_and_no_output_looks_ahead(operator):
    tensors = (conv_inputs if operator is convolve else scan_inputs)(20)
    first, second = (run(operator, tensors, backend="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    x = tensors[0].requires_grad_()
    y, _ = operator(*tensors[:-1], initial_state=tensors[-1], backend="triton")
    (grad,) = torch.autograd.grad(y[:, :10].sum(), x)
    assert (grad[:, 10:] == 0).all()
    assert (grad[:, :10] != 0).all()


@pytest.mark.parametrize("cut", [0, 1, 2, 9, 20])
@pytest.mark.parametrize("operator", [mk.selective_scan, convolve])
def test_a_state_carried_across_a_split_equals_the_whole(operator, cut):
    tensors = (conv_inputs if operator is convolve else scan_inputs)(20)
    options = {"output_final_state": True, "backend": "triton"}
    *whole, S = tensors
    y, last = operator(*whole, initial_state=S, **options)
    parts = []
    for piece in (slice(0, cut), slice(cut, 20)):
        part = [x[:, piece] if x.dim() == 3 else x for x in whole]
        o, S = operator(*part, initial_state=S, **options)
        parts.append(o)
    assert relative(torch.cat(parts, dim=1), y) < TOLERANCE
    assert relative(S, last) < TOLERANCE


@pytest.mark.parametrize("shape", [(2, 0, 4, 5), (0, 7, 4, 5), (2, 7, 0, 5), (2, 7, 4, 0)])
def test_empty_scans_work(shape):
    B, L, D, N = shape
    shapes = [(B, L, D), (B, L, D), (D, N), (B, L, N), (B, L, N), (B, D, N)]
    assert_exact(mk.selective_scan, [torch.ones(s) for s in shapes])


@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 6, 5), (2, 6, 0)])
def test_empty_convolutions_work(shape):
    B, _, D = shape
    assert_exact(convolve, [torch.ones(s) for s in (shape, (D, 4), (D,), (B, D, 3))])


def test_strided_inputs_give_the_same_values():
    tensors = conv_inputs(20)
    turned = [x.mT.contiguous().mT if x.dim() > 1 else x for x in tensors]
    assert all(
        torch.equal(x, y)
        for x, y in zip(run(convolve, turned, backend="triton"), run(convolve, tensors, backend="triton"), strict=True)
    )


@pytest.mark.parametrize("operator", [mk.selective_scan, convolve])
def test_second_order_gradients_are_refused(operator):
    *tensors, _ = (conv_inputs if operator is convolve else scan_inputs)(4)
    x = tensors[0].requires_grad_()
    y, _ = operator(*tensors, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad.sum().backward()


def test_a_wish_that_cannot_be_met_is_refused():
    with pytest.raises(ValueError, match=r"selective_scan: .* float64: cast them, or take 'ref"):
        mk.selective_scan(*scan_inputs(4, dtype=torch.float64)[:5], backend="triton")
    with pytest.raises(ValueError, match="='triton' takes widths of at most 128, not 130"):
        mk.selective_scan(*scan_inputs(4, N=130)[:5], backend="triton")
    with pytest.raises(ValueError, match=r"short_conv: .* float64: cast them, or take 'fused'"):
        mk.short_conv(*conv_inputs(4, dtype=torch.float64)[:3], backend="triton")


# ---- as an operator of torch: compile, vmap


def test_the_operators_keep_torch_rules():
    operators = torch.ops.mad_kernels
    check = torch.library.opcheck
    tensors = scan_inputs(9)
    tensors[2] = tensors[2][None]
    check(operators.selective_scan_triton_forward.default, (*tensors, True))
    check(operators.selective_scan_triton_forward.default, (*tensors, False))
    y, final, states = operators.selective_scan_triton_forward(*tensors, True)
    for d_final in (final, None):
        arguments = (*tensors, states, y, d_final)
        check(operators.selective_scan_triton_backward.default, arguments)
    for bias in (True, False):
        x, weight, bias, S = conv_inputs(9, bias=bias)
        tensors = (x, weight[None], None if bias is None else bias[None], S)
        check(operators.short_conv_triton_forward.default, (*tensors, True))
        check(operators.short_conv_triton_backward.default, (*tensors, x, S, True))
        check(operators.short_conv_triton_backward.default, (*tensors, x, None, False))


def test_compiled_graphs_are_whole_and_equal():
    # Apart from the shape checker of the tests, which torch.compile cannot look into.
    code = """
        import torch, mad_kernels as mk
        def mamba(x, dt, a, b, c, weight):
            x, _ = mk.short_conv(x, weight, activation="silu", backend="triton")
            return mk.selective_scan(x, dt, a, b, c, backend="triton")[0]
        shapes = [(1, 12, 8), (1, 12, 8), (8, 4), (1, 12, 4), (1, 12, 4), (8, 4)]
        tensors = [torch.rand(s) for s in shapes]
        tensors[2] = -tensors[2]
        compiled = torch.compile(mamba, backend="aot_eager", fullgraph=True)
        results = []
        for operator in (mamba, compiled):
            leaves = [x.clone().requires_grad_() for x in tensors]
            y = operator(*leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def silu_conv(x, weight, bias, S):
    return short_conv_triton(x, weight, bias, "silu", S)


@pytest.mark.parametrize("operator", [selective_scan_triton, silu_conv])
def test_stacked_calls_equal_single_ones_in_value_and_gradient(operator):
    inputs = conv_inputs if operator is silu_conv else scan_inputs
    single = [inputs(9), [x[:, :9] if x.dim() == 3 and x.shape[1] == 10 else x for x in inputs(10)]]

    def loss(*tensors):
        y, final = operator(*tensors)
        return y.square().sum() + final.sum()

    stacked = [torch.stack(pair) for pair in zip(*single, strict=True)]
    wanted = tuple(range(len(stacked)))
    got = torch.func.vmap(torch.func.grad(loss, wanted))(*stacked)
    per_call = [torch.func.grad(loss, wanted)(*tensors) for tensors in single]
    total = torch.func.grad(lambda *t: torch.func.vmap(loss)(*t).sum(), wanted)(*stacked)
    for x, y, z in zip(got, zip(*per_call, strict=True), total, strict=True):
        assert relative(x, torch.stack(y)) < TOLERANCE
        assert relative(z, torch.stack(y)) < TOLERANCE
