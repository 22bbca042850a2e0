"""From a name to the class it means: a module of ours, or `package.module:Name` of the user's own.

There is no registry to edit: the built-in task `recall` is the one `Task` that
`mad_efla/tasks/recall.py` defines, the mixer `efla` the `Mixer` of `mad_efla/mixers/efla.py`.
"""

import functools
import importlib
import inspect
import pkgutil
from types import ModuleType

import mad_efla.mixers
import mad_efla.tasks
from mad_efla.config import ConfigError, suggest
from mad_efla.mixers import Mixer
from mad_efla.tasks import Task


@functools.cache
def task(name: str) -> type[Task]:
    """Return the task class called `name`.

    Raises:
        ConfigError: There is none, or it is no task.
    """
    return _find(name, "task", mad_efla.tasks, Task)


@functools.cache
def mixer(name: str) -> type[Mixer]:
    """Return the mixer class called `name`.

    Raises:
        ConfigError: There is none, or it is no mixer.
    """
    return _find(name, "mixer", mad_efla.mixers, Mixer)


def either(name: str) -> type[Task] | type[Mixer]:
    """Return the task or mixer class called `name`.

    Raises:
        ConfigError: There is none, or it is neither.
    """
    if ":" in name:
        return _import(name, "plug-in", (Task, Mixer))
    known = [*names(mad_efla.tasks), *names(mad_efla.mixers)]
    if name not in known:
        raise ConfigError(f"{name!r} is no task and no mixer{suggest(name, known)}")
    return task(name) if name in names(mad_efla.tasks) else mixer(name)


def names(package: ModuleType) -> list[str]:
    """List the built-in plug-ins of `mad_efla.tasks` or `mad_efla.mixers`."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")


def _find(name: str, kind: str, package: ModuleType, contract: type) -> type:
    if ":" in name:
        return _import(name, kind, contract)
    known = names(package)
    if name not in known:
        raise ConfigError(f"{kind} {name!r} is unknown{suggest(name, known)}")
    module = importlib.import_module(f"{package.__name__}.{name}")
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, contract) and c.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one {contract.__name__}"
    return found[0]


def _import(name: str, kind: str, contract: type | tuple[type, ...]) -> type:
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{kind} {name!r}: {error}; write it as package.module:Name, importable from here"
        ) from error
    if not (inspect.isclass(found) and issubclass(found, contract)):
        bases = contract if isinstance(contract, tuple) else (contract,)
        wanted = " or ".join(base.__name__ for base in bases)
        raise ConfigError(f"{kind} {name!r} must be a class derived from {wanted}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(vars(found)["__abstractmethods__"]))
        raise ConfigError(f"{kind} {name!r} has to define {missing}; see CONTRIBUTING.md")
    return found
