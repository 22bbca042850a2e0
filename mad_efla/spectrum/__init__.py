"""What a trained mixer does with its memory: decay, products of transitions, states, reach, gain.

Every function but `diagnose` and `training_scalars` is pure and reads the `Dynamics` of one layer
on one batch,

    S_t = A_t S_{t-1} + k_t v_t^T,  A_t = diag(exp(log_decay_t)) R(angle_t) + a_t b_t^T
    o_t = S_t^T q_t

whatever mixer it comes from. Where a token takes several steps, lags, times and distances count
tokens, decay and keys are those of each step. Memory, in float64 numbers per layer: a few times
B L H N, and B H N (N + P).

    transitions.py   single tokens, products of transitions, horizons, Lyapunov exponents
    states.py        singular values of states, overlap of keys
    reach.py         how far back outputs look, gain of a perturbation, how much of the past matters
    diagnose.py      a whole model
    causes.py        why a trained model fails on corrupted inputs
"""

from mad_efla.spectrum.diagnose import Diagnosis, Gain, LayerDiagnosis, diagnose, finite, training_scalars
from mad_efla.spectrum.reach import Reach, effective_remembrance, gain_distance, perturbation_gain, reach
from mad_efla.spectrum.states import KeyOverlap, StateSpectrum, key_overlap, state_spectrum, states
from mad_efla.spectrum.transitions import (
    EULER_LIMIT,
    SATURATED,
    Horizon,
    PerToken,
    Products,
    horizon,
    lyapunov,
    per_token,
    products,
    step_eigenvalue,
    step_error,
)

__all__ = [
    "EULER_LIMIT",
    "SATURATED",
    "Diagnosis",
    "Gain",
    "Horizon",
    "KeyOverlap",
    "LayerDiagnosis",
    "PerToken",
    "Products",
    "Reach",
    "StateSpectrum",
    "diagnose",
    "effective_remembrance",
    "finite",
    "gain_distance",
    "horizon",
    "key_overlap",
    "lyapunov",
    "per_token",
    "perturbation_gain",
    "products",
    "reach",
    "state_spectrum",
    "states",
    "step_eigenvalue",
    "step_error",
    "training_scalars",
]
