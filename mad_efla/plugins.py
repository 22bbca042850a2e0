"""From a name to the class it means: a module of ours, or `package.module:Name` of the user's own.

There is no registry to edit: the built-in task `recall` is the one `Task` that
`mad_efla/tasks/recall.py` defines, the mixer `efla` the `Mixer` of `mad_efla/mixers/efla.py`.
A mixer of the user's own need not be a `Mixer`: any `nn.Module` is made one, see `mixers/_guest.py`.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

import mad_efla.mixers
import mad_efla.tasks
from mad_efla.config import ConfigError, suggest
from mad_efla.mixers import Mixer
from mad_efla.mixers._guest import adopt, reason
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
    """Return the mixer class called `name`; a layer of somebody else's is made one.

    Raises:
        ConfigError: There is none, or it is no mixer and no module that can be made one.
    """
    if ":" not in name:
        return _find(name, "mixer", mad_efla.mixers, Mixer)
    return _mixer_of(name, "mixer", _imported(name, "mixer"))


def either(name: str) -> type[Task] | type[Mixer]:
    """Return the task or mixer class called `name`.

    Raises:
        ConfigError: There is none, or it is neither.
    """
    if ":" in name:
        found = _imported(name, "plug-in")
        own = inspect.isclass(found) and issubclass(found, Task)
        return _concrete(name, "plug-in", found) if own else _mixer_of(name, "plug-in", found)
    known = [*names(mad_efla.tasks), *names(mad_efla.mixers)]
    if name not in known:
        raise ConfigError(f"{name!r} is no task and no mixer{suggest(name, known)}")
    return task(name) if name in names(mad_efla.tasks) else mixer(name)


def source_digest(name: str) -> str:
    """Return a digest of a plug-in's source: its module and what that imports from its own tree.

    Files count in the order of their paths below the tree's folder, so a tree may be moved. What
    is installed (site-packages, the standard library, this package) is no part of it; an installed
    plug-in is known by its own file and its distribution's version.

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
    if root.name in _INSTALLED:
        lines = [hashlib.sha256(path.read_bytes()).hexdigest(), *_versions(module_name.partition(".")[0])]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
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
        found = _imported(name, kind)
        if not (inspect.isclass(found) and issubclass(found, contract)):
            raise ConfigError(f"{kind} {name!r} must be a class derived from {contract.__name__}")
        return _concrete(name, kind, found)
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


def _mixer_of(name: str, kind: str, found: Any) -> type[Mixer]:
    """Take a mixer as it is, and make one of any other module."""
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        what = "an instance" if isinstance(found, nn.Module) else f"a {type(found).__name__}"
        what = f"the class {found.__name__}" if inspect.isclass(found) else what
        wanted = "Task or torch.nn.Module" if kind == "plug-in" else "torch.nn.Module"
        raise ConfigError(f"{kind} {name!r} is {what}; it must be a class derived from {wanted}")
    if issubclass(found, Mixer):
        return _concrete(name, kind, found)
    if not any("forward" in vars(base) for base in found.__mro__ if base is not nn.Module):
        raise ConfigError(f"{kind} {name!r} has to define forward(x), x being [B, L, D]; see CONTRIBUTING.md")
    try:
        return adopt(name, found)
    except ValueError as error:
        raise ConfigError(f"{kind} {name!r}: {error}") from error


def _concrete(name: str, kind: str, found: type) -> type:
    if inspect.isabstract(found):
        missing = ", ".join(sorted(vars(found)["__abstractmethods__"]))
        raise ConfigError(f"{kind} {name!r} has to define {missing}; see CONTRIBUTING.md")
    return found


_COMES_WITH = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm"}


def _imported(name: str, kind: str) -> Any:
    """Import what `package.module:Name` names.

    Raises:
        ConfigError: It cannot be imported, whatever its module does when it is; or is not in there.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        cure = "write it as package.module:Name, importable from here"
        if package in _COMES_WITH:
            cure = f"it comes with {_COMES_WITH[package]}: pip install {_COMES_WITH[package]}"
        elif error.name and not f"{module_name}.".startswith(f"{error.name}."):
            cure = f"{module_name} imports it: pip install what it comes with"
        raise ConfigError(f"{kind} {name!r}: {error}; {cure}") from error
    except SyntaxError as error:
        raise ConfigError(f"{kind} {name!r}: {error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:  # a module may do anything
        raise ConfigError(f"{kind} {name!r}: importing {module_name} fails: {reason(error)}") from error
    if not hasattr(module, attribute):
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, (nn.Module, Task))]
        raise ConfigError(f"{kind} {name!r}: {module_name} has no {attribute!r}{suggest(attribute, classes)}")
    return getattr(module, attribute)


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


_INSTALLED = {"site-packages", "dist-packages"}


@functools.cache
def _versions(package: str) -> list[str]:
    """List name and version of what an installed package comes with, less the kind of build (+cpu)."""
    try:
        names = [metadata.distribution(package).name]
    except metadata.PackageNotFoundError:  # its name is another one; to look through all takes a while
        names = sorted(set(metadata.packages_distributions().get(package, [])))
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


def _belongs(path: Path, root: Path) -> bool:
    installed = _INSTALLED & set(path.relative_to(root).parts if path.is_relative_to(root) else ["site-packages"])
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
