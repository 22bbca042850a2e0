"""The backbone: what stands around the mixers. It takes mixers built, and names none.

    x = embed(tokens);  x = x + mixer(norm(x));  x = x + channel(norm(x));  ...;  head(norm(x))

Source: Poli et al. 2024, arXiv 2403.17844, appendix B: no positions, no dropout, RMSNorm, embedding
N(0, 0.02), untied head with a bias that starts at zero. Departure: only what belongs to the
backbone is initialised here; a mixer keeps its own initialisation.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mad_efla import plugins
from mad_efla.config import ConfigError
from mad_efla.mixers import Mixer, RMSNorm
from mad_efla.run import ModelConfig, RunConfig


class SwiGLU(nn.Module):
    """Gated channel mixer, inner width 8/3 D rounded up to a multiple of 16.

    Source: Shazeer 2020, arXiv 2002.05202, Eq. 6.
    """

    def __init__(self, width: int):
        super().__init__()
        inner = -(-8 * width // 3 // 16) * 16
        self.inner = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Mix channels of each token."""
        gate, value = self.inner(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class MLP(nn.Module):
    """Plain channel mixer, inner width 4 D, GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Mix channels of each token."""
        return self.out(F.gelu(self.inner(x)))


CHANNELS = {"swiglu": SwiGLU, "mlp": MLP}


class LanguageModel(nn.Module):
    """Tokens in, logits out.

    Args:
        vocabulary: Number of token ids V.
        mixers: One mixer per pair of layers.
        config: Width, channel mixer and norm.
    """

    def __init__(self, vocabulary: int, mixers: list[Mixer], config: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, config.width)
        layers: list[nn.Module] = []
        for mixer in mixers:
            layers.append(mixer)
            if config.channel != "none":
                layers.append(CHANNELS[config.channel](config.width))
        self.layers = nn.ModuleList(layers)
        norms = (RMSNorm(config.width, eps=config.norm_eps) for _ in layers)
        self.norms = nn.ModuleList(norms)
        self.final_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, vocabulary)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, tokens: Int[Tensor, "B L"], scored: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "... V"]:
        """Return logits at every position, or as `[n, V]` at the scored ones only."""
        x = self.embed(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        if scored is not None:
            x = x[scored]
        return self.head(self.final_norm(x))


def build(run: RunConfig) -> LanguageModel:
    """Build a run's model, initialised from the run's seed alone.

    Raises:
        ConfigError: The mixers do not fit the width.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        try:
            mixers = [plugins.mixer(m.name)(run.model.width, m) for m in run.mixers]
        except ValueError as error:
            raise ConfigError(f"mixer {run.mixer}: {error}") from error
        return LanguageModel(run.task.vocabulary, mixers, run.model)


def check(run: RunConfig) -> LanguageModel:
    """Build a run's model without memory, to find out whether it can be built and how big it is."""
    with torch.device("meta"):
        return build(run)


def state_size(model: LanguageModel, seq_len: int) -> int:
    """Count the numbers all mixers carry between tokens, after `seq_len` of them."""
    return sum(m.state_size(seq_len) for m in model.layers if isinstance(m, Mixer))


def parameter_count(model: nn.Module) -> int:
    """Count trained numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
