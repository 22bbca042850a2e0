"""What is asked of an executor is checked before the first run."""

import sys

import pytest
import torch

from mad_efla.config import ConfigError
from mad_efla.execution import executors


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named_with_its_cure(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"mad_efla.execution.{name}", raising=False)
    with pytest.raises(ConfigError, match=rf"--executor {name}: .*'mad-efla\[{name}\]"):
        executors.choose(name)


def test_runs_share_a_gpu_only_where_there_is_one(monkeypatch):
    with pytest.raises(ConfigError, match=r"--per-device 2: .* the device is cpu; use --workers"):
        executors.choose("local", device="cpu", per_device=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert executors.choose("local").slots == 4
    assert executors.choose("local", per_device=3).slots == 12
    assert executors.choose("local", workers=5).slots == 5
    with pytest.raises(ConfigError, match=r"--workers 5 --per-device 3: .* give one of them"):
        executors.choose("local", workers=5, per_device=3)


def test_local_workers_default_to_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 3, 5})
    assert executors.choose("local", device="cpu").slots == 3
    assert executors.choose("local", device="cpu", workers=0).slots == 1
