"""How many directions of a state are in use, and how much keys stand in each other's way.

Legend: N rows of a head's state (key width), P columns (value width), T sampled tokens.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mad_efla.mixers._dynamics import Dynamics
from mad_efla.spectrum.transitions import apply, each, rescaled, transitions, whole

SAMPLES = 16  # tokens whose state, or whose reach, is looked at


# ------------------------------------------------------------------ states and keys


class StateSpectrum(NamedTuple):
    """Singular values of the state after some tokens; see `state_spectrum`."""

    times: Int[Tensor, "T"]
    log_singular_values: Float[Tensor, "T B H R"]
    effective_rank: Float[Tensor, "T B H"]
    stable_rank: Float[Tensor, "T B H"]
    capacity_used: Float[Tensor, "T B H"]


def states(dynamics: Dynamics) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the recurrence in float64; after each token yield S [B H N P] and log c [B H].

    c S is the state.
    """
    B, L, H, N = dynamics.k.shape
    tokens = range(L)
    S = dynamics.v.new_zeros(B, H, N, dynamics.v.shape[-1], dtype=torch.float64)
    log_size = S.new_zeros(B, H)
    keys, values = each(dynamics.k, tokens), each(dynamics.v, tokens)
    steps = zip(transitions(dynamics, tokens), keys, values, strict=True)
    for i, (A, k, v) in enumerate(steps, 1):
        k = k * (-log_size).exp()[..., None]
        S = torch.addcmul(apply(A, S), k[..., None], v[..., None, :])
        S, log_size = rescaled(S, log_size)
        if i % dynamics.substeps == 0:
            yield S, log_size


def state_spectrum(dynamics: Dynamics, times: Sequence[int] | None = None) -> StateSpectrum:
    """Compute singular values sigma of the state, and how many of its directions are in use.

        effective rank  exp(-sum_i p_i log p_i),  p = sigma / sum(sigma)
        stable rank     sum(sigma^2) / max(sigma)^2
        capacity used   effective rank / R

    R = min(N, P). A zero state has rank 0. Where P = 1 (Mamba), the states of all heads are the
    columns of one matrix, and H is 1 in the result.

    Args:
        dynamics: Of one layer.
        times: Tokens after which the state is looked at; None takes 16, spread evenly to the last.

    Source: Roy and Vetterli 2007, The effective rank, EUSIPCO; Rudelson and Vershynin 2007,
    arXiv math/0503442, section 1.
    """
    times = sampled(dynamics.tokens, times)
    looked = []
    for t, (S, log_size) in enumerate(states(dynamics)):
        if t in times:
            if S.shape[-1] == 1:
                largest = log_size.amax(1, keepdim=True)
                S = S * (log_size - largest).exp()[..., None, None]
                S, log_size = rearrange(S, "B H N 1 -> B 1 N H"), largest
            looked.append(torch.linalg.svdvals(S).log() + log_size[..., None])
    logs = torch.stack(looked)
    relative = (logs - logs[..., :1]).exp().nan_to_num(0)  # NaN for a zero state
    effective, stable = effective_rank(relative), relative.square().sum(-1)
    return StateSpectrum(torch.tensor(times), logs, effective, stable, effective / logs.shape[-1])


class KeyOverlap(NamedTuple):
    """How much the keys of a sequence stand in each other's way; see `key_overlap`."""

    spectrum: Float[Tensor, "B H N"]
    condition: Float[Tensor, "B H"]
    square_cosine: Float[Tensor, "B H"]
    effective_rank: Float[Tensor, "B H"]


def key_overlap(dynamics: Dynamics) -> KeyOverlap:
    """Compute the spectrum of the Gram matrix of a sequence's unit keys, and what follows from it.

    The matrix is K K^T / L, its rows k_t / |k_t|; its eigenvalues other than zero are those of the
    small K^T K / L, and their sum is 1. Orthogonal keys have N equal ones, a key repeated a
    single one.

        condition      largest over least of the min(L, N) that can differ from zero, at most 1e15
        square cosine  mean over pairs s != t of (k_s . k_t)^2, 1/N for keys of random direction
        effective rank as in `state_spectrum`: how many directions the keys spread over

    Zero keys have no direction and are left out of all but L. A single key has square cosine 0.

    Source: Benedetto and Fickus 2003, Adv. Comput. Math. 18, 357-385 (frame potential: the sum of
    square cosines).
    """
    k = dynamics.k.double()
    L, N = k.shape[1], k.shape[-1]
    k = torch.nn.functional.normalize(k, dim=-1, eps=1e-300)
    gram = torch.einsum("blhn,blhm->bhnm", k, k)
    present = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    pairs = gram.square().sum((-2, -1)) - present
    values = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0) / L
    least = values[..., min(L, N) - 1].clamp_min(values[..., 0] * 1e-15)
    return KeyOverlap(
        spectrum=values,
        condition=torch.where(least > 0, values[..., 0] / least, 1),
        square_cosine=pairs.clamp_min(0) / (present * (present - 1)).clamp_min(1),
        effective_rank=effective_rank(values),
    )


def effective_rank(sizes: Float[Tensor, "*axes n"]) -> Float[Tensor, "*axes"]:
    """Return exp(entropy) of sizes as shares; 0 where all are 0."""
    total = sizes.sum(-1)
    entropy = torch.special.entr(sizes / total[..., None]).sum(-1)
    return torch.where(total > 0, entropy.exp(), 0)


def sampled(L: int, times: Sequence[int] | None = None) -> list[int]:
    """Return tokens to look at, rising; by default 16, spread evenly to the last one.

    Raises:
        ValueError: If one is outside the sequence, or one is given twice or out of order.
    """
    if times is None:
        return whole(np.linspace(0, L - 1, min(L, SAMPLES) + 1)[1:])
    if not times or list(times) != sorted(set(times)) or times[0] < 0 or times[-1] >= L:
        raise ValueError(f"times={list(times)} must rise within [0, {L}), the sequence's length")
    return list(times)
