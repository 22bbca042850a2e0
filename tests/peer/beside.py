"""A peer beside ours: the same tensors go into both, outputs and gradients are compared in float64.

Peers cast to float32 where ours keep the caller's dtype. Under `in_float64` such a cast is one to
float64, so that a difference is one of meaning and never one of rounding.
"""

import importlib
import warnings
from contextlib import contextmanager

import torch
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from tests.mixer import D, make

TOLERANCE = 1e-12  # relative L2 error of an output or a gradient


def peer(name):
    """Import a module of a peer; the test fails where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla-core says that triton finds no GPU
        return importlib.import_module(name)


def unwrap(monkeypatch, module, *names):
    """Put a module's torch functions back where it has taken a faster package's for them."""
    for name in names:
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)


class _Wide(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(x):
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        kwargs = {name: wide(x) for name, x in (kwargs or {}).items()}
        return func(*map(wide, args), **kwargs)


@contextmanager
def in_float64():
    """Make float64 of every float32 that is asked for by default or by name."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)


def normal(*shape, seed=0):
    """Draw a tensor."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def rows(length=70):
    """Draw an input of a layer, longer than the chunks of 64 that peers take."""
    return normal(2, length, D, seed=1)


def mixer(name, **fields):
    """Build a mixer whose weights are all off their neutral values."""
    built = make(name, fields)
    with torch.no_grad():
        for seed, weight in enumerate(built.parameters(), start=100):
            weight += 0.2 * normal(*weight.shape, seed=seed)
    return built


def assert_same(ours, theirs, tensors, tolerance=TOLERANCE):
    """Compare two functions of named tensors: what they return, and every tensor's gradient."""
    found = _outputs_and_gradients(ours, tensors)
    with in_float64():
        expected = _outputs_and_gradients(theirs, tensors)
    assert list(found) == list(expected)
    errors = {}
    for name, value in expected.items():
        assert value.dtype == found[name].dtype == torch.float64, name
        assert value.norm() > 1e-6, f"nothing depends on {name}"
        errors[name] = ((found[name] - value).norm() / value.norm()).item()
    worst = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not worst, worst


def assert_same_layer(ours, theirs, translate, x, *, fixed=(), tolerance=TOLERANCE, run=None):
    """Compare a mixer with a peer's layer, on the mixer's weights.

    Args:
        ours: The mixer.
        theirs: The peer's layer.
        translate: Gives the peer's weights from the mixer's, differentiably; all of them.
        x: Their input.
        fixed: Weights of the mixer that the peer does without, whose gradient is not compared.
        tolerance: Largest relative error.
        run: Calls the peer's layer, given it as a function of its input.
    """
    weights = {name: w for name, w in ours.named_parameters() if name not in fixed}

    def call_ours(x, **weights):
        return functional_call(ours, weights, (x,))

    def call_theirs(x, **weights):
        def layer(*arguments, **options):
            return functional_call(theirs, translate(weights), arguments, options, strict=True)

        return layer(x) if run is None else run(layer, x)

    assert_same(call_ours, call_theirs, {"x": x, **weights}, tolerance)


def _outputs_and_gradients(function, tensors):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weighed = [(o * normal(*o.shape, seed=i)).sum() for i, o in enumerate(outputs)]
    gradients = torch.autograd.grad(sum(weighed), list(leaves.values()))
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
