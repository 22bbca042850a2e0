"""Kimi Delta Attention of transformers, whose model sets what the layer leaves unset; here the layer does."""

import math

import torch
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention


class Kimi(KimiLinearDeltaAttention):
    def __init__(self, config: KimiLinearConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        gate = self.forget_gate
        dt = torch.empty_like(gate.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        with torch.no_grad():
            gate.A_log.uniform_(1, 16).log_()
            gate.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
