"""Shapes in annotations are checked while testing; nothing here touches the network."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)  # before anything computes: equal bits need equal threads
os.environ["COLUMNS"] = "140"

# Not what numba and triton compile: they take no function that was wrapped.
_COMPILED = ("lanes", "blocks", "loops", "unit_key_loops", "triton")
_KERNELS = Path(__file__).parents[1] / "kernels"
_WITH_SHAPES = (
    *(
        ".".join(path.relative_to(_KERNELS).with_suffix("").parts)
        for path in sorted((_KERNELS / "mad_kernels").rglob("[!_]*.py"))
        if path.stem not in _COMPILED
    ),
    "mad_efla.mixers",
    "mad_efla.tasks",
    "mad_efla.training.model",
    "mad_efla.training.metrics",
    "mad_efla.spectrum",
)
install_import_hook(list(_WITH_SHAPES), "beartype.beartype")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Run every test in a folder of its own, with no store or backend from outside."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MAD_EFLA_EXPERIMENT_PREFIX", "MAD_KERNELS_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path):
    """A folder with a tiny task and plan."""
    from tests.tiny import write_files  # only now: what it imports must meet the hook above

    write_files(tmp_path)
    return tmp_path
