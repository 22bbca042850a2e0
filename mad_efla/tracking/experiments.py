"""Experiments in MLflow: one per task, found or made, and looked at before training."""

from collections.abc import Iterable
from typing import Any

from mad_efla.config import ConfigError
from mad_efla.tracking import records, stores
from mad_efla.tracking.entry import BATCH, Entry
from mad_efla.tracking.problems import is_refusal, meaning, reason, within

_CHECK_SECONDS = 10.0
_ALL_RUNS = 3  # MLflow's ViewType: deleted ones too


def check(uri: str, tasks: Iterable[str]) -> str | None:
    """Make sure, before training, that a store on another machine will take the runs.

    Args:
        uri: The store, as `resolve_uri` returns it.
        tasks: Names of the tasks, each an experiment.

    Returns:
        A sentence on what is wrong and may pass; None if nothing is.

    Raises:
        ConfigError: What is wrong does not pass by waiting: credentials, rights, address, names.
    """
    if stores.sqlite_path(uri):
        return None
    import mlflow  # noqa: F401  # which takes its time, and is not the store's

    def ask() -> None:
        with stores.mlflow_settings():
            asked = client(uri)
            for task in tasks:
                identify(asked, uri, task)

    try:
        within(_CHECK_SECONDS, ask)
    except Exception as error:
        found = meaning(error, uri)
        if found.passing:
            return found.sentence
        raise ConfigError(f"{found.sentence}; --no-tracking trains without MLflow") from None
    return None


def client(uri: str) -> Any:
    """Return MLflow's client of a store, which is made if it is local and not there."""
    path = stores.sqlite_path(uri)
    if path:
        stores.prepare(path)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def identify(client: Any, uri: str, task: str) -> str:
    """Find or make a task's experiment; return its id.

    Raises:
        stores.Problem: It was deleted, or its name is refused.
    """
    name = stores.experiment_name(task)
    found = client.get_experiment_by_name(name)
    if found is None:
        return _create(client, uri, task, name)
    if found.lifecycle_stage == "deleted":
        raise stores.Problem(
            f"MLflow experiment {name!r} is deleted; `mlflow experiments restore "
            f"--experiment-id {found.experiment_id}` brings it back"
        )
    return found.experiment_id


def _create(client: Any, uri: str, task: str, name: str) -> str:
    hosted = stores.is_server(uri) or uri.startswith("databricks")
    local = None if hosted else str(stores.artifacts(uri) / task)
    tags = {
        records.NOTE: records.EXPERIMENT_NOTE.format(task=task),
        "mlflow.experimentKind": "custom_model_development",
    }
    try:
        return client.create_experiment(name, artifact_location=local, tags=tags)
    except Exception as error:
        if not is_refusal(error):
            raise
        found = client.get_experiment_by_name(name)
        if found:  # another process was first
            return found.experiment_id
        raise stores.Problem(
            f"MLflow at {stores.without_password(uri)} refuses the experiment name {name!r} "
            f"({reason(error)}); --experiment-prefix begins names as it wants them, for example "
            "--experiment-prefix /Users/me@example.org/"
        ) from None


def runs(client: Any, experiment_id: str, where: str = "") -> list[Entry]:
    """Return the runs of an experiment, deleted ones too.

    Args:
        client: MLflow's client.
        experiment_id: Which experiment.
        where: A filter in MLflow's language.
    """
    found, token = [], ""
    while token is not None:
        page = client.search_runs([experiment_id], where, _ALL_RUNS, max_results=BATCH, page_token=token or None)
        found += [Entry.of(client, run) for run in page]
        token = page.token or None
    return found
