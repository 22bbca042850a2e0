"""The delta family without what usually stands around it: one head, read as it is.

    q, k, v = x W        beta = act(x w_beta + b)
    S_t = a (I - alpha k k^T) S_{t-1} + alpha k v^T,   alpha = beta * r(beta |k|^2)
    o_t = S_t^T q_t / |q_t|

No convolution, no activation on q, k and v, no norm and no projection of the output. `keys`,
`step`, `beta` and `decay` are those of `delta.py`; `plain_efla` and `plain_deltanet` are the
corners that the authors compare. With raw keys, |k| grows with the input.

Legend: x may be of any size. W is drawn by Xavier, each of q, k, v for itself; b starts at -2.
Source: Lei, Zhang, Poria, arXiv 2512.12602, the layer of their experiment on sequential MNIST.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from mad_efla.mixers import ShortConv
from mad_efla.mixers.delta import Delta


class PlainDelta(Delta):
    """The rule of the delta family on plain projections."""

    class Config(Delta.Config):
        """Fields of the plain layer: those of the delta family, less what it leaves out.

        Attributes:
            heads: Heads; one as published.
            beta_bias: Where the bias of beta's logit starts.
        """

        name: str = "plain_delta"
        heads: int = Field(1, ge=1)
        conv: Literal[0] = 0
        output_norm: Literal[False] = False
        output_gate: Literal[False] = False
        beta_bias: float = -2.0

    def __init__(self, d_model: int, config: Config):
        super().__init__(d_model, config)
        if config.heads * self.Dv != d_model:
            raise ValueError(
                f"heads={config.heads} of value_dim={self.Dv} must make up model.width={d_model}: "
                "there is no projection behind them"
            )
        self.out = nn.Identity()
        self.conv = ShortConv(sum(self.widths), 0)
        for part in self.qkv.weight.data.split(self.widths):
            nn.init.xavier_uniform_(part)
        nn.init.constant_(self.beta.bias, config.beta_bias)
