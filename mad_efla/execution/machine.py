"""What this machine is: its device, the precision that it computes in, the versions in use."""

import contextlib
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath

import torch

from mad_efla.config import ConfigError


def resolve_device(wish: str) -> str:
    """Return `cpu` or `cuda` for `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: CUDA is wished for and not there.
    """
    if wish == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: this torch sees no CUDA device; use --device cpu, or install a CUDA "
            f"build of torch (here: {torch.__version__})"
        )
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wish


def resolve_precision(device: str) -> str:
    """Say what `train.precision: auto` means on a device: bfloat16 where it has instructions."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _cpu_has_bfloat16() else "float32"


def cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may use: those it may run on, and what its container grants.

    Args:
        root: Where `proc` and `sys` are.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([there, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the cores that each control group around this process grants, of version 1 and 2.

    Source: the kernel's documentation, cgroup-v2 (`cpu.max`) and scheduler/sched-bwc (`cpu.cfs_*`).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        trees = [mounted / controllers, mounted / "cpu"] if controllers else [mounted, mounted / "unified"]
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        inside = PurePosixPath(path.strip("/"))
        # A container sees its own group as the root, whatever the path says; the others are not there.
        for group in {tree / part for tree in trees for part in (inside, *inside.parents)}:
            with contextlib.suppress(OSError, ValueError):  # no such group; "max" is no limit
                words = " ".join((group / name).read_text(encoding="ascii") for name in names).split()
                quota, period = map(int, words)
                if quota > 0 and period > 0:
                    yield quota / period


def environment(device: str) -> dict[str, str]:
    """Describe what a run ran on, for its result."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": "1",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "git_commit": _git_commit(),
    }
    versions = {package: metadata.version(package) for package in ("mad-efla", "numpy")}
    return found | versions | {"torch": torch.__version__}  # which names the build, too


def _cpu_has_bfloat16() -> bool:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
            return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def _cpu_name() -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str:
    """Name the commit this code is checked out at, with `+` if it was changed since."""
    here = Path(__file__).parent
    try:
        _git(here, "ls-files", "--error-unmatch", "__init__.py")  # else it is somebody else's
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return f"none (mad-efla {metadata.version('mad-efla')})"


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, check=True)
    return done.stdout.decode(errors="replace").strip()
