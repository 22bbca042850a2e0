"""The backbones: what stands around the mixers. They take mixers built, and name none.

    stack:          x = embed(tokens);  x = x + mixer(norm(x));  x = x + channel(norm(x));  ...
    of blocks:      x = embed(tokens);  x = block(x);  ...
    language model: logits = head(norm(x))
    autoencoder:    logits_t = head(norm(decoder(x_L + position_t))), from the last vector alone
    classifier:     a language model with embed(values) = values w + positions
    bare:           x = gelu(embed(values));  x = mixer(x);  ...;  logits = head(LayerNorm(x))

Source: Poli et al. 2024, arXiv 2403.17844, appendix B: no positions in the stack, no dropout,
RMSNorm, embedding N(0, 0.02), untied head with a bias that starts at zero. Departure: only what
belongs to the backbone is initialised here; a mixer keeps its own initialisation (the reference
code's autoencoder draws all weights anew, and zeroes the biases that mixers start from).
The bare classifier: Lei, Zhang, Poria, arXiv 2512.12602, their experiment on sequential MNIST. It
has no residual and no norm before a mixer, so the size of its input reaches the keys.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from mad_efla import plugins
from mad_efla.config import ConfigError
from mad_efla.mixers import Mixer, MixerConfig, Place, RMSNorm
from mad_efla.plan.run import ModelConfig, RunConfig, channel_fields
from mad_efla.training import randomness
from mad_kernels import swiglu


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
        return self.out(swiglu(self.inner(x)))


class MLP(nn.Module):
    """Plain channel mixer, inner width 4 D, GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Mix channels of each token."""
        return self.out(F.gelu(self.inner(x)))


class OtherChannel(nn.Module):
    """A channel mixer that is not ours, kept apart from the mixers.

    Args:
        found: What it is.
        config: Its fields.
        width: Width of the model, D.
    """

    def __init__(self, found: type[Mixer], config: MixerConfig, width: int):
        super().__init__()
        self.module = found.placed(width, config, Place())

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix channels of each token."""
        return self.module(x)


CHANNELS = {"swiglu": SwiGLU, "mlp": MLP}


def _channel(config: ModelConfig) -> nn.Module:
    """Build the channel mixer that a model's fields name."""
    own = channel_fields(config)
    if own is not None:
        return OtherChannel(plugins.mixer(own.name), own, config.width)
    return CHANNELS[str(config.channel)](config.width)


class TokenEmbedding(nn.Embedding):
    """A vector per token id, of any integer type."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__(vocabulary, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Look vectors up."""
        return super().forward(tokens.long())


class ValueEmbedding(nn.Module):
    """A real number times one vector, plus a learned vector for its position."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.value = nn.Linear(1, width, bias=False)
        self.position = nn.Parameter(torch.empty(length, width).normal_(std=0.02))

    def forward(self, values: Float[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Embed values; positions count from the first."""
        return self.value(values[..., None]) + self.position[: values.shape[1]]


class Stack(nn.Module):
    """Embedding and residual layers: a mixer and a channel mixer, again and again.

    Args:
        embed: Turns inputs into vectors.
        mixers: One mixer per pair of layers.
        config: Width, channel mixer and norm.
    """

    def __init__(self, embed: nn.Module, mixers: list[Mixer], config: ModelConfig):
        super().__init__()
        self.embed = embed
        layers: list[nn.Module] = []
        for mixer in mixers:
            layers.append(mixer)
            if config.channel != "none":
                layers.append(_channel(config))
        self.layers = nn.ModuleList(layers)
        normed = [] if config.blocks else layers
        self.norms = nn.ModuleList(RMSNorm(config.width, eps=config.norm_eps) for _ in normed)

    def forward(self, inputs: Num[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Return the residual stream after the last layer."""
        x, branch = self.embed(inputs), None
        if not self.norms:  # whole blocks
            for layer in self.layers:
                x = layer(x)
            return x
        for norm, layer in zip(self.norms, self.layers, strict=True):
            assert isinstance(norm, RMSNorm)
            x, normed = norm.behind(x, branch)
            branch = layer(normed)
        return x if branch is None else x + branch


class BareStack(nn.Module):
    """Embedding, GELU, and mixers one after the other, with nothing around them."""

    def __init__(self, embed: nn.Module, mixers: list[Mixer]):
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(mixers)

    def forward(self, inputs: Num[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Return what the last mixer gives."""
        x = F.gelu(self.embed(inputs))
        for layer in self.layers:
            x = layer(x)
        return x


class Backbone(nn.Module):
    """What all backbones are: a stack, and logits at every position or at the scored ones.

    Args:
        vocabulary: Number of token ids, or of classes, V.
        mixers: One mixer per pair of layers.
        config: Width, channel mixer and norm.
        length: Positions of an input, L; only a model with learned positions needs it.
    """

    def __init__(self, vocabulary: int, mixers: list[Mixer], config: ModelConfig, length: int | None = None):
        super().__init__()
        self.stack = self.body(vocabulary, mixers, config, length)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, vocabulary)
        nn.init.zeros_(self.head.bias)

    def body(self, vocabulary: int, mixers: list[Mixer], config: ModelConfig, length: int | None) -> Stack | BareStack:
        """Build what turns inputs into vectors."""
        del length
        return Stack(TokenEmbedding(vocabulary, config.width), mixers, config)

    @property
    def mixers(self) -> list[Mixer]:
        """The mixers, first layer first."""
        return [layer for layer in self.stack.layers if isinstance(layer, Mixer)]

    def forward(
        self, inputs: Num[Tensor, "B L"], scored: Bool[Tensor, "B L"] | Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "... V"]:
        """Return logits at every position, or as `[n, V]` at the scored ones only.

        Args:
            inputs: Token ids, or real numbers.
            scored: A mask, or K positions of each row by number, which no device is waited for.
        """
        x = self.positions(self.stack(inputs))
        if scored is not None:
            masked = scored.dtype == torch.bool
            x = x[scored] if masked else torch.take_along_dim(x, scored[..., None], 1).flatten(0, 1)
        return self.head(self.norm(self.decode(x)))

    def positions(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return what each position's answer is read from."""
        return x

    def decode(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """Turn what an answer is read from into what the head takes."""
        return x


class LanguageModel(Backbone):
    """Every position answers from its own vector."""


class AutoEncoder(Backbone):
    """Every position answers from the last vector and its own number.

    The decoder is a plain MLP, without residual, that sees one position alone: whatever is known
    about the sequence went through one vector of width D.
    """

    def __init__(self, vocabulary: int, mixers: list[Mixer], config: ModelConfig, length: int | None = None):
        super().__init__(vocabulary, mixers, config, length)
        D, eps = config.width, config.norm_eps
        self.decoder = nn.Sequential(
            RMSNorm(D, eps=eps), nn.Linear(D, D), nn.GELU(), RMSNorm(D, eps=eps), nn.Linear(D, D), nn.GELU()
        )
        for linear in (*self.decoder, self.head):
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def positions(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return the last vector, plus the number of each position as sines and cosines."""
        L, D = x.shape[1:]
        return x[:, -1:] + _sines(L, D, x.device).to(x.dtype)

    def decode(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """Decode each position alone."""
        return self.decoder(x)


class Classifier(Backbone):
    """Inputs are real numbers at learned positions; the task reads the last one."""

    def body(self, vocabulary: int, mixers: list[Mixer], config: ModelConfig, length: int | None) -> Stack | BareStack:
        """Build a stack on values."""
        assert length is not None
        return Stack(ValueEmbedding(length, config.width), mixers, config)


class BareClassifier(Backbone):
    """The body of the EFLA authors' experiment on sequential MNIST."""

    def __init__(self, vocabulary: int, mixers: list[Mixer], config: ModelConfig, length: int | None = None):
        super().__init__(vocabulary, mixers, config, length)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def body(self, vocabulary: int, mixers: list[Mixer], config: ModelConfig, length: int | None) -> Stack | BareStack:
        """Build a stack without residual and norm."""
        assert length is not None
        if config.channel != "none":
            raise ValueError(
                f"model.channel={config.channel} has no place in the bare classifier; set it to "
                "none, or task.body to stack"
            )
        return BareStack(ValueEmbedding(length, config.width), mixers)


_SMALL = 10_000_000  # numbers, at about a nanosecond each

BACKBONES: dict[str, type[Backbone]] = {
    "language_model": LanguageModel,
    "autoencoder": AutoEncoder,
    "classifier": Classifier,
    "bare_classifier": BareClassifier,
}


def _sines(L: int, D: int, device: torch.device) -> Float[Tensor, "L D"]:
    """Write positions as sines, then cosines, of D/2 wavelengths from 2 pi to 20,000 pi."""
    half = D // 2
    rates = 10_000.0 ** -(torch.arange(half, device=device) / max(half - 1, 1))
    angles = torch.arange(L, device=device)[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, D - 2 * half))


def build(run: RunConfig) -> Backbone:
    """Build the model that a run's task asks for, initialised from the run's seed alone.

    Raises:
        ConfigError: The mixers do not fit the width, or the model's fields the backbone.
    """
    with randomness.building(run.seed):
        try:
            mixers = [
                plugins.mixer(m.name).placed(run.model.width, m, Place(layer, len(run.mixers), run.task.input_length))
                for layer, m in enumerate(run.mixers)
            ]
        except ValueError as error:
            raise ConfigError(f"mixer {run.mixer}: {error}") from error
        found, length = BACKBONES[run.task.backbone], run.task.input_length
        try:
            return found(run.task.vocabulary, mixers, run.model, length)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def check(run: RunConfig) -> Backbone:
    """Build a run's model to find out whether it can be built and how big it is.

    A large one is built without memory. A small one is built for real, which is quicker: tensors
    without memory make torch load its compiler, a matter of seconds.
    """
    numbers = run.model.width * (run.task.vocabulary + run.model.width * run.model.depth)
    with torch.device("cpu" if numbers < _SMALL else "meta"):
        return build(run)


class MixerSize(NamedTuple):
    """What one mixer layer costs.

    Attributes:
        parameters: Trained numbers.
        state: Numbers carried between tokens, less the window; None where that is unknown.
        window: Numbers that its short convolution carries, as far as it is one of ours.
        flops: Operations per token, see `Mixer.flops`; None where that is unknown.
    """

    parameters: int
    state: int | None
    window: int
    flops: int | None


def mixer_size(config: MixerConfig, width: int, seq_len: int) -> MixerSize:
    """Measure a mixer at a model width and a sequence length.

    Raises:
        ValueError: It does not fit the width.
    """
    found = plugins.mixer(config.name)
    with torch.random.fork_rng(devices=[]):
        place = Place(length=seq_len)
        whole = bare = found.placed(width, config, place)
        if getattr(config, "conv", 0) and ":" not in config.name:
            bare = found.placed(width, config.model_copy(update={"conv": 0}), place)
    state, held = bare.state_size(seq_len), whole.state_size(seq_len)
    window = 0 if state is None or held is None else held - state
    return MixerSize(parameter_count(whole), state, window, whole.flops(seq_len))


def state_size(model: Backbone, seq_len: int) -> int | None:
    """Count the numbers all mixers carry between tokens, after `seq_len` of them; None if one's are unknown."""
    sizes = [m.state_size(seq_len) for m in model.mixers]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def parameter_count(model: nn.Module) -> int:
    """Count trained numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
