"""Stores for tests, migrated once."""

import shutil
import warnings

import pytest

from mad_efla import tracking


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A store migrated once; tests copy it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's dependencies, while they are imported
        folder = tmp_path_factory.mktemp("template")
        report = tracking.sync(f"sqlite:///{folder}/mlflow.db", folder / "runs")
    assert report.problem is None
    return folder / "mlflow.db"


@pytest.fixture
def uri(template, tmp_path):
    shutil.copy(template, tmp_path / "mlflow.db")
    return tracking.resolve_uri(None)


@pytest.fixture
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
