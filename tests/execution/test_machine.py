"""What this machine is."""

import os

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


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/host/path/of/a/container\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            "12:cpu,cpuacct:/d\n",
            {"cpu,cpuacct/d/cpu.cfs_quota_us": "200000", "cpu,cpuacct/d/cpu.cfs_period_us": "?"},
            8,
        ),
        (
            "4:memory:/\n12:cpu,cpuacct:/d\n0::/\n",
            {"cpu,cpuacct/d/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/d/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("3:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("3:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"}, 8),
        (None, {}, 8),
    ],
)
def test_a_containers_quota_counts_beside_the_cores_there_are(tmp_path, monkeypatch, groups, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    if groups:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine.cores(tmp_path) == expected
