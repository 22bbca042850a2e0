"""The fields of a run as plans and `--set` name them, and what a name can mean.

    optim.lr                 a field of a section: task, data, model, optim, train
    mixers.heads             a field of every mixer of the plan that has it
    mixers.efla.heads        a field of the mixers of that name
    mixers[0].heads          a field of the plan's first mixer

Whatever stands under a name that means nothing would be ignored, so it is refused with the nearest
name that there is.
"""

import re
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

import mad_efla.tasks
from mad_efla import plugins
from mad_efla.config import ConfigError, suggest
from mad_efla.mixers import MixerConfig
from mad_efla.plan.run import DataConfig, ModelConfig, OptimConfig, TrainConfig
from mad_efla.tasks import Task

SECTIONS: dict[str, type[BaseModel]] = {
    "task": Task,  # of whichever class the task file names
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}
_ELSEWHERE = {
    "seed": "seeds are listed in `seeds`, as in seeds=[3]",
    "seeds": "it belongs to the plan, beside its grid",
    "setting": "settings are picked by `settings`, as in settings=hard",
    "settings": "it belongs to the plan, beside its grid",
    "protocol": "it belongs to the plan, beside its grid",
    "mixers": "it would take the place of the plan's own mixers; list all under `mixers`, or name a field "
    "of theirs, as in mixers.efla.heads",
    "task.name": "it belongs to the task file; sweep the other task by its name",
}


class Change(NamedTuple):
    """A field and the value it takes.

    Attributes:
        field: A dotted name, or an address of mixers.
        value: Its value; of a whole section a mapping.
        place: Where it was written.
    """

    field: str
    value: Any
    place: str

    def leaves(self) -> list[str]:
        """Return the dotted names that get a value: of a section's mapping, those in it."""
        if self.field in SECTIONS and isinstance(self.value, dict):
            return [f"{self.field}.{key}" for key in self.value]
        return [self.field]


class Address(NamedTuple):
    """A field of some of a plan's mixers.

    Attributes:
        which: A mixer's name or its number in the plan; empty for all that have the field.
        field: The field's name.
    """

    which: str
    field: str

    @classmethod
    def read(cls, text: str) -> "Address | None":
        """Read `mixers.heads`, `mixers.efla.heads` or `mixers[0].heads`; None for anything else."""
        found = re.fullmatch(r"mixers(?:\[(\d+)\]|\.(.+?))?\.(\w+)", text)
        return cls(found[1] or found[2] or "", found[3]) if found else None

    def parts(self, index: int, entry: Any) -> list[int]:
        """Return which parts of an entry of `mixers` are meant: of a hybrid several, or none.

        Args:
            index: The entry's number in the plan.
            entry: A name, a mapping with `name`, or a list of them.
        """
        found = []
        for number, part in enumerate(entry if isinstance(entry, list) else [entry]):
            name = entry_name(part)
            config = _config(name)
            if config and self.field in _own(config) and self.which in ("", name, str(index)):
                found.append(number)
        return found

    def put(self, index: int, entry: Any, value: Any) -> Any:
        """Return an entry of `mixers` with the field set where it is meant."""
        parts = list(entry) if isinstance(entry, list) else [entry]
        for number in self.parts(index, entry):
            part = parts[number]
            parts[number] = ({"name": part} if isinstance(part, str) else part) | {self.field: value}
        return parts if isinstance(entry, list) else parts[0]

    def check(self, mixers: list[Any], text: str, place: str) -> None:
        """Refuse an address that means no mixer of a plan, with those that there are.

        Args:
            mixers: The plan's entries.
            text: The address as it was written.
            place: Where.
        """
        if any(self.parts(index, entry) for index, entry in enumerate(mixers)):
            return
        names = dict.fromkeys(
            entry_name(part) for entry in mixers for part in (entry if isinstance(entry, list) else [entry])
        )
        if self.which.isdecimal() and int(self.which) >= len(mixers):
            raise ConfigError(f"{place}: {text}: the plan has {len(mixers)} mixers, 0 to {len(mixers) - 1}")
        if self.which and not self.which.isdecimal() and self.which not in names:
            raise ConfigError(f"{place}: {text}: the plan has no mixer {self.which}{suggest(self.which, list(names))}")
        if self.which:
            own = mixers[int(self.which)] if self.which.isdecimal() else self.which
            names = dict.fromkeys(entry_name(part) for part in (own if isinstance(own, list) else [own]))
        had = {name: _own(config) for name in names if (config := _config(name))}
        listed = ". ".join(f"{name} has {', '.join(fields) or 'none'}" for name, fields in had.items())
        raise ConfigError(f"{place}: {text}: no mixer that is meant has a field {self.field}. {listed}")


def entry_name(entry: Any) -> str:
    """Name an entry of `mixers` as `per_mixer` does: `efla`, `attention+efla`."""
    parts = entry if isinstance(entry, list) else [entry]
    return "+".join(str(p.get("name") if isinstance(p, dict) else p) for p in parts)


def check(field: str, task: str, place: str) -> None:
    """Refuse a dotted name that is no field of a section of a run.

    Args:
        field: As it was written: `optim.lr`, or a whole section.
        task: The name of the task whose fields `task.` means.
        place: Where it was written.

    Raises:
        ConfigError: With the nearest name that there is, or where such a thing is said.
    """
    section, _, key = field.partition(".")
    if not all(field.split(".")):
        raise ConfigError(f"{place}: {field!r} is no field; write it as `optim.lr`")
    if field in _ELSEWHERE:
        raise ConfigError(f"{place}: {field} is no field of a run; {_ELSEWHERE[field]}")
    if section not in SECTIONS:
        fields = [f"{name}.{field}" for name, model in SECTIONS.items() if field in _own(model)]
        fields += [f"task.{field}"] if field in _own(plugins.task(task)) else []
        known = f"; did you mean {fields[0]!r}?" if fields else suggest(section, [*SECTIONS])
        raise ConfigError(f"{place}: {section}: unknown key{known}")
    model = plugins.task(task) if section == "task" else SECTIONS[section]
    first = key.partition(".")[0]
    if key and first not in _own(model):
        raise ConfigError(f"{place}: {field}: unknown key{suggest(first, _own(model))}")


def check_any(field: str, task: str, mixers: list[Any], place: str) -> None:
    """As `check`, for a name that may be an address of the plan's mixers, too."""
    address = Address.read(field)
    if address:
        address.check(mixers, field, place)
    else:
        check(field, task, place)


def check_all(fields: Mapping[str, Any], task: str, place: str) -> None:
    """As `check`, for each key of a mapping, in which a section may hold a mapping of its own."""
    for field, value in fields.items():
        check(field, task, place)
        check_inside(field, value, task, place)


def check_inside(field: str, value: Any, task: str, place: str) -> None:
    """Check the keys of a section's mapping, where a field is a whole section."""
    if field in SECTIONS and isinstance(value, dict):
        for key in value:
            check(f"{field}.{key}", task, place)


def check_task(name: str, own: str, what: str, place: str) -> None:
    """Refuse a key of `settings` or `per_task` that is the name of no task.

    Args:
        name: The key.
        own: The name of the task that is swept.
        what: The mapping that holds the key.
        place: Where it was written.
    """
    known = plugins.names(mad_efla.tasks)
    try:
        if name != own:
            plugins.task(name)
    except ConfigError as error:
        reason = str(error) if ":" in name else f"no such task{suggest(name, known)}"
        raise ConfigError(f"{place}: {what}.{name}: {reason}") from None


def holds_lists(field: str, task: str, mixers: list[Any]) -> bool:
    """Tell whether a list can be one value of a field; if not, a list is several values.

    Args:
        field: A dotted name that `check` or `Address.check` found good.
        task: The task's name.
        mixers: The plan's entries.
    """
    address = Address.read(field)
    if address:
        entry = next(e for i, e in enumerate(mixers) if address.parts(i, e))
        number = address.parts(mixers.index(entry), entry)[0]
        model: Any = _config(entry_name(entry[number] if isinstance(entry, list) else entry))
        key = address.field
    else:
        section, _, key = field.partition(".")
        model = plugins.task(task) if section == "task" else SECTIONS[section]
    info = model.model_fields.get(key)
    return info is None or _takes_list(info.annotation)


def _takes_list(annotation: Any) -> bool:
    if annotation is Any or annotation in (list, tuple, dict):
        return True
    origin = typing.get_origin(annotation)
    if origin in (list, tuple, dict):
        return True
    return origin is not typing.Literal and any(map(_takes_list, typing.get_args(annotation)))


def _own(model: type[BaseModel]) -> list[str]:
    return [name for name in model.model_fields if name != "name"]


def _config(name: str) -> type[MixerConfig] | None:
    """Return the class of a mixer's fields; None if there is no such mixer, which is said elsewhere."""
    try:
        return plugins.mixer(name).Config
    except ConfigError:
        return None
