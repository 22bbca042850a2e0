"""mad-efla: find out, cheaply and honestly, what a sequence mixer can do.

In Python::

    import mad_efla as mad

    runs = mad.sweep("recall", mixers=["efla", "deltanet"])   # a second call trains nothing
    runs                                                      # the verdict and the table
    runs.frame()                                              # pandas: a row a run

Data flows one way::

    tasks/*.yaml + sweeps/*.yaml + --set -> plan -> [RunConfig]
    RunConfig -> plugins -> Task, Mixer -> training -> runs/<fingerprint>/
    runs/ -> analysis -> reporting      runs/ -> spectrum      runs/ -> tracking (MLflow)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import version

    from mad_efla import plot as plot
    from mad_efla.api.functions import check, data, dry_run, load, mixer, sweep, task
    from mad_efla.api.runs import Run, Runs
    from mad_efla.config import ConfigError
    from mad_efla.mixers import Mixer
    from mad_efla.tasks import Task

    __version__ = version("mad-efla")

_PLACES = {
    "mad_efla.api.functions": ("check", "data", "dry_run", "load", "mixer", "sweep", "task"),
    "mad_efla.api.runs": ("Run", "Runs"),
    "mad_efla.config": ("ConfigError",),
    "mad_efla.mixers": ("Mixer",),
    "mad_efla.tasks": ("Task",),
}
_NAMES = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "ConfigError",
    "Mixer",
    "Run",
    "Runs",
    "Task",
    "check",
    "data",
    "dry_run",
    "load",
    "mixer",
    "plot",
    "sweep",
    "task",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: `import mad_efla` alone takes neither torch nor time."""
    if name == "__version__":
        from importlib.metadata import version

        return version("mad-efla")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name == "plot":
        return importlib.import_module("mad_efla.plot")
    raise AttributeError(f"module 'mad_efla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
