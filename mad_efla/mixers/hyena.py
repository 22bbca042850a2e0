"""Hyena: gates around a long convolution whose filter is a function of the distance.

    p, g, v = conv(x W_in)              u = g * v
    y_t = p_t * (skip * u_t + sum_{s <= t} h(t - s) * u_s)          out = W_out y
    h(n) = mlp(features(n / scale)) * (exp(-rate n / scale) + shift)

Legend: all products are per channel; mlp has sine activations of learned frequency, features are
the distance and the cosines and sines of `bands` waves; rates are spread over the channels. The
paper's x^2, x^1, v are p, g, v.
Source: Poli et al. 2023, arXiv 2302.10866, definition 3.1 and section 3.3, order 2: of the order's
two filters the first is the short convolution, as in the authors' code.
Departures: distances are in units of `scale` tokens, not of the sequence's length, so that an
output does not depend on how many tokens follow; linear maps have no bias. To decode, every past u
is kept: the state grows with the sequence.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import Mixer, MixerConfig, ShortConv, State

# A channel's filter falls to 1 % after 0.3 to 1.5 scales, and never below `_SHIFT` of its size.
_FALL, _FASTEST, _SLOWEST, _SHIFT = math.log(100), 0.3, 1.5, 0.05


class Hyena(Mixer):
    """The Hyena operator of order 2."""

    class Config(MixerConfig):
        """Fields of Hyena.

        Attributes:
            conv: Taps of the causal depthwise convolution on the three projections; 0 for none.
            scale: Tokens in a unit of distance; the usual sequence length.
            bands: Waves among the features of a distance, of 1 to `bands` periods per scale.
            filter_width: Width of the filter's MLP.
            filter_layers: Its hidden layers.
            frequency: Of its sines, to begin with.
        """

        name: Literal["hyena"] = "hyena"
        conv: int = Field(3, ge=0)
        scale: int = Field(128, ge=1)
        bands: int = Field(8, ge=1)
        filter_width: int = Field(64, ge=1)
        filter_layers: int = Field(3, ge=1)
        frequency: float = Field(1.0, gt=0)

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        self.inp = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.skip = nn.Parameter(torch.randn(d_model))
        layers: list[nn.Module] = []
        width = 1 + 2 * config.bands
        for _ in range(config.filter_layers):
            layers += [nn.Linear(width, config.filter_width), _Sine(config)]
            width = config.filter_width
        self.filter = nn.Sequential(*layers, nn.Linear(width, d_model, bias=False))
        self.conv = ShortConv(3 * d_model, config.conv, bias=True)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix along L, convolving by the Fourier transform."""
        p, u = self._gated(self.conv(self.inp(x)))
        L = x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            wide = u.to(self.skip.dtype)
            # Zeros up to 2 L, so that the end does not come round to the beginning.
            spectrum = torch.fft.rfft(self._taps(L), 2 * L, dim=0)
            long = torch.fft.irfft(torch.fft.rfft(wide, 2 * L, dim=1) * spectrum, 2 * L, dim=1)
            y = long[:, :L] + self.skip * wide
        return self.out(p * y.to(p.dtype))

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return no past inputs, and the empty window of the short convolution."""
        past = torch.zeros(batch, 0, self.d_model, device=device)
        return past, *self.conv.initial_state(batch, device)

    def state_size(self, seq_len: int) -> int:
        """Count the past inputs of the long convolution, and the short one's window."""
        return self.d_model * seq_len + self.carried

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Mix one more token: a sum over all inputs so far."""
        projected, window = self.conv.step(self.inp(x), state[1:])
        p, u = self._gated(projected)
        wide = u.to(self.skip.dtype)
        past = torch.cat([state[0].to(wide.dtype), wide[:, None]], dim=1)
        long = torch.einsum("bnd,nd->bd", past, self._taps(past.shape[1]).flip(0))
        return self.out(p * (long + self.skip * wide).to(p.dtype)), (past, *window)

    def flops(self, seq_len: int) -> int:
        """Count as every mixer does, less the filter, which is made once for a whole batch."""
        every = super().flops(seq_len)
        assert every is not None
        return every - 2 * sum(p.numel() for p in self.filter.parameters() if p.ndim > 1)

    def mixing_flops(self, seq_len: int) -> int:
        """Count two real Fourier transforms of 2 L numbers, 2.5 n log2 n each, and a product."""
        n = 2 * seq_len
        transforms = 2 * 2.5 * n * math.log2(n) + 6 * (seq_len + 1)
        return round(self.d_model * transforms / seq_len)

    @staticmethod
    def _gated(projected: Tensor) -> tuple[Tensor, Tensor]:
        p, g, v = projected.chunk(3, dim=-1)
        return p, g * v

    def _taps(self, L: int) -> Float[Tensor, "L D"]:
        """Return the filter at distances 0 to L - 1."""
        like = self.skip
        n = torch.arange(L, device=like.device, dtype=like.dtype)[:, None] / self.config.scale
        waves = 2 * math.pi * n * torch.arange(1, self.config.bands + 1, device=n.device)
        with torch.autocast(n.device.type, enabled=False):
            h = self.filter(torch.cat([n, waves.cos(), waves.sin()], dim=1))
        ends = torch.linspace(_SLOWEST, _FASTEST, self.d_model, device=n.device, dtype=n.dtype)
        return h * (torch.exp(-_FALL * n / ends) + _SHIFT)


class _Sine(nn.Module):
    """sin(frequency * x), one frequency per channel."""

    def __init__(self, config: Hyena.Config):
        super().__init__()
        self.frequency = nn.Parameter(torch.full((config.filter_width,), config.frequency))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x)
