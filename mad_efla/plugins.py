"""From a name to the class it means: a module of ours, or `package.module:Name` of the user's own.

There is no registry to edit: the built-in task `recall` is the one `Task` that
`mad_efla/tasks/recall.py` defines, the mixer `efla` the `Mixer` of `mad_efla/mixers/efla.py`.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from pathlib import Path
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


def source_digest(name: str) -> str:
    """Return a digest of a plug-in's source: its module and what that imports from its own tree.

    Files count in the order of their paths below the tree's folder, so a tree may be moved. What
    is installed (site-packages, the standard library, this package) is no part of it.

    Args:
        name: `package.module:Name`.

    Raises:
        ConfigError: There is no source to be had.
    """
    module_name = name.partition(":")[0]
    path = _source(module_name)
    if path is None:
        raise ConfigError(
            f"plug-in {name!r} has no source file to tell its versions apart by; define it in a "
            "module, a .py file that can be imported"
        )
    depth = module_name.count(".") + (path.name == "__init__.py")
    root = path.resolve().parents[depth]
    files: dict[Path, str] = {}
    waiting = [(path.resolve(), module_name)]
    while waiting:
        path, module_name = waiting.pop()
        if path in files:
            continue
        text = path.read_bytes()
        files[path] = hashlib.sha256(text).hexdigest()
        for imported in _imports(text, module_name, path.name == "__init__.py"):
            found = _source(imported)
            if found is not None and _belongs(found.resolve(), root):
                waiting.append((found.resolve(), imported))
    lines = [f"{p.relative_to(root).as_posix()} {sha}" for p, sha in sorted(files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


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
        raise ConfigError(f"{kind} {name!r}: {error}; write it as package.module:Name, importable from here") from error
    except Exception as error:  # whatever the module does while it is imported
        raise ConfigError(f"{kind} {name!r}: importing it raises {type(error).__name__}: {error}; mend it") from error
    if not (inspect.isclass(found) and issubclass(found, contract)):
        bases = contract if isinstance(contract, tuple) else (contract,)
        wanted = " or ".join(base.__name__ for base in bases)
        raise ConfigError(f"{kind} {name!r} must be a class derived from {wanted}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(vars(found)["__abstractmethods__"]))
        raise ConfigError(f"{kind} {name!r} has to define {missing}; see CONTRIBUTING.md")
    return found


def _source(module_name: str) -> Path | None:
    """Find a module's .py file; importing its packages, not itself, unless it is there already."""
    found = sys.modules.get(module_name)
    try:
        spec = found.__spec__ if found else importlib.util.find_spec(module_name)
    except (ImportError, AttributeError, ValueError):
        return None
    place = getattr(found, "__file__", None) or (spec.origin if spec else None)
    if place is None or not place.endswith(".py") or not Path(place).is_file():
        return None
    return Path(place)


def _belongs(path: Path, root: Path) -> bool:
    installed = {"site-packages", "dist-packages"} & set(
        path.relative_to(root).parts if path.is_relative_to(root) else ["site-packages"]
    )
    ours = Path(__file__).resolve().parent
    return not installed and not path.is_relative_to(ours)


def _imports(source: bytes, module_name: str, is_package: bool) -> list[str]:
    """List the modules that a source imports anywhere, those it may mean included."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    package = module_name if is_package else module_name.rpartition(".")[0]
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found += _prefixes(alias.name)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            if node.level:
                try:
                    name = importlib.util.resolve_name(name, package)
                except ImportError:
                    continue
            found += _prefixes(name)
            found += [f"{name}.{alias.name}" for alias in node.names]  # may be modules, too
    return found


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]
