"""The operators under torch.library's own checks, torch.compile and torch.func: equal to eager."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.func import grad, vmap

import mad_kernels as mk

FAST = ("chunked", "numba")
B, L, H, DK, DV = 2, 9, 2, 4, 3
FAMILY = ("delta_rule", "gated_delta_rule", "ssd", "efla", "gated_efla", "kaczmarz")
# Operators and the backends that are registered; dplr's chunk form is plain torch.
PAIRS = [(operator, backend) for operator in FAMILY for backend in FAST]
PAIRS += [("dplr", "numba"), ("selective_scan", "numba")]


def inputs(operator, *, stack=(), dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*stack, *shape, generator=g, dtype=torch.float64).to(dtype)

    def uniform(*shape):
        return torch.rand(*stack, *shape, generator=g, dtype=torch.float64).to(dtype)

    scalar = (B, L, H)
    if operator == "ssd":
        return [
            normal(*scalar, DV),
            uniform(*scalar),
            -uniform(H),
            normal(B, L, 1, DK),
            normal(B, L, 1, DK),
            normal(B, H, DK, DV),
        ]
    if operator == "selective_scan":
        widths = ((B, L, DV), (DV, DK), (B, L, DK), (B, L, DK), (B, DV, DK))
        x, a, b, c, S = (normal(*width) for width in widths)
        return [x, uniform(B, L, DV), -a.abs(), b, c, S]
    if operator == "dplr":
        q, k, decay, a, b = (normal(*scalar, DK) / 2 for _ in range(5))
        return [q, k, normal(*scalar, DV), -decay.abs(), a, b, normal(B, H, DK, DV)]
    tensors = [normal(*scalar, DK), normal(*scalar, DK) / 2, normal(*scalar, DV), uniform(*scalar)]
    if operator == "gated_delta_rule":
        tensors.append(-uniform(*scalar))
    elif operator in ("delta_rule", "gated_efla"):
        tensors.append(uniform(*scalar))
    return [*tensors, normal(B, H, DK, DV)]


def outputs_of(operator, backend):
    def call(*tensors):
        *arguments, S = tensors
        options = {"initial_state": S, "output_final_state": True, "backend": backend}
        if operator in FAMILY:
            options["chunk"] = 4
        return getattr(mk, operator)(*arguments, **options)

    return call


def loss_of(operator, backend):
    def loss(*tensors):
        o, final = outputs_of(operator, backend)(*tensors)
        return o.square().sum() + final.sum()

    return loss


# ---- torch.library


@pytest.mark.parametrize("kind", ["whole", "decay", "no erase"])
@pytest.mark.parametrize("backend", FAST)
def test_the_passes_keep_the_rules_of_torch(backend, kind):
    q, k, v, erase, write, S = inputs("delta_rule")
    decay = None if kind == "whole" else -write
    arguments = (q, k, v, None if kind == "no erase" else erase, write, decay)
    forward = getattr(torch.ops.mad_kernels, f"delta_rule_{backend}_forward")
    backward = getattr(torch.ops.mad_kernels, f"delta_rule_{backend}_backward")
    for save in (True, False):
        torch.library.opcheck(forward.default, (*arguments, S, 4, save))
    o, final, *kept = forward(*arguments, S, 4, True)
    torch.library.opcheck(backward.default, (*arguments, S, *kept, o, final, 4))
    torch.library.opcheck(backward.default, (*arguments, S, *kept, o, None, 4))


@pytest.mark.parametrize("operator", ["dplr", "dplr without a and b", "selective_scan"])
def test_the_passes_of_other_loops_keep_the_rules_of_torch(operator):
    name, *without = operator.split(" ", 1)
    arguments = inputs(name)
    if without:
        arguments[4:6] = None, None
    if name == "selective_scan":
        arguments[2] = arguments[2][None]
    forward = getattr(torch.ops.mad_kernels, f"{name}_numba_forward")
    backward = getattr(torch.ops.mad_kernels, f"{name}_numba_backward")
    for save in (True, False):
        torch.library.opcheck(forward.default, (*arguments, 4, save))
    y, final, *kept = forward(*arguments, 4, True)
    torch.library.opcheck(backward.default, (*arguments, *kept, y, final, 4))
    torch.library.opcheck(backward.default, (*arguments, *kept, None, final, 4))


def test_unit_keys_keep_the_rules_of_torch():
    k = inputs("efla")[1]
    operators = torch.ops.mad_kernels
    torch.library.opcheck(operators.unit_keys_forward.default, (k, 1e-3))
    key, norm = operators.unit_keys_forward(k, 1e-3)
    torch.library.opcheck(operators.unit_keys_backward.default, (key, norm, k, norm, 1e-3))


# ---- torch.func


@pytest.mark.parametrize(("operator", "backend"), PAIRS)
def test_stacked_calls_equal_a_loop_in_value_and_gradient(backend, operator):
    stacked = inputs(operator, stack=(3,))
    wanted = tuple(range(len(stacked)))
    call, loss = outputs_of(operator, backend), loss_of(operator, backend)
    for got, want in zip(vmap(call)(*stacked), zip(*map(call, *stacked), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-12)
    per_call = list(zip(*(grad(loss, wanted)(*x) for x in zip(*stacked, strict=True)), strict=True))
    inside = vmap(grad(loss, wanted))(*stacked)
    outside = grad(lambda *x: vmap(loss)(*x).sum(), wanted)(*stacked)
    leaves = [x.clone().requires_grad_() for x in stacked]
    plain = torch.autograd.grad(vmap(loss)(*leaves).sum(), leaves)
    for want, *got in zip(per_call, inside, outside, plain, strict=True):
        for x in got:
            torch.testing.assert_close(x, torch.stack(want), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("operator", "backend"), PAIRS)
def test_shared_tensors_and_other_axes_may_be_mapped(backend, operator):
    tensors = inputs(operator)
    call = outputs_of(operator, backend)
    values = torch.stack([tensors[2], 2 * tensors[2]], dim=1)  # of selective_scan decay rates
    in_dims = tuple(1 if i == 2 else None for i in range(len(tensors)))
    o, final = vmap(call, in_dims=in_dims)(*tensors[:2], values, *tensors[3:])
    for i in range(2):
        want = call(*tensors[:2], values[:, i], *tensors[3:])
        torch.testing.assert_close((o[i], final[i]), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_many_pulls_through_one_call_equal_single_ones(backend):
    leaves = [x.requires_grad_() for x in inputs("efla")]
    o, _ = outputs_of("efla", backend)(*leaves)
    pulls = torch.randn(3, *o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    options = {"retain_graph": True}
    got = torch.autograd.grad(o, leaves, pulls, is_grads_batched=True, **options)
    single = [torch.autograd.grad(o, leaves, pull, **options) for pull in pulls]
    for x, want in zip(got, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(want), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("operator", "backend"), PAIRS)
def test_second_order_gradients_are_refused_with_a_cure(backend, operator):
    loss = loss_of(operator, backend)
    with pytest.raises(RuntimeError, match="first-order gradients only here:"):
        grad(lambda *x: grad(loss)(*x).square().sum())(*inputs(operator))


# ---- torch.compile


def test_compiled_graphs_are_whole_and_equal_with_their_gradients():
    # A process of its own: torch.compile cannot look into the shape checker of the tests.
    code = """
        import torch
        from tests.kernels.test_custom_ops import PAIRS, inputs, outputs_of
        for operator, backend in PAIRS:
            if operator in ("delta_rule", "efla", "kaczmarz"):
                continue  # parts of those that have a gate
            call = outputs_of(operator, backend)
            torch.compiler.reset()
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
            results = []
            for run in (call, compiled):
                leaves = [x.requires_grad_() for x in inputs(operator)]
                o, final = run(*leaves)
                loss = o.square().sum() + final.sum()
                results.append([o, final, *torch.autograd.grad(loss, leaves)])
            for x, y in zip(*results, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
