"""What the compiled loops promise beyond being right: lazy, optional, the same bits every time."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mad_kernels as mk
from mad_kernels import dispatch

KERNELS = Path(mk.__file__).parents[1]

# Prints every bit of a result and its gradients, and whether the loops came from disk.
SCRIPT = """
import sys, hashlib, torch
import mad_kernels as mk
assert "numba" not in sys.modules, "importing mad_kernels imported numba"
{before}
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
leaves = [torch.randn(2, 70, 2, 24, generator=g).requires_grad_() for _ in range(3)]
leaves += [torch.rand(2, 70, 2, generator=g).requires_grad_()]
o, _ = mk.efla(*leaves, backend="numba")
bits = hashlib.sha256()
for x in (o, *torch.autograd.grad(o.square().sum(), leaves)):
    bits.update(x.detach().numpy().tobytes())
from mad_kernels.delta_rule import loops
print(bits.hexdigest(), sum(loops.forward.stats.cache_hits.values()) > 0)
"""
WITHOUT_CACHE = "from numba.core import caching; caching.CacheImpl._locator_classes = []"


def arguments_of(operator, L):
    g = torch.Generator().manual_seed(0)
    x, scalar = torch.randn(2, L, 2, 20, generator=g), torch.rand(2, L, 2, generator=g)
    flat, rate = x.flatten(2), -torch.rand(40, 4, generator=g)
    return {
        "delta_rule": (x, x / 8, x, scalar, scalar, -scalar),
        "ssd": (x, scalar, rate[:2, 0], x[:, :, :1], x[:, :, :1]),
        "selective_scan": (flat, flat.square(), rate, flat[..., :4], flat[..., 4:8]),
        "unit_key_form": (x, scalar),
    }[operator]


def results_of(operator, arguments):
    leaves = [z.detach().clone().requires_grad_() for z in arguments]
    y, _ = getattr(mk, operator)(*leaves, backend="numba")
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def bits_of_a_fresh_process(before=""):
    command = [sys.executable, "-W", "error", "-c", SCRIPT.format(before=before)]
    environment = {"PYTHONPATH": str(KERNELS), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_loops_from_disk_and_compiled_afresh_give_the_same_bits():
    bits_of_a_fresh_process()  # whoever comes first writes them
    from_disk = bits_of_a_fresh_process()
    # No folder to write to: numba refuses, and every process compiles for itself.
    afresh = bits_of_a_fresh_process(WITHOUT_CACHE)
    assert (from_disk[1], afresh[1]) == ("True", "False")
    assert from_disk[0] == afresh[0]


@pytest.mark.parametrize("operator", ["delta_rule", "ssd", "selective_scan"])
def test_two_runs_give_the_same_bits(operator):
    arguments = arguments_of(operator, 40)
    results = [results_of(operator, arguments) for _ in range(2)]
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("expanded", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("operator", ["delta_rule", "ssd", "selective_scan", "unit_key_form"])
def test_gradients_that_repeat_one_number_are_read_as_such(operator, expanded):
    leaves = [z.detach().clone().requires_grad_() for z in arguments_of(operator, 40)]
    call = getattr(mk, operator)
    if operator == "unit_key_form":
        outputs = call(*leaves, "exact")[:2]
    else:
        outputs = call(*leaves, output_final_state=True, backend="numba")
    dense = [torch.ones_like(y) for y in outputs]
    repeated = [
        torch.ones(()).expand_as(y) if i in expanded else d for i, (y, d) in enumerate(zip(outputs, dense, strict=True))
    ]
    found, want = (torch.autograd.grad(outputs, leaves, slopes, retain_graph=True) for slopes in (repeated, dense))
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_a_loop_refuses_an_array_with_gaps():
    from mad_kernels.lanes import compile_loop, load, total

    first = compile_loop(lambda x: total(load(x, 0)))
    assert first(np.ones(40)) == 32
    with pytest.raises(TypeError, match="must be contiguous"):
        first(np.ones(80)[::2])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("operator", ["delta_rule", "ssd", "selective_scan"])
def test_a_sequence_that_is_not_finite_leaves_the_next_alone(operator, value):
    alone = arguments_of(operator, 70)
    both = [z if z.dim() < 3 else torch.cat([torch.full_like(z[:1], value), z[:1]]) for z in alone]
    alone = [z if z.dim() < 3 else z[:1] for z in alone]
    (y, *grads), (want, *wanted) = (results_of(operator, z) for z in (both, alone))
    assert torch.equal(y[1:], want)
    for x, z in zip(grads, wanted, strict=True):
        assert z.dim() < 3 or torch.equal(x[1:], z)


def test_without_numba_the_automatic_choice_is_torch_and_a_wish_is_an_error(monkeypatch):
    monkeypatch.setattr(dispatch, "_numba_is_installed", lambda: False)
    x, scalar = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1)
    with mk.record_backends() as ran:
        mk.delta_rule(x, x, x, scalar, scalar)
        mk.ssd(x, scalar, -torch.ones(1), x, x)
        mk.selective_scan(x[..., 0], scalar, -torch.ones(1, 2), x[:, :, 0], x[:, :, 0])
    assert ran == {"delta_rule:chunked", "ssd:chunked", "selective_scan:reference"}
    with pytest.raises(ValueError, match=r"delta_rule: backend='numba' needs the package numba"):
        mk.delta_rule(x, x, x, scalar, scalar, backend="numba")


def test_numba_off_the_cpu_is_refused():
    x, scalar = torch.ones(1, 3, 1, 2, device="meta"), torch.ones(1, 3, 1, device="meta")
    with pytest.raises(ValueError, match=r"backend='numba' runs on the CPU, but .* on meta"):
        inspect.unwrap(mk.delta_rule)(x, x, x, scalar, scalar, backend="numba")


def test_nothing_is_kept_for_a_backward_that_will_not_come():
    x, scalar = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1)
    with torch.no_grad():
        o, _ = mk.delta_rule(x.requires_grad_(), x, x, scalar, scalar, backend="numba")
    assert not o.requires_grad


def test_an_input_changed_before_the_backward_is_noticed():
    x, scalar = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1)
    k = x.clone()
    o, _ = mk.delta_rule(x.clone().requires_grad_(), k, x, scalar, scalar, backend="numba")
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_a_change_of_the_row_operations_is_not_answered_from_disk(tmp_path):
    lanes = (KERNELS / "mad_kernels" / "lanes.py").read_text()
    (tmp_path / "loop.py").write_text(
        "from lanes import aligned_zeros, compile_loop, load, mul, store\n"
        "@compile_loop\n"
        "def run(x):\n"
        "    store(x, 0, mul(load(x, 0), load(x, 0)))\n"
    )
    script = (
        "import numpy, loop; x = numpy.full(32, 3.0); loop.run(x);print(x[0], sum(loop.run.stats.cache_hits.values()))"
    )
    seen = []
    for operation in ("fmul", "fmul", "fadd"):
        (tmp_path / "lanes.py").write_text(lanes.replace("builder.fmul(*", f"builder.{operation}(*"))
        command = [sys.executable, "-c", script]
        environment = {"PYTHONPATH": str(tmp_path), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.split())
    assert seen == [["9.0", "0"], ["9.0", "1"], ["6.0", "0"]]
