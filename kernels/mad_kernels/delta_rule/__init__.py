"""The delta rule and its family; see `operator` for the primitive and `members` for the rest."""

from mad_kernels.delta_rule.members import (
    deltanet,
    deltanet_step,
    efla,
    efla_step,
    gated_delta_rule,
    gated_delta_rule_step,
    gated_efla,
    gated_efla_step,
    implicit,
    implicit_step,
    kaczmarz,
    kaczmarz_step,
    rk2,
    rk2_step,
    rk4,
    rk4_step,
)
from mad_kernels.delta_rule.operator import delta_rule, delta_rule_step
from mad_kernels.delta_rule.unit_keys import STEPS, Step, UnitKeyForm, gated_unit_key_form, l2_normalize, unit_key_form

__all__ = [
    "STEPS",
    "Step",
    "UnitKeyForm",
    "delta_rule",
    "delta_rule_step",
    "deltanet",
    "deltanet_step",
    "efla",
    "efla_step",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_efla",
    "gated_efla_step",
    "gated_unit_key_form",
    "implicit",
    "implicit_step",
    "kaczmarz",
    "kaczmarz_step",
    "l2_normalize",
    "rk2",
    "rk2_step",
    "rk4",
    "rk4_step",
    "unit_key_form",
]
