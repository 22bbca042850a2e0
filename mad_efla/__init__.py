"""mad-efla: find out, cheaply and honestly, what a sequence mixer can do.

Data flows one way::

    tasks/*.yaml + sweeps/*.yaml + --set -> config -> sweep -> [RunConfig]
    RunConfig -> plugins -> Task, Mixer -> data, model -> train -> store (runs/<fingerprint>/)
    runs/ -> tracking (MLflow)      runs/ -> scores -> tables
"""

from importlib.metadata import version

__version__ = version("mad-efla")
