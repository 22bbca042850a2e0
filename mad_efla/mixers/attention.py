"""Softmax attention with rotary positions: the control, whose state grows with the sequence.

    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(Dh)) v_s      q, k rotated by their positions

Legend: H heads of width Dh = width / heads.
Source: Vaswani et al. 2017, arXiv 1706.03762; rotary positions: Su et al. 2021, arXiv 2104.09864,
Eq. 34, pairing coordinate i with i + Dh/2. No convolution and no output norm by default, as in the
MAD baseline; both are options so that the comparison can be made on equal terms.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mad_efla.mixers import Mixer, MixerConfig, RMSNorm, State
from mad_kernels import short_conv, short_conv_step


class Attention(Mixer):
    """Causal softmax attention."""

    class Config(MixerConfig):
        """Fields of attention.

        Attributes:
            heads: Heads H.
            rotary: Rotate q and k by their positions.
            rotary_base: Longest wavelength over 2 pi, in tokens.
            conv: Taps of a causal depthwise convolution on q, k and v; 0 for none.
            output_norm: RMSNorm over each head's output.
        """

        name: Literal["attention"] = "attention"
        heads: int = Field(8, ge=1)
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
        self.conv = None
        if config.conv:
            self.conv = nn.Parameter(torch.empty(3 * d_model, config.conv))
            nn.init.uniform_(self.conv, -(config.conv**-0.5), config.conv**-0.5)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Attend over all tokens up to each one."""
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv, _ = short_conv(qkv, self.conv)
        q, k, v = rearrange(qkv, "B L (three H Dh) -> three B H L Dh", three=3, Dh=self.Dh)
        if self.config.rotary:
            angles = self._angles(torch.arange(x.shape[1], device=x.device))
            q, k = _rotate(q, angles), _rotate(k, angles)
        if x.device.type == "cpu":  # in bfloat16 it is 3.5 times slower there, and less exact
            q, k, v = q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._output(rearrange(o, "B H L Dh -> B L H Dh"))

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return an empty cache of keys and values, and the window of the convolution."""
        cache = torch.zeros(batch, self.config.heads, 0, 2 * self.Dh, device=device)
        if self.conv is None:
            return (cache,)
        return cache, torch.zeros(batch, 3 * self.d_model, self.config.conv - 1, device=device)

    def state_size(self, seq_len: int) -> int:
        """Count the cached keys and values after `seq_len` tokens, and the window."""
        return 2 * self.d_model * seq_len + super().state_size(seq_len)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Attend from one more token."""
        qkv, window = self.qkv(x), ()
        if self.conv is not None:
            qkv, past = short_conv_step(qkv, self.conv, None, state[1])
            window = (past,)
        q, k, v = rearrange(qkv, "B (three H Dh) -> three B H 1 Dh", three=3, Dh=self.Dh)
        if self.config.rotary:
            angles = self._angles(torch.tensor([state[0].shape[2]], device=x.device))
            q, k = _rotate(q, angles), _rotate(k, angles)
        cache = torch.cat([state[0].to(k.dtype), torch.cat([k, v], dim=-1)], dim=2)
        keys, values = cache.split(self.Dh, dim=-1)
        o = F.scaled_dot_product_attention(q, keys, values)
        return self._output(o[:, :, 0]), (cache, *window)

    def _angles(self, positions: Tensor) -> Tensor:
        exponents = torch.arange(0, self.Dh, 2, device=positions.device) / self.Dh
        return positions[:, None] * self.config.rotary_base**-exponents

    def _output(self, o: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o)
        return self.out(rearrange(o, "... H Dh -> ... (H Dh)"))


def _rotate(x: Float[Tensor, "B H L Dh"], angles: Float[Tensor, "L half"]) -> Tensor:
    """Rotate each pair of coordinates by its angle, in float32."""
    first, second = x.float().chunk(2, dim=-1) if x.dtype == torch.bfloat16 else x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(first.dtype), angles.sin().to(first.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)
