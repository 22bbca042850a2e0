"""A run's trained model as MLflow keeps models: `mlflow.pytorch.load_model("models:/<id>")`.

MLflow pickles the module, so whoever loads it needs mad-efla, and trusts the store. The weights are
those that were scored; the tag `mad.model` of the run says that its model is there.
"""

import tempfile
import warnings
from importlib import metadata

import torch

from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder
from mad_efla.tracking.entry import Entry
from mad_efla.training import model


def log(entry: Entry, experiment_id: str, run: RunConfig, folder: RunFolder) -> None:
    """Log a finished run's model, once; a run whose weights are gone has none."""
    if "mad.model" in entry.tags or entry.deleted or not (folder.path / "model.pt").exists():
        return
    from mlflow.entities import LoggedModelOutput

    built = model.build(run)
    built.load_state_dict(folder.load_model())
    client = entry.client
    logged = client.create_logged_model(
        experiment_id,
        name=run.mixer,
        source_run_id=entry.run_id,
        tags={"mad.fingerprint": run.fingerprint},
        params={"mixer": run.mixer, "setting": run.setting, "seed": str(run.seed)},
        model_type=run.task.backbone,
    )
    try:
        with tempfile.TemporaryDirectory() as folder_name:
            _save(built.eval(), f"{folder_name}/model", run)
            client.log_model_artifacts(logged.model_id, f"{folder_name}/model")
    except Exception:
        client.delete_logged_model(logged.model_id)  # it is logged again, whole
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(entry.run_id, [LoggedModelOutput(logged.model_id, 0)])
    entry.tag({"mad.model": logged.model_id})


def _save(built: torch.nn.Module, path: str, run: RunConfig) -> None:
    from mlflow.pytorch import save_model

    packages = ("mad-efla", "torch")
    needs = [f"{name}=={metadata.version(name).split('+')[0]}" for name in packages]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a pickle: said above, and in REFERENCE.md
        save_model(
            built,
            path,
            pip_requirements=needs,
            metadata={"fingerprint": run.fingerprint},
            serialization_format="pickle",
        )
