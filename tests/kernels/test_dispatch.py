"""Choice and record of backends, and the messages about arguments that do not fit."""

import inspect

import pytest
import torch

import mad_kernels as mk
from mad_kernels.checks import check_chunk, check_tensors
from mad_kernels.dispatch import VARIABLE


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def call(**options):
    x = torch.ones(1, 3, 1, 2)
    return mk.deltanet(x, x, x, torch.ones(1, 3, 1), **options)


def convolve(**options):
    return mk.short_conv(torch.ones(1, 3, 2), torch.ones(2, 4), **options)


def test_automatic_argument_and_variable_in_their_order(monkeypatch):
    with mk.record_backends() as ran:
        call()
    assert ran == {"delta_rule:numba"}
    monkeypatch.setenv(VARIABLE, "reference")
    with mk.record_backends() as ran:
        call()
        convolve()
    assert ran == {"delta_rule:reference", "short_conv:reference"}
    with mk.record_backends() as ran:
        call(backend="chunked")
    assert ran == {"delta_rule:chunked"}


def test_the_variable_may_name_single_operators(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference, short_conv:fused")
    with mk.record_backends() as ran:
        call()
        convolve()
    assert ran == {"delta_rule:reference", "short_conv:fused"}


def test_a_backend_that_is_not_offered_is_refused(monkeypatch):
    message = r"delta_rule: backend='cuda' is not offered by delta_rule: choose one of 'chunked'"
    with mk.record_backends() as ran, pytest.raises(ValueError, match=message):
        call(backend="cuda")
    assert ran == set()
    monkeypatch.setenv(VARIABLE, "chunked")
    with pytest.raises(ValueError, match=rf"{VARIABLE}='chunked' is not offered by short_conv"):
        convolve()
    monkeypatch.setenv(VARIABLE, "detla_rule:chunked")
    with pytest.raises(ValueError, match="names no operator"):
        call()


def test_recorders_nest_and_close():
    with mk.record_backends() as outer:
        with mk.record_backends() as inner:
            call()
        convolve()
    call(backend="reference")
    assert inner == {"delta_rule:numba"}
    assert outer == {"delta_rule:numba", "short_conv:numba"}


def test_messages_give_value_rule_and_cure():
    q, v = torch.ones(2, 3, 4, 5), torch.ones(2, 7, 4, 5)
    with pytest.raises(ValueError, match=r"f: v has L=7 but q has L=3: give both the same L"):
        check_tensors("f", {"q": (q, "B L H Dk"), "v": (v, "B L H Dv")})
    with pytest.raises(ValueError, match=r"f: q has shape .*4 axes, but takes 3: lay it out as"):
        check_tensors("f", {"q": (q, "B L D")})
    with pytest.raises(ValueError, match=r"f: q is torch.float16, but only float64, float32"):
        check_tensors("f", {"q": (q.half(), "B L H Dk")})
    with pytest.raises(ValueError, match=r"f: v is torch.float64 but q is torch.float32: float64"):
        check_tensors("f", {"q": (q, "B L H Dk"), "v": (q.double(), "B L H Dk")})
    with pytest.raises(ValueError, match=r"f: v is on meta but q on cpu: move both"):
        check_tensors("f", {"q": (q, "B L H Dk"), "v": (q.to("meta"), "B L H Dk")})
    with pytest.raises(ValueError, match=r"f: chunk=0 must be at least 1 token"):
        check_chunk("f", 0)


def test_operators_check_their_arguments():
    x, scalar = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1)
    # Unwrapped: a runtime shape checker, where one is active, would speak first.
    operators = (mk.delta_rule, mk.efla, mk.ssd, mk.short_conv)
    delta_rule, efla, ssd, conv = map(inspect.unwrap, operators)
    with pytest.raises(ValueError, match=r"delta_rule: erase has L=2 but q has L=3"):
        delta_rule(x, x, x, scalar[:, :2], scalar)
    with pytest.raises(ValueError, match=r"delta_rule: initial_state has Dk=5 but q has Dk=2"):
        delta_rule(x, x, x, scalar, scalar, initial_state=torch.ones(1, 1, 5, 2))
    with pytest.raises(ValueError, match=r"delta_rule: k is torch.float16"):
        delta_rule(x, x.half(), x, scalar, scalar)
    with pytest.raises(ValueError, match=r"efla: beta has L=2 but k has L=3"):
        efla(x, x, x, scalar[:, :2])
    with pytest.raises(ValueError, match=r"ssd: a has H=2 but x has H=1"):
        ssd(x, scalar, -torch.ones(2), x, x)
    with pytest.raises(ValueError, match=r"short_conv: weight has D=3 but x has D=2"):
        conv(torch.ones(1, 3, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"delta_rule: chunk=0"):
        delta_rule(x, x, x, scalar, scalar, chunk=0)


def test_exports_are_what_the_package_says():
    assert len(set(mk.__all__)) == len(mk.__all__)
    assert all(hasattr(mk, name) for name in mk.__all__)
    members = [name for name in mk.__all__ if name.endswith("_step")]
    assert all(name.removesuffix("_step") in mk.__all__ for name in members)
