"""Softmax attention with rotary positions: the control, whose state grows with the sequence.

    o_t = sum_{t-window < s <= t} softmax_s(q_t . k_s / sqrt(Dh)) v_s    q, k rotated by positions

Legend: H heads of width Dh = width / heads; without `window`, all s <= t.
Source: Vaswani et al. 2017, arXiv 1706.03762; rotary positions: Su et al. 2021, arXiv 2104.09864,
Eq. 34, pairing coordinate i with i + Dh/2; sliding window: Beltagy et al. 2020, arXiv 2004.05150,
section 3.1, here looking back only. No convolution and no output norm by default, as in the MAD
baseline; both are options so that the comparison can be made on equal terms. With a window the
state is bounded; the parallel form still computes L x L scores, and masks them.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import Mixer, MixerConfig, RMSNorm, ShortConv, State
from mad_efla.mixers._dynamics import AttentionTrace


class Attention(Mixer):
    """Causal softmax attention."""

    class Config(MixerConfig):
        """Fields of attention.

        Attributes:
            heads: Heads H.
            window: Tokens attended to, the present one included; none for all up to it.
            rotary: Rotate q and k by their positions.
            rotary_base: Longest wavelength over 2 pi, in tokens.
            conv: Taps of a causal depthwise convolution on q, k and v; 0 for none.
            output_norm: RMSNorm over each head's output.
        """

        name: Literal["attention"] = "attention"
        heads: int = Field(8, ge=1)
        window: int | None = Field(None, ge=1)
        rotary: bool = True
        rotary_base: float = Field(10_000.0, gt=1)
        conv: int = Field(0, ge=0)
        output_norm: bool = False

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        if d_model % config.heads:
            raise ValueError(f"heads={config.heads} must divide model.width={d_model}")
        self.Dh = d_model // config.heads
        if config.rotary and self.Dh % 2:
            raise ValueError(f"rotary=true needs an even head width, not {self.Dh}; change heads")
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.norm = RMSNorm(self.Dh, eps=1e-5) if config.output_norm else None
        self.conv = ShortConv(3 * d_model, config.conv)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Attend over all tokens up to each one, or the last `window` of them."""
        L, window = x.shape[1], self.config.window
        qkv = rearrange(self.conv(self.qkv(x)), "B L (three H Dh) -> three B H L Dh", three=3, Dh=self.Dh)
        if x.device.type == "cpu":  # in bfloat16 it is 3.5 times slower there, and less exact
            qkv = qkv.to(x.dtype)
        q, k, v = qkv
        if self.config.rotary:
            angles = self._angles(torch.arange(L, device=x.device))
            q, k = _rotate(q, angles), _rotate(k, angles)
        mask = None
        if window is not None and window < L:
            near = torch.ones(L, L, dtype=torch.bool, device=x.device)
            mask = near.tril().triu(1 - window)
        with torch.autocast(x.device.type, enabled=False):
            o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self._output(rearrange(o, "B H L Dh -> B L H Dh"))

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return an empty cache of keys and values, and the window of the convolution."""
        cache = torch.zeros(batch, self.config.heads, 0, 2 * self.Dh, device=device)
        return cache, *self.conv.initial_state(batch, device)

    def state_size(self, seq_len: int) -> int:
        """Count the keys and values that the next token needs, and the convolution's window."""
        if self.config.window is not None:
            seq_len = min(seq_len, self.config.window - 1)
        return 2 * self.d_model * seq_len + self.carried

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Attend from one more token."""
        qkv, taps = self.conv.step(self.qkv(x), state[1:])
        q, k, v = rearrange(qkv, "B (three H Dh) -> three B H 1 Dh", three=3, Dh=self.Dh)
        cache = torch.cat([state[0].to(k.dtype), torch.cat([k, v], dim=-1)], dim=2)
        keys, values = cache.split(self.Dh, dim=-1)
        if self.config.rotary:  # only distances count, so the cache needs no absolute positions
            angles = self._angles(torch.arange(cache.shape[2], device=x.device))
            q, keys = _rotate(q, angles[-1:]), _rotate(keys, angles)
        o = F.scaled_dot_product_attention(q, keys, values)
        if self.config.window is not None:
            cache = cache[:, :, max(0, cache.shape[2] - self.config.window + 1) :]
        return self._output(o[:, :, 0]), (cache, *taps)

    def mixing_flops(self, seq_len: int) -> int:
        """Count: two each for score and sum, per coordinate of every token attended to."""
        window = min(self.config.window or seq_len, seq_len)
        attended = window * (window + 1) // 2 + (seq_len - window) * window  # by all tokens
        return 4 * self.d_model * attended // seq_len

    def dynamics(self, x: Float[Tensor, "B L D"]) -> AttentionTrace:
        """Return what the weights are computed from."""
        q, k, v = rearrange(self.conv(self.qkv(x)), "B L (three H Dh) -> three B H L Dh", three=3, Dh=self.Dh)
        if self.config.rotary:
            angles = self._angles(torch.arange(x.shape[1], device=x.device))
            q, k = _rotate(q, angles), _rotate(k, angles)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return AttentionTrace(q=q, k=k, v=v, window=self.config.window)

    def _angles(self, positions: Tensor) -> Tensor:
        # In float64: in float32 an angle of thousands is off by more than the distances differ.
        pairs = torch.arange(0, self.Dh, 2, dtype=torch.float64, device=positions.device)
        return positions[:, None] * self.config.rotary_base ** (-pairs / self.Dh)

    def _output(self, o: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o)
        return self.out(rearrange(o, "... H Dh -> ... (H Dh)"))


def _rotate(x: Float[Tensor, "B H L Dh"], angles: Float[Tensor, "L half"]) -> Tensor:
    """Rotate each pair of coordinates by its angle, in float32."""
    first, second = x.float().chunk(2, dim=-1) if x.dtype == torch.bfloat16 else x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(first.dtype), angles.sin().to(first.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)
