"""What this machine is."""

import pytest
import torch

from mad_efla.config import ConfigError
from mad_efla.execution import machine


def test_cuda_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device; use --device cpu"):
        machine.resolve_device("cuda")
    assert machine.resolve_device("auto") == "cpu"


def test_auto_precision_is_bfloat16_only_where_the_cpu_has_it(monkeypatch):
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(machine, "_cpu_has_bfloat16", lambda has=has: has)
        assert machine.resolve_precision("cpu") == expected


def test_the_environment_names_versions_and_commit():
    found = machine.environment("cpu")
    assert found["torch"] == torch.__version__
    assert found["git_commit"]
