"""Strict configuration: a YAML file, and the place of every value in it.

A file is read into a `Document`: plain data and, for every path in it, the file and line that set
it. Documents merge (later wins) and keep their places, so that whatever is wrong in the end is
reported where somebody wrote it: `tasks/recall.yaml:4: task.seq_len=127 must be even: ...`.

YAML is 1.2 (`1e-3` is a number, `off` a word), a repeated key is an error, and tags, anchors and
oversized files are refused before anything is built from them.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_FILE_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_NODES = 20_000
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}

KeyPath = tuple[str | int, ...]
SectionT = TypeVar("SectionT", bound="Section")


class ConfigError(Exception):
    """Something the user wrote cannot be run; the text holds place, value, rule and cure."""


class Section(BaseModel):
    """A frozen part of a configuration: unknown keys and lax conversions are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Document:
    """Plain data and where each part of it was written.

    Attributes:
        data: Nested dicts, lists and scalars.
        places: For each key path in `data`, the place that set it, such as `plan.yaml:7`.
        name: What to call the document where no nearer place is known.
    """

    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)
    name: str = "configuration"

    def place(self, path: KeyPath) -> str:
        """Return the nearest known place of `path`: its own, else that of what holds it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.name

    def part(self, *path: str) -> "Document":
        """Return the mapping at `path` as a document of its own; a missing one is empty."""
        data: Any = self.data
        for key in path:
            data = data.get(key, {}) if isinstance(data, dict) else {}
        if not isinstance(data, dict):
            raise ConfigError(f"{self.place(path)}: {dotted(path)}={data!r} must be a mapping of fields to values")
        depth = len(path)
        places = {p[depth:]: place for p, place in self.places.items() if p[:depth] == path}
        return Document(data, {(): self.place(path)} | places, self.name)

    def without(self, *keys: str) -> "Document":
        """Return the document less its top-level `keys`."""
        data = {k: v for k, v in self.data.items() if k not in keys}
        return Document(data, {p: w for p, w in self.places.items() if p[:1] != keys}, self.name)


def dotted(path: KeyPath) -> str:
    """Write a key path as users do: `optim.lr`, `mixers[2].heads`."""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.removeprefix(".")


def suggest(word: str, known: list[str]) -> str:
    """Return `; did you mean 'x'?` for a near miss, else the choices there are."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


# ------------------------------------------------------------------ reading


def find(name: str, kind: str) -> Path:
    """Resolve what the user typed to a YAML file.

    A file from the working directory comes first, then a shipped preset of that name, which a folder,
    such as one of runs, does not hide.

    Args:
        name: A path, or the bare name of a preset (`recall`, `quick`).
        kind: `tasks` or `sweeps`.

    Raises:
        ConfigError: Neither exists, or the path is a directory.
    """
    path = Path(name)
    try:
        if path.is_file():
            return path
        is_folder = path.is_dir()
    except OSError as error:
        raise ConfigError(f"{name[:80]}: {error.strerror or error}") from None
    shipped = {p.stem: p for p in presets(kind)}
    if re.fullmatch(rf"(?:{kind}/)?[\w-]+(?:\.yaml)?", name) and path.stem in shipped:
        return shipped[path.stem]  # a folder of that name, such as one of runs, hides nothing
    if is_folder:
        raise ConfigError(f"{name}: is a directory; name a YAML file in it")
    what = {"tasks": "task", "sweeps": "plan"}[kind]
    raise ConfigError(
        f"{name[:80]}: no such file, and no shipped {what} of that name" + suggest(path.stem, list(shipped))
    )


def presets(kind: str) -> list[Path]:
    """List the YAML files shipped with the package: `tasks` or `sweeps`."""
    packaged = Path(str(resources.files("mad_efla"))) / "presets" / kind
    checkout = Path(__file__).parent.parent / kind  # an editable install has no copy of its own
    return sorted((packaged if packaged.is_dir() else checkout).glob("*.yaml"))


def read(path: Path) -> Document:
    """Read a YAML file into a document.

    Raises:
        ConfigError: It cannot be read, is empty, no mapping, or not plain YAML.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_FILE_BYTES // 1024} KiB; split it")
    document = _parse(text, str(path))
    if document is None:
        raise ConfigError(f"{path}: is empty; see `mad-efla list` for shipped examples")
    return document


def _parse(text: str, name: str) -> Document | None:
    yaml = YAML(typ="safe", pure=True)
    try:
        _check_events(yaml, text, name)
        node = YAML(typ="safe", pure=True).compose(text)
        if node is None:
            return None
        places: dict[KeyPath, str] = {}
        _check_node(node, (), places, name)
        if not isinstance(node, MappingNode):
            raise ConfigError(f"{name}:1: must be a mapping of fields to values")
        data = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = str(error.problem or error.context).splitlines()[0]
        raise ConfigError(f"{name}{line}: not valid YAML: {problem}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    return Document(data, places, name)


def _check_events(yaml: YAML, text: str, name: str) -> None:
    """Refuse, before anything is built, what a configuration never needs."""
    depth = 0
    for count, event in enumerate(yaml.parse(text)):
        place = f"{name}:{event.start_mark.line + 1}"
        kind = type(event).__name__
        if kind == "AliasEvent" or getattr(event, "anchor", None):
            raise ConfigError(f"{place}: anchors and aliases are refused; write the value out")
        if kind in ("MappingStartEvent", "SequenceStartEvent"):
            depth += 1
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{place}: nested deeper than {MAX_DEPTH} levels; flatten it")
        if count > MAX_NODES:
            raise ConfigError(f"{place}: more than {MAX_NODES} entries; split the file")


def _check_node(node: Node, path: KeyPath, places: dict[KeyPath, str], name: str) -> None:
    """Record the place of every path below `node`; refuse tags and keys that are no words."""
    place = f"{name}:{node.start_mark.line + 1}"
    if str(node.tag) not in _PLAIN_TAGS:
        raise ConfigError(f"{place}: tag {node.tag} is refused; write a plain value")
    places.setdefault(path, place)
    if isinstance(node, MappingNode):
        for key, value in node.value:
            where = f"{name}:{key.start_mark.line + 1}"
            if not isinstance(key, ScalarNode) or str(key.tag) != "tag:yaml.org,2002:str":
                raise ConfigError(f"{where}: a key must be a word")
            places[(*path, key.value)] = where
            _check_node(value, (*path, key.value), places, name)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            _check_node(value, (*path, index), places, name)


# ------------------------------------------------------------------ combining


def merge(first: Document, *others: Document) -> Document:
    """Lay documents over each other: mappings merge, anything else is replaced."""
    for second in others:
        data, places = dict(first.data), dict(first.places)
        _merge(data, places, second, (), second.data)
        first = Document(data, places, first.name)
    return first


def _merge(into: dict[str, Any], places: dict[KeyPath, str], doc: Document, path: KeyPath, data: dict) -> None:
    for key, value in data.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            into[key] = dict(into[key])
            _merge(into[key], places, doc, here, value)
            continue
        into[key] = value
        for old in [p for p in places if p[: len(here)] == here]:
            del places[old]
        places[here] = doc.place(here)
        below = {p: w for p, w in doc.places.items() if p[: len(here)] == here}
        places.update(below)


def from_paths(values: dict[str, Any], place: str) -> Document:
    """Build a document from dotted paths, `{"optim.lr": 0.001}`, all written at `place`."""
    document = Document({}, {(): place}, place)
    for name, value in values.items():
        document = merge(document, from_path(tuple(name.split(".")), value, place))
    return document


def from_path(path: tuple[str, ...], value: Any, place: str) -> Document:
    """Build a document that holds one value, written at `place`."""
    if not all(path):
        raise ConfigError(f"{place}: {'.'.join(path)!r} is no field; write it as `optim.lr`")
    data = value
    for key in reversed(path):
        data = {key: data}
    return Document(data, {path[:end]: place for end in range(len(path) + 1)}, place)


def assignment(text: str, option: str = "--set") -> tuple[str, Any]:
    """Read `optim.lr=0.003` as given to `--set`, or to another option; the value is YAML.

    Raises:
        ConfigError: There is no `=`, or the value is not plain YAML.
    """
    path, sign, value = text.partition("=")
    if not sign or not path.strip():
        raise ConfigError(f"{option} {text}: must read FIELD=VALUE, as in optim.lr=0.003")
    document = _parse(f"value: {value}", f"{option} {text}")
    assert document is not None
    return path.strip(), document.data["value"]


# ------------------------------------------------------------------ checking


def validate(model: type[SectionT], document: Document, prefix: str = "") -> SectionT:
    """Build `model` from a document.

    Args:
        model: The frozen model to build.
        document: Its data; places are used for errors only.
        prefix: Where the section sits, as users write it (`task`), for messages.

    Raises:
        ConfigError: One line for each thing that is wrong.
    """
    try:
        # JSON mode: a list is a tuple and 1 is 1.0, yet "1" is no number.
        found = model.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        lines = [_explain(e, model, document, prefix) for e in error.errors()]
    except (TypeError, ValueError) as error:
        lines = [f"{document.place(())}: {error}"]
    else:
        lines = [_explain_unplain(path, value, model, document, prefix) for path, value in _unplain(found)]
        if not lines:
            return found
    raise ConfigError("\n".join(dict.fromkeys(lines)))


def _unplain(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Find what JSON cannot hold, and so no record of a configuration."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _unplain(getattr(value, name), (*path, name))
    elif type(value) is dict and all(type(key) is str for key in value):
        for key, inner in value.items():
            yield from _unplain(inner, (*path, key))
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            yield from _unplain(inner, (*path, index))
    elif not (value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))):
        yield path, value


def _explain_unplain(path: KeyPath, value: Any, model: type[BaseModel], document: Document, prefix: str) -> str:
    shown = f"{prefix}.{dotted(path)}".strip(".")
    return (
        f"{document.place(path)}: {shown}={value!r}: field {path[0]} of class {model.__module__}.{model.__qualname__} "
        f"holds a value of type {type(value).__name__}, which no run's record can hold; give it numbers that are "
        "finite, words, true, false, none, or lists and mappings of them"
    )


def _explain(error: Any, model: type[BaseModel], document: Document, prefix: str) -> str:
    path: KeyPath = tuple(p for p in error["loc"] if isinstance(p, int) or p in _keys(document))
    shown = f"{prefix}.{dotted(path)}".strip(".")
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        return f"{document.place(path)}: {shown}: unknown key{suggest(str(path[-1]), known)}"
    if kind == "missing":
        missing = f"{prefix}.{dotted(error['loc'])}".strip(".")
        return f"{document.place(path)}: {missing} is missing; give it a value"
    if kind == "value_error":  # our own validators: the text opens with the field it is about
        reason = str(error["ctx"]["error"])
        named = re.match(r"(\w+)=", reason)
        if named and named[1] in model.model_fields:
            return f"{document.place((*path, named[1]))}: {prefix}.{reason}".replace(": .", ": ")
        return f"{document.place(path)}: {shown}: {reason}".replace(" : ", " ")
    return f"{document.place(path)}: {shown}={json.dumps(value)}: {_lower(error['msg'])}"


def _keys(document: Document) -> set[str | int]:
    """Every key in the document: what pydantic adds to a location (union tags) is not one."""
    return {key for path in document.places for key in path} | set(document.data)


def _fields_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Name the fields of the section at a path, which may lie in a mapping, a list, or be optional."""
    found = [model]
    for key in path:
        held = [m.model_fields[str(key)].annotation for m in found if key in m.model_fields]
        if held:  # else the key of a mapping, or the number of an entry
            found = [section for annotation in held for section in _sections(annotation)]
    return [name for section in found for name in section.model_fields]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def canonical_json(data: Any) -> str:
    """Write data so that equal configurations give equal text, whatever the order of keys."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(text: str) -> str:
    """Return the 16 hexadecimal digits by which a text is known (SHA-256, cut)."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
