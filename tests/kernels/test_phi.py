"""phi and its slope to 2e-7 in float32, from 1e-30 to 1e3 and at zero."""

import pytest
import torch

import mad_kernels as mk
from mad_kernels.phi import phi_slope, phi_value

TOLERANCE = {torch.float32: 2e-7, torch.float64: 4e-15}


def exact(x):
    """phi and phi' by 60-digit arithmetic."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 120
        d = Decimal(x)
        if d == 0:
            return 1.0, -0.5
        value = (1 - (-d).exp()) / d
        return float(value), float(((-d).exp() - value) / d)


def points(dtype):
    x = torch.cat([torch.zeros(1), torch.logspace(-30, 3, 400), torch.linspace(0.05, 3, 200)])
    around = torch.tensor([9.9e-5, 1e-4, 1.01e-4, 0.999, 1.0, 1.001])
    return torch.cat([x, around]).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_value_and_gradient_are_right_to_rounding(dtype):
    x = points(dtype).requires_grad_()
    y = mk.phi(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    want = torch.tensor([exact(z) for z in x.tolist()], dtype=torch.float64)
    assert ((y.double() - want[:, 0]) / want[:, 0]).abs().max() <= TOLERANCE[dtype]
    assert ((slope.double() - want[:, 1]) / want[:, 1]).abs().max() <= TOLERANCE[dtype]


def test_zero_has_value_one_and_slope_minus_a_half():
    x = torch.zeros(3)
    assert (phi_value(x) == 1).all()
    assert (phi_slope(x) == -0.5).all()


def test_gradcheck():
    x = torch.tensor([0.0, 1e-5, 0.3, 0.5, 2.0, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mk.phi, x)


def test_the_dtype_goes_out():
    x = torch.rand(4).bfloat16().requires_grad_()
    y = mk.phi(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
