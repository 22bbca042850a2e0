"""What is drawn of a diagnosis: curves of medians and quartiles, and shares, from `spectrum`'s tensors."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mad_efla import spectrum
from mad_efla.spectrum import KeyOverlap, PerToken, Products, Reach, StateSpectrum

ERRORS = (1e-6, 1e2)
"""The range of errors that is drawn."""


class Quartiles(NamedTuple):
    """A quantity over x: median and quartiles over heads, sequences and starts.

    A share is a single number; its quartiles are itself.
    """

    x: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


def eigenvalue_shares(tokens: PerToken, centres: np.ndarray) -> np.ndarray:
    """Return which share of each head's tokens has its eigenvalue near each centre, `[H, bins]`.

    Centres are evenly spaced; what lies beyond the outermost counts there.
    """
    values = tokens.eigenvalue.movedim(-1, 0).flatten(1).cpu().numpy()
    nearest = np.rint((values - centres[0]) / (centres[1] - centres[0]))
    bins = nearest.clip(0, len(centres) - 1).astype(int)
    return np.stack([np.bincount(head, minlength=len(centres)) / len(head) for head in bins])


def x_shares(tokens: PerToken) -> Quartiles:
    """Return the share of tokens, and channels, whose x is at most the curve's.

    What lies outside of 1e-4 to 1e4 is moved to these ends.
    """
    assert tokens.x is not None
    shares = np.linspace(0, 1, 201)
    x = np.quantile(tokens.x.cpu().numpy(), shares, method="inverted_cdf")
    return Quartiles(x.clip(1e-4, 1e4), shares, shares, shares)


def error_shares(tokens: PerToken, step: str) -> Quartiles:
    """Return the share of tokens on which a step's error is at least the curve's x.

    What lies outside of 1e-6 to 100 is moved to these ends.
    """
    assert tokens.x is not None
    errors = spectrum.step_error(tokens.x, step).flatten().cpu().numpy()
    shares = np.linspace(0, 1, 201)
    x = np.quantile(errors, 1 - shares, method="inverted_cdf").clip(*ERRORS)
    return Quartiles(x, shares, shares, shares)


def products_left(products: Products) -> Quartiles:
    """Return the median singular value of products of transitions over the lag."""
    logs = products.log_singular_values.median(-1).values
    return _quartiles(products.lags, logs.movedim(1, 0), exp=True)


def remembering(products: Products) -> Quartiles:
    """Return the share of heads, sequences and starts that still remember, over the lag.

    One remembers up to its horizon, where its median singular value falls under 1/e. The last
    share is that of the horizons beyond the longest lag.
    """
    horizon = spectrum.horizon(products).median
    lags = np.geomspace(1, int(products.lags[-1]), 201)
    ends = np.sort(horizon.flatten().cpu().numpy())
    share = 1 - np.searchsorted(ends, lags, side="right") / len(ends)
    return Quartiles(lags, share, share, share)


def rank_over_time(state: StateSpectrum) -> Quartiles:
    """Return the state's effective rank over the number of tokens read."""
    return _quartiles(state.times + 1, state.effective_rank)


def state_sizes(state: StateSpectrum) -> Quartiles:
    """Return the singular values of the last state, as shares of the largest, over their index."""
    logs = state.log_singular_values[-1]
    relative = (logs - logs[..., :1]).nan_to_num(-math.inf)  # NaN for a zero state
    return _quartiles(_index(logs), relative.movedim(-1, 0), exp=True)


def key_spread(keys: KeyOverlap) -> Quartiles:
    """Return N times the eigenvalues of the keys' Gram matrix: all 1 for orthogonal keys."""
    values = keys.spectrum * keys.spectrum.shape[-1]
    return _quartiles(_index(values), values.movedim(-1, 0))


def reach_distance(reach: Reach) -> Quartiles:
    """Return the mean distance looked back, in tokens, over the number of tokens read."""
    return _quartiles(reach.times + 1, reach.distance)


def reach_width(reach: Reach) -> Quartiles:
    """Return exp(entropy), the number of tokens looked at, over the number of tokens read."""
    return _quartiles(reach.times + 1, reach.entropy, exp=True)


def gain_size(gain: Tensor) -> Quartiles:
    """Return the size of a gain `[B, L]` over all tokens: a single point."""
    return _quartiles(torch.ones(1), torch.linalg.vector_norm(gain, dim=-1)[None])


def _index(values: Tensor) -> Tensor:
    return torch.arange(1, values.shape[-1] + 1)


def _quartiles(x: Tensor, y: Tensor, *, exp: bool = False) -> Quartiles:
    """Take quartiles over all axes of y but the first; each is one of y's values, inf too."""
    flat = y.flatten(1).cpu().numpy()
    low, middle, high = np.quantile(flat, (0.25, 0.5, 0.75), axis=1, method="inverted_cdf")
    if exp:
        low, middle, high = (np.exp(q.clip(max=200)) for q in (low, middle, high))
    return Quartiles(x.cpu().numpy(), low, middle, high)
