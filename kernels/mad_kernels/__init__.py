"""Exact sequence operators for linear attention and state spaces, with gradients held to float64.

Axes are `B L H D`, length before heads; a state is `B H Dk Dv`. Every operator has one signature
over several backends: `reference`, a loop over tokens that defines it, and fast ones that have to
agree with it in outputs and gradients.

    delta_rule   S_t = exp(log_decay) (I - erase k k^T) S + write k v^T, and its family:
                 efla, deltanet, rk2, rk4, implicit, kaczmarz, gated_delta_rule, gated_efla
    dplr         S_t = diag(exp(log_decay)) S + a (b^T S) + k v^T, a decay for every key channel
    ssd          S_t = exp(dt a) S + dt b x^T, Mamba-2's state space
    selective_scan   the same with a decay for every channel and state, Mamba's
    short_conv   causal depthwise convolution over a few tokens
    *_step       the same operators on one token and a carried state, for decoding
    rms_norm, add_rms_norm, head_norm_gate, skip_gate, swiglu, token_shift   what stands between
                 matrix products, in one pass each way
    phi          (1 - exp(-x)) / x with its own gradient
    l2_normalize   rows of unit length

    delta_rule/, dplr/, ssd/, selective_scan/, short_conv/   operator.py (checks, dispatch),
                                     reference.py,
                                     chunked.py (torch), compiled.py over loops.py (numba)
    delta_rule/members.py            the family; unit_keys.py computes its scalars
    dispatch.py                      argument, MAD_KERNELS_BACKEND, automatic; record_backends
    checks.py, layout.py, lanes.py   argument errors; the chunk-major order; rows in registers
"""

from mad_kernels.delta_rule import (
    STEPS,
    Step,
    UnitKeyForm,
    delta_rule,
    delta_rule_step,
    deltanet,
    deltanet_step,
    efla,
    efla_step,
    gated_delta_rule,
    gated_delta_rule_step,
    gated_efla,
    gated_efla_step,
    gated_unit_key_form,
    implicit,
    implicit_step,
    kaczmarz,
    kaczmarz_step,
    l2_normalize,
    rk2,
    rk2_step,
    rk4,
    rk4_step,
    unit_key_form,
)
from mad_kernels.dispatch import record_backends
from mad_kernels.dplr import dplr, dplr_step
from mad_kernels.elementwise import add_rms_norm, head_norm_gate, rms_norm, skip_gate, swiglu, token_shift
from mad_kernels.phi import phi
from mad_kernels.selective_scan import selective_scan, selective_scan_step
from mad_kernels.short_conv import short_conv, short_conv_split, short_conv_step
from mad_kernels.ssd import ssd, ssd_step

__all__ = [
    "STEPS",
    "Step",
    "UnitKeyForm",
    "add_rms_norm",
    "delta_rule",
    "delta_rule_step",
    "deltanet",
    "deltanet_step",
    "dplr",
    "dplr_step",
    "efla",
    "efla_step",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_efla",
    "gated_efla_step",
    "gated_unit_key_form",
    "head_norm_gate",
    "implicit",
    "implicit_step",
    "kaczmarz",
    "kaczmarz_step",
    "l2_normalize",
    "phi",
    "record_backends",
    "rk2",
    "rk2_step",
    "rk4",
    "rk4_step",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "short_conv",
    "short_conv_split",
    "short_conv_step",
    "skip_gate",
    "ssd",
    "ssd_step",
    "swiglu",
    "token_shift",
    "unit_key_form",
]
