"""The matrix products of a step are taken down whole, and made again alone."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mad_efla.bench.products import Products


class Seen(TorchDispatchMode):
    """Lists every operator that runs, with the shapes of its operands."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.overloadpacket, [tuple(x.shape) for x in args], args[-1].dtype))
        return func(*args, **(kwargs or {}))


def step(linear, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    (y.float().square().sum() + torch.bmm(x[:, None], x[..., None]).sum()).backward()


def test_products_of_both_directions_are_made_again_and_nothing_else():
    linear, x = torch.nn.Linear(3, 4), torch.randn(5, 3, requires_grad=True)
    with Products() as products:
        step(linear, x)
    # y, its weight's and input's gradients; and the product of x with itself, which has two.
    assert products.flops == 3 * 2 * 5 * 3 * 4 + 3 * 2 * 5 * 3
    with Seen() as seen:
        products()
    aten = torch.ops.aten
    kinds = [aten.addmm, aten.bmm, aten.bmm, aten.bmm, aten.mm, aten.mm]
    assert sorted(call[0]._qualified_op_name for call in seen.calls) == sorted(
        kind._qualified_op_name for kind in kinds
    )
    assert (aten.addmm, [(4,), (5, 3), (3, 4)], torch.bfloat16) in seen.calls


def test_the_step_is_what_it_would_be():
    grads = []
    for watched in (False, True):
        torch.manual_seed(0)
        linear, x = torch.nn.Linear(3, 4), torch.randn(5, 3, requires_grad=True)
        if watched:
            with Products():
                step(linear, x)
        else:
            step(linear, x)
        grads.append((x.grad, linear.weight.grad))
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))
