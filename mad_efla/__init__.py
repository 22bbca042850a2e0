"""mad-efla: find out, cheaply and honestly, what a sequence mixer can do.

Data flows one way::

    tasks/*.yaml + sweeps/*.yaml + --set -> plan -> [RunConfig]
    RunConfig -> plugins -> Task, Mixer -> training -> runs/<fingerprint>/
    runs/ -> analysis -> reporting      runs/ -> spectrum      runs/ -> tracking (MLflow)
"""

from importlib.metadata import version

__version__ = version("mad-efla")
