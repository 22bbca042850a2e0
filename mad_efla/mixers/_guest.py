"""A layer of somebody else's as a mixer: any `nn.Module`, built from fields and called with one tensor.

    layer = Layer(width, fields, place)
    y = the first tensor [B, L, D] among what layer(x) returns

What the constructor takes decides what it gets: the model's width goes to the first of `WIDTHS`,
and to the others of them that have no default (a recurrent module's input_size and hidden_size);
`layer_idx`, the depth and the length of a sequence go where they are accepted; `batch_first` is
true. All else that it names are fields of a plan, with its own defaults. Where it takes one
configuration object, the fields are that object's: of the class that the annotation names, or plain
attributes.

A layer needs only `forward`. If it has `initial_state(batch, device)` and `step(x, state)` it decodes,
if it has `dynamics(x)` it has a spectrum, if it has `state_size(seq_len)` its memory is known;
torch's recurrent modules return theirs, and a layer that fills a cache of transformers or fla is measured.
"""

import copy
import dataclasses
import functools
import importlib
import inspect
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Union

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field, create_model, model_serializer, model_validator
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mad_efla.config import suggest
from mad_efla.mixers import Mixer, MixerConfig, Place, State
from mad_efla.mixers._dynamics import AttentionTrace, Dynamics

WIDTHS = ("hidden_size", "d_model", "dim", "embed_dim", "n_embd", "input_size")
LENGTHS = ("l_max", "max_length", "max_seq_len", "seq_len", "block_size")
DEPTHS = ("num_hidden_layers", "n_layer")
_NO_FIELDS = ("device", "dtype")
_CONFIGURATIONS = ("config", "configuration", "cfg", "args")
_CACHES = ("past_key_values", "cache_params", "past_key_value")
_NEEDS_DEVICE = ("cuda", "triton", "gpu", "active drivers", "nvidia")
_SIMPLE = (int, float, bool, str, type(None))
_REQUIRED = inspect.Parameter.empty
_MEASURED_AT = (64, 128)  # tokens


def reason(error: BaseException) -> str:
    """Say in one sentence what an error from inside a layer means, and the cure where it is known."""
    kind, text = type(error).__name__, (str(error).strip().splitlines() or [""])[0][:300]
    said = text if text and type(error) is ValueError else f"{kind}: {text}" if text else kind
    frames = traceback.extract_tb(error.__traceback__)
    inside = any("/triton/" in frame.filename for frame in frames)
    if inside or any(word in str(error).lower() for word in _NEEDS_DEVICE):
        return f"it needs a CUDA device ({said}); run it with --device cuda on a machine that has one, or leave it out"
    return said


# ------------------------------------------------------------------ what a constructor takes


class Signature(NamedTuple):
    """What a layer is built from.

    Attributes:
        layer: The module's class.
        accepts: What can be set, its annotation and default by name.
        into: Name of the constructor's configuration argument; empty where it takes fields itself.
        configuration: Class of that argument; None where any object with attributes will do.
        whole: What the constructor takes beside the configuration argument.
    """

    layer: type[nn.Module]
    accepts: dict[str, inspect.Parameter]
    into: str
    configuration: type | None
    whole: dict[str, inspect.Parameter]

    @property
    def open(self) -> bool:
        """Whether its fields are not known before it has read them."""
        return bool(self.into) and self.configuration is None

    def width_names(self) -> list[str]:
        """Name what the model's width goes to: the first of WIDTHS, and others without a default."""
        if self.open:
            return list(WIDTHS)
        taken = [name for name in WIDTHS if name in self.accepts]
        return taken[:1] + [name for name in taken[1:] if self.accepts[name].default is _REQUIRED]


def signature(layer: type[nn.Module]) -> Signature:
    """Read what a layer's constructor takes.

    Raises:
        ValueError: No argument of it can take the model's width.
    """
    whole = _named(layer)
    if issubclass(layer, nn.RNNBase):
        for name in ("mode", *["proj_size"] * (not issubclass(layer, nn.LSTM))):  # the base class's, refused here
            whole.pop(name, None)
    if issubclass(layer, nn.RNN):
        whole["nonlinearity"] = inspect.Parameter("nonlinearity", _KEYWORD, default="tanh", annotation=str)
    if any(name in whole for name in WIDTHS):
        return Signature(layer, whole, "", None, {})
    into = next((name for name in _CONFIGURATIONS if name in whole), "")
    if not into:
        raise ValueError(
            f"{layer.__name__}({', '.join(whole)}) has no argument for the model's width, which goes to the first of "
            f"{', '.join(WIDTHS)}; name its argument so, or wrap it in a module that does"
        )
    kind = _annotated(layer, into)
    if kind is None:
        return Signature(layer, {}, into, None, whole)
    accepts = _fields_of(kind)
    if not any(name in accepts for name in WIDTHS):
        raise ValueError(f"{kind.__name__}, which {layer.__name__} is built from, has none of {', '.join(WIDTHS)}")
    return Signature(layer, accepts, into, kind, whole)


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _named(layer: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """List what constructors name, from the layer's own up to the last that is passed `**kwargs`."""
    found: dict[str, inspect.Parameter] = {}
    for kind in layer.__mro__:
        if "__init__" not in vars(kind) or kind is nn.Module:
            continue
        parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
        found = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, _KEYWORD)} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _annotated(layer: type[nn.Module], name: str) -> type | None:
    """Return the class that an argument's annotation names; None where it names none to be built."""
    try:
        found = typing.get_type_hints(layer.__init__).get(name)
    except Exception:  # an annotation that cannot be evaluated here
        return None
    plain = found in (None, object, dict, Any, types.SimpleNamespace)
    return None if plain or not inspect.isclass(found) else found


def _fields_of(kind: type) -> dict[str, inspect.Parameter]:
    if dataclasses.is_dataclass(kind):
        hints = {f.name: f.type for f in dataclasses.fields(kind) if f.init}
        defaults = {f.name: _default(f) for f in dataclasses.fields(kind) if f.init}
        return {n: inspect.Parameter(n, _KEYWORD, default=defaults[n], annotation=hints[n]) for n in hints}
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, _KEYWORD)}


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return _REQUIRED if field.default_factory is dataclasses.MISSING else None


# ------------------------------------------------------------------ fields


class GuestConfig(MixerConfig):
    """The fields of a guest; what it leaves to the layer's own defaults is not written down."""

    adopted: ClassVar["Signature"]
    silent: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _leaves_the_width(cls, values: Any) -> Any:
        for name in cls.adopted.width_names():
            if isinstance(values, dict) and name in values:
                raise ValueError(f"{name}={values[name]!r} is the model's width; leave it out, and set model.width")
        return values

    @model_serializer(mode="wrap")
    def _written(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if k in self.model_fields_set or k not in self.silent}

    def __reduce__(self) -> Any:
        """Pickle by the layer, whose class is found by its name; this one is made of it."""
        return _revived, (self.name, self.adopted.layer, self.model_dump())


class OpenConfig(GuestConfig):
    """The fields of a guest whose configuration has no class: the layer tells which it reads."""

    model_config = ConfigDict(extra="allow")


def _revived(name: str, layer: type[nn.Module], values: dict[str, Any]) -> MixerConfig:
    return adopt(name, layer).Config(**values)


def _config(name: str, found: Signature) -> type[GuestConfig]:
    """Make the class of a layer's fields."""
    supplied = {*LENGTHS, *DEPTHS, "layer_idx", "batch_first"} & set(found.accepts)
    left_out = {*found.width_names(), *_NO_FIELDS, "name"}
    fields: dict[str, Any] = {}
    silent = set(supplied)
    for key, parameter in found.accepts.items():
        if key in left_out or key.startswith("_"):
            continue
        annotation = _simple(parameter.annotation)
        if key in supplied:
            fields[key] = (annotation | None if annotation is not Any else Any, None)
        elif parameter.default is _REQUIRED:
            fields[key] = (annotation, ...)
        elif found.into or not _recordable(parameter.default):
            silent.add(key)
            recordable = _recordable(parameter.default)
            fields[key] = (annotation if recordable else Any, parameter.default if recordable else None)
        else:
            fields[key] = (annotation, Field(parameter.default))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a field named as an attribute of pydantic's
        base = OpenConfig if found.open else GuestConfig
        made = create_model("Config", __base__=base, __module__=__name__, **fields)
    made.adopted, made.silent = found, frozenset(silent)
    made.__doc__ = f"The fields of {name}."
    return made


def _simple(annotation: Any) -> Any:
    """Return an annotation that values of a plan can be held to; Any for one of other types."""
    if isinstance(annotation, str):
        annotation = {"int": int, "float": float, "bool": bool, "str": str}.get(annotation, Any)
    if annotation in _SIMPLE:
        return annotation
    parts = typing.get_args(annotation)
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is Union
    return annotation if union and all(part in _SIMPLE for part in parts) else Any


def _recordable(value: Any) -> bool:
    """Tell whether JSON gives a value back as it was."""
    if isinstance(value, list):
        return all(_recordable(v) for v in value)
    return value is None or type(value) in (int, bool, str) or (type(value) is float and abs(value) < float("inf"))


class Fields:
    """Fields as attributes, for a layer whose configuration has no class; knows which were read."""

    def __init__(self, values: dict[str, Any]):
        self.__dict__.update(_values=values, _read=set())

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values")
        if values is None or name.startswith("__"):
            raise AttributeError(name)
        self.__dict__["_read"].add(name)
        if name not in values:
            raise AttributeError(f"the configuration has no {name}; give the field {name} a value")
        return values[name]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


# ------------------------------------------------------------------ the mixer


class Guest(Mixer):
    """A mixer whose `forward` is a layer of somebody else's.

    Args:
        d_model: Width of the model, D.
        config: The layer's fields.
        place: Where in a model it stands.

    Raises:
        ValueError: The layer cannot be built so.
    """

    Config: ClassVar[type[MixerConfig]] = GuestConfig
    adopted: ClassVar[Signature]

    def __init__(self, d_model: int, config: GuestConfig, place: Place = Place()):  # noqa: B008
        super().__init__(d_model, config)
        try:
            self.layer = _built(self.adopted, d_model, config, place)
            if any(is_lazy(p) for p in self.layer.parameters()):
                with torch.no_grad():
                    self.layer(torch.zeros(1, 2, d_model))
        except Exception as error:
            raise ValueError(f"{self.adopted.layer.__name__}: {reason(error)}") from error

    @classmethod
    def placed(cls, d_model: int, config: GuestConfig, place: Place) -> "Guest":
        """Build it for a place in a model."""
        return cls(d_model, config, place)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Call the layer; its output is in the input's type."""
        found = self.layer(x)
        shapes = []
        for y in _tensors(found):
            if y.shape == x.shape and not y.is_complex():
                return y.to(x.dtype)
            shapes.append(f"{'complex ' * y.is_complex()}{tuple(y.shape)}")
        raise ValueError(
            f"{self.adopted.layer.__name__} returned {' and '.join(shapes) or type(found).__name__} for an input "
            f"{tuple(x.shape)}; it must return a tensor [B, L, D], or several of which one is"
        )

    @property
    def decodes(self) -> bool:
        """Whether the layer defines `initial_state` and `step`."""
        return all(self._own(name) for name in ("initial_state", "step"))

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return the layer's state before the first token."""
        own = self._own("initial_state")
        return own(batch, device) if own else super().initial_state(batch, device)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Let the layer mix one more token."""
        own = self._own("step")
        return own(x, state) if own else super().step(x, state)

    def dynamics(self, x: Float[Tensor, "B L D"]) -> Dynamics | AttentionTrace | None:
        """Return how the layer's memory moves, if it tells."""
        own = self._own("dynamics")
        return own(x) if own else None

    def mixing_flops(self, seq_len: int) -> int | None:
        """Nothing is known of how a guest's tokens meet."""
        del seq_len
        return None

    def state_size(self, seq_len: int) -> int | None:
        """Return what the layer declares, what it carries, or what it leaves in a cache; None if unknown."""
        if declared := self._own("state_size"):
            return declared(seq_len)
        if self.decodes:
            return self.carried
        return _measured(self.layer, self.d_model, seq_len)

    def _own(self, name: str) -> Callable[..., Any] | None:
        found = getattr(self.layer, name, None)
        return found if callable(found) else None

    def __reduce__(self) -> Any:
        """Pickle by the layer, whose class is found by its name; this one is made of it."""
        return _blank, (self.config.name, self.adopted.layer), self.__dict__


def _blank(name: str, layer: type[nn.Module]) -> Guest:
    kind = adopt(name, layer)
    return kind.__new__(kind)


@functools.cache
def adopt(name: str, layer: type[nn.Module]) -> type[Guest]:
    """Make a mixer of a layer's class.

    Args:
        name: How plans name it: `package.module:Name`.
        layer: The class.

    Raises:
        ValueError: It has no argument for the model's width.
    """
    found = signature(layer)
    members = {"Config": _config(name, found), "adopted": found, "__module__": __name__, "__doc__": layer.__doc__}
    return type(layer.__name__, (Guest,), members)


def _built(found: Signature, d_model: int, config: GuestConfig, place: Place) -> nn.Module:
    """Build a layer from the model's width, its place and its fields."""
    given: dict[str, Any] = dict.fromkeys(found.width_names(), d_model)
    given |= dict.fromkeys(LENGTHS, place.length) | dict.fromkeys(DEPTHS, max(2, place.depth))
    given |= {"layer_idx": place.layer, "batch_first": True}
    fields = {k: v for k, v in config.model_dump().items() if k != "name"}
    if not found.open:
        given = {k: v for k, v in given.items() if k in found.accepts}
    given |= fields
    if not found.into:
        return found.layer(**given)
    configuration = Fields(given) if found.configuration is None else found.configuration(**given)
    rest = {k: v for k, v in {"layer_idx": place.layer}.items() if k in found.whole}
    layer = found.layer(**{found.into: configuration}, **rest)
    if isinstance(configuration, Fields):
        _refuse_unread(found, configuration, fields)
    layer.__dict__["configuration_given"] = configuration
    return layer


def _refuse_unread(found: Signature, configuration: Fields, fields: dict[str, Any]) -> None:
    """Refuse a field that the layer neither reads when it is built nor names anywhere in its source."""
    read = configuration.__dict__["_read"]
    try:
        source = inspect.getsource(found.layer)
    except (OSError, TypeError):
        source = ""
    for name in fields:
        if name not in read and name not in source:
            raise ValueError(f"{name} is not read by {found.layer.__name__}{suggest(name, sorted(read - set(WIDTHS)))}")


def _tensors(found: Any) -> Iterator[Tensor]:
    """Yield the tensors of what a layer returned or left in a cache, in their order."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from _tensors(value)
    elif isinstance(found, tuple | list):
        for value in found:
            yield from _tensors(value)


# ------------------------------------------------------------------ the size of a memory


def _measured(layer: nn.Module, width: int, seq_len: int) -> int | None:
    """Count what a layer carries past `seq_len` tokens, where it tells; None where it does not.

    Beyond the second of two lengths it is continued as it grew between them.
    """
    short, long = (min(seq_len, n) for n in _MEASURED_AT)
    layer = copy.deepcopy(layer).eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            first, second = (_carried(layer, width, n) for n in (short, long))
    except Exception:  # a cache of another kind than we know
        return None
    if first is None or second is None:
        return None
    return second if seq_len <= long else second + (second - first) * (seq_len - long) // (long - short)


def _carried(layer: nn.Module, width: int, length: int) -> int | None:
    p = next(layer.parameters(), torch.zeros(()))
    x = torch.zeros(1, length, width, dtype=p.dtype, device=p.device)
    if isinstance(layer, nn.RNNBase):
        return sum(t.numel() for t in _tensors(layer(x)[1]))
    accepted = inspect.signature(layer.forward).parameters
    slot = next((name for name in _CACHES if name in accepted), None)
    packages = [base.__module__.partition(".")[0] for base in type(layer).__mro__]
    package = next((p for p in packages if p in ("transformers", "fla")), None)
    if slot is None or package is None:
        return None
    if package == "fla":
        cache = importlib.import_module("fla.models.utils").Cache()
        layer(x, use_cache=True, **{slot: cache})
    else:
        cache = importlib.import_module("transformers").DynamicCache(config=layer.__dict__["configuration_given"])
        layer(x, **{slot: cache})
    held = list(_held(cache))
    return sum(t.numel() for t in held) if held else None


def _held(cache: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors of a cache, each once, wherever its objects keep them."""
    seen = set() if seen is None else seen
    if id(cache) in seen:
        return
    seen.add(id(cache))
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, Mapping):
        for value in cache.values():
            yield from _held(value, seen)
    elif isinstance(cache, tuple | list):
        for value in cache:
            yield from _held(value, seen)
    elif hasattr(cache, "__dict__") and not inspect.isclass(cache):
        yield from _held(vars(cache), seen)
