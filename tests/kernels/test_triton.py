"""The GPU kernels in triton's interpreter, on a CPU: values and gradients against float64.

Whether a kernel is compiled or interpreted is settled when triton is first imported, so the
variable is set here, at import, for the whole process; on CPU tensors it changes nothing else. Run
alone on a machine with a GPU, `make gpu` repeats these comparisons on the device.
"""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import normalize

import mad_kernels as mk

if find_spec("triton") is None:
    pytest.skip("needs the package triton: pip install '.[triton]'", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from mad_kernels import blocks
from mad_kernels.delta_rule.triton import delta_rule_triton
from mad_kernels.ssd.as_delta_rule import ssd_triton

# triton 3.6 reads sizes in a way that numpy announces it will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")
TOLERANCE = 2e-6
LENGTHS = (1, 15, 16, 17, 100)
NAMES = ("o", "final_state", "q", "k", "v", "erase", "write", "log_decay", "initial_state")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert blocks.interpreted(), "triton was imported before this file"


def relative(x, y):
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm().clamp_min(1e-300)).item() if y.numel() else 0.0


def inputs(L, *, B=1, H=2, Dk=20, Dv=9, decay=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(L)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = normal(B, L, H, Dk), normalize(normal(B, L, H, Dk), dim=-1), normal(B, L, H, Dv)
    erase, write, log_decay = torch.rand(3, B, L, H, generator=g, dtype=torch.float64)
    log_decay = -3 * log_decay.square() if decay else None
    tensors = [q, k, v, erase, write, log_decay, normal(B, H, Dk, Dv)]
    return [None if x is None else x.to(dtype) for x in tensors]


def ssd_inputs(L, *, B=1, H=4, groups=2, P=9, N=20):
    g = torch.Generator().manual_seed(L)
    shapes = [(B, L, H, P), (B, L, groups, N), (B, L, groups, N), (B, H, N, P)]
    x, b, c, S = (torch.randn(*shape, generator=g) for shape in shapes)
    return [x, torch.rand(B, L, H, generator=g) * 2, -torch.rand(H, generator=g), b, c, S]


def run(operator, tensors, **options):
    """Outputs and the gradient of every tensor, the last one being the initial state."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    *arguments, S = leaves
    o, final = operator(*arguments, initial_state=S, output_final_state=True, **options)
    g = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (o, final)]
    loss = sum((x.double() * w).sum() for x, w in zip((o, final), weights, strict=True))
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [o.detach(), final.detach(), *grads]


def assert_exact(operator, tensors, tolerance=TOLERANCE):
    got = run(operator, tensors, backend="triton")
    wide = [None if x is None else x.double() for x in tensors]
    want = run(operator, wide, backend="reference")
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(x).all(), i
        assert relative(x, y) <= tolerance, (i, relative(x, y))
    return got


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("L", LENGTHS)
def test_delta_rule_equals_the_reference_in_value_and_gradient(L, decay):
    with mk.record_backends() as ran:
        got = assert_exact(mk.delta_rule, inputs(L, decay=decay))
    assert "delta_rule:triton" in ran
    assert all(x.dtype == torch.float32 for x in got)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("L", LENGTHS)
def test_ssd_equals_the_reference_in_value_and_gradient(L, groups):
    assert_exact(mk.ssd, ssd_inputs(L, groups=groups))


@pytest.mark.parametrize(("Dk", "Dv"), [(16, 64), (64, 16), (128, 100)])
def test_widths_and_blocks_of_columns_do_not_matter(Dk, Dv):
    assert_exact(mk.delta_rule, inputs(20, H=1, Dk=Dk, Dv=Dv))


@pytest.mark.parametrize("kind", ["identical", "vocabulary of 4", "70 % blanks"])
def test_repeated_keys_stay_exact(kind):
    tensors = inputs(100, decay=False)
    g = torch.Generator().manual_seed(3)
    which = torch.randint(1, 4, (1, 100, 2), generator=g)
    if kind != "vocabulary of 4":
        share = 1.0 if kind == "identical" else 0.7
        which[torch.rand(1, 100, 2, generator=g) < share] = 0
    tensors[1] = normalize(torch.randn(4, 20, generator=g), dim=-1)[which]
    tensors[3] = torch.full_like(tensors[3], 0.999)
    assert_exact(mk.delta_rule, tensors, 2 * TOLERANCE)


def test_strong_decay_stays_finite_and_exact():
    tensors = inputs(40)
    tensors[5] = tensors[5] * 300
    tensors[5][:, ::7] = -torch.inf
    assert_exact(mk.delta_rule, tensors)


def test_bfloat16_tensors_keep_their_dtypes():
    tensors = inputs(20, dtype=torch.bfloat16)
    got = run(mk.delta_rule, tensors, backend="triton")
    wide = [x.double() for x in tensors]
    want = run(mk.delta_rule, wide, backend="reference")
    assert [x.dtype for x in got] == [torch.bfloat16, torch.float32, *[torch.bfloat16] * 7]
    for name, x, y in zip(NAMES, got, want, strict=True):
        rounding = relative(y.to(x.dtype), y)
        assert relative(x, y) <= 2 * rounding + TOLERANCE, name


def test_equal_inputs_give_equal_bits():
    first, second = (run(mk.delta_rule, inputs(40), backend="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_state_carried_across_a_split_equals_the_whole():
    *tensors, S = inputs(40)
    whole, last = mk.delta_rule(*tensors, initial_state=S, output_final_state=True, backend="triton")
    parts = []
    for piece in (slice(0, 17), slice(17, 40)):
        cut = [x[:, piece] for x in tensors]
        o, S = mk.delta_rule(*cut, initial_state=S, output_final_state=True, backend="triton")
        parts.append(o)
    assert relative(torch.cat(parts, dim=1), whole) < TOLERANCE
    assert relative(S, last) < TOLERANCE


def test_no_output_depends_on_a_later_token():
    *tensors, S = inputs(40)
    leaves = [x.requires_grad_() for x in tensors]
    o, _ = mk.delta_rule(*leaves, initial_state=S, backend="triton")
    for grad in torch.autograd.grad(o[:, :20].sum(), leaves):
        assert (grad[:, 20:] == 0).all()
        assert (grad[:, :20] != 0).any()


@pytest.mark.parametrize("shape", [(2, 0, 3, 4, 5), (0, 7, 3, 4, 5), (2, 7, 0, 4, 5), (2, 7, 3, 0, 5), (2, 7, 3, 4, 0)])
def test_empty_inputs_work(shape):
    B, L, H, Dk, Dv = shape
    tensors = [torch.ones(s) for s in ((B, L, H, Dk), (B, L, H, Dk), (B, L, H, Dv))]
    tensors += [torch.ones(B, L, H) for _ in range(3)] + [torch.ones(B, H, Dk, Dv)]
    assert_exact(mk.delta_rule, tensors)


def test_second_order_gradients_are_refused():
    *tensors, _ = inputs(4)
    q = tensors[0].requires_grad_()
    o, _ = mk.delta_rule(*tensors, backend="triton")
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad.sum().backward()


# ---- as an operator of torch: compile, vmap


@pytest.mark.parametrize("kind", ["decay", "whole", "ssd"])
def test_the_operators_keep_torch_rules(kind):
    tensors = inputs(17, decay=kind != "whole")
    if kind == "ssd":
        tensors[3] = None
    operators = torch.ops.mad_kernels
    torch.library.opcheck(operators.delta_rule_triton_forward.default, (*tensors, True))
    torch.library.opcheck(operators.delta_rule_triton_forward.default, (*tensors, False))
    o, final, *kept = operators.delta_rule_triton_forward(*tensors, True)
    torch.library.opcheck(operators.delta_rule_triton_backward.default, (*tensors, *kept, o, final))
    torch.library.opcheck(operators.delta_rule_triton_backward.default, (*tensors, *kept, o, None))


def test_compiled_graphs_are_whole_and_equal():
    # Apart from the shape checker of the tests, which torch.compile cannot look into.
    code = """
        import torch, mad_kernels as mk
        tensors = [torch.rand(1, 20, 2, 16) / 4 for _ in range(3)] + [torch.rand(1, 20, 2)] * 2
        compiled = torch.compile(mk.delta_rule, backend="aot_eager", fullgraph=True)
        results = []
        for operator in (mk.delta_rule, compiled):
            leaves = [x.clone().requires_grad_() for x in tensors]
            o, _ = operator(*leaves, backend="triton")
            results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("decay", [False, True])
def test_stacked_calls_equal_single_ones_in_value_and_gradient(decay):
    stacks = [inputs(17, B=2, decay=decay), inputs(18, B=2, decay=decay)]
    stacks[1] = [x if x is None or (x.dim() == 4 and x.shape[1] == 2) else x[:, :17] for x in stacks[1]]
    given = [i for i, x in enumerate(stacks[0]) if x is not None]

    def loss(*tensors):
        arguments = [None] * 7
        for i, x in zip(given, tensors, strict=True):
            arguments[i] = x
        o, final = delta_rule_triton(*arguments)
        return o.square().sum() + final.sum()

    single = [[stack[i] for i in given] for stack in stacks]
    stacked = [torch.stack(pair) for pair in zip(*single, strict=True)]
    wanted = tuple(range(len(given)))
    got = torch.func.vmap(torch.func.grad(loss, wanted))(*stacked)
    per_call = [torch.func.grad(loss, wanted)(*tensors) for tensors in single]
    total = torch.func.grad(lambda *t: torch.func.vmap(loss)(*t).sum(), wanted)(*stacked)
    for x, y, z in zip(got, zip(*per_call, strict=True), total, strict=True):
        assert relative(x, torch.stack(y)) < TOLERANCE
        assert relative(z, torch.stack(y)) < TOLERANCE


def test_a_shared_tensor_may_stay_unstacked():
    x, dt, a, b, c, S = ssd_inputs(10)
    stacked = torch.stack([x, 2 * x])
    y, _ = torch.func.vmap(ssd_triton, in_dims=(0, *[None] * 5))(stacked, dt, a, b, c, 0 * S)
    assert relative(y[1], 2 * y[0]) < TOLERANCE


# ---- dispatch


def test_a_cpu_tensor_is_never_sent_there_on_its_own():
    with mk.record_backends() as ran:
        mk.delta_rule(*inputs(4)[:5])
    assert not any("triton" in name for name in ran)


def test_a_wish_that_cannot_be_met_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="='triton' sums in float32, but the tensors are float64"):
        mk.delta_rule(*inputs(4, dtype=torch.float64)[:5], backend="triton")
    with pytest.raises(ValueError, match="='triton' takes widths of at most 128, not 130"):
        mk.delta_rule(*inputs(4, Dk=130)[:5], backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="='triton' runs on a CUDA device, but the tensors are on"):
        mk.delta_rule(*inputs(4)[:5], backend="triton")
    monkeypatch.setattr(sys.modules["mad_kernels.dispatch"], "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="='triton' needs the package triton"):
        mk.ssd(*ssd_inputs(4)[:5], backend="triton")
