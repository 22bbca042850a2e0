"""Runs as tasks of a Ray cluster: that of RAY_ADDRESS or `ray start`, else one made here.

A task takes one core, and its share of a GPU. A node that sees the folder of runs, told by a file
that the driver puts there, works in it as a local worker does; any other works in a folder of its
own and hands the files back through Ray's object store. A task whose worker or node is lost is
started again by Ray, up to `RETRIES` times.
"""

import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mad_efla.config import ConfigError
from mad_efla.execution import attempt, machine, pool, processes
from mad_efla.execution.attempt import NO_LIMITS
from mad_efla.execution.queue import RunQueue, Watch, mark_interrupted
from mad_efla.execution.schedulers import follow
from mad_efla.plan.run import Limits
from mad_efla.runs.files import write_bytes
from mad_efla.runs.folder import RunFolder
from mad_efla.tasks.smnist import DATA
from mad_efla.training.step import VARIABLE as FORM
from mad_kernels.dispatch import VARIABLE as BACKEND

try:
    import ray
    from ray._private import worker
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError
except ImportError:
    raise ConfigError("--executor ray: needs the package ray, on every node; pip install 'mad-efla[ray]'") from None

RETRIES = 3  # of a run whose worker or node was lost under it: nodes come and go
STOP_SECONDS = 60.0  # for what runs to write where it stands

Files = dict[str, bytes]


class Ray:
    """A Ray cluster, joined.

    Args:
        device: `cpu`, `cuda`, or `auto` for what the cluster has.
        workers: Cores of a cluster made here; all by default.
        per_device: Runs that share a GPU.

    Raises:
        ConfigError: There is no cluster to join, `workers` is given for one that is there, or CUDA
            is wished for and no node has a GPU.
    """

    def __init__(self, device: str, workers: int | None, per_device: int):
        _join(workers)
        gpus = ray.cluster_resources().get("GPU", 0)
        if device == "cuda" and not gpus:
            raise ConfigError(
                "--device cuda: no node of the Ray cluster has a GPU; use --device cpu, or start "
                "nodes with `ray start --num-gpus N`"
            )
        self.device = "cuda" if device != "cpu" and gpus else "cpu"
        self.per_device = per_device
        asked: Any = self._task(machine.resolve_precision).remote(self.device)
        self.precision: str = ray.get(asked)

    @property
    def slots(self) -> int:
        """Runs that the cluster, as it is now, can make at once."""
        there = ray.cluster_resources()
        cores = int(there.get("CPU", 0))
        if self.device == "cuda":
            return min(cores, round(there.get("GPU", 0) * self.per_device))
        return cores

    def perform(
        self,
        work: RunQueue,
        *,
        watch: Watch = lambda events: None,
        deadline: float = math.inf,
        limits: Limits = NO_LIMITS,
    ) -> None:
        """See `Executor`. Of runs on nodes that do not see their folder, only the end is told."""
        out, longest_first = work.out, list(work)
        with pool.terminate_as_interrupt(), _probe(out) as probe:
            make, tasks = self._task(_make), {}
            try:
                for run in longest_first:
                    folder = RunFolder(out, run.fingerprint)
                    tasks[run.fingerprint] = make.remote(
                        run.fingerprint, str(probe), self.device, limits, _files(folder)
                    )
                follow(
                    work,
                    longest_first,
                    watch=watch,
                    deadline=deadline,
                    slots=lambda: self.slots,
                    ended=lambda run: _ended(RunFolder(out, run.fingerprint), tasks),
                )
            finally:
                _stop(out, tasks)
                mark_interrupted(work.runs, out)
                ray.shutdown()

    def _task(self, function: Any) -> Any:
        gpus = 1 / self.per_device if self.device == "cuda" else 0
        return ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(function)


def _join(workers: int | None) -> None:
    worker._worker_logs_enabled = False  # else it prints to stdout, between our tables
    chosen = {name: os.environ[name] for name in (FORM, BACKEND, DATA) if name in os.environ}
    try:
        _reach(os.environ.get("RAY_ADDRESS", ""))
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": processes.ENVIRONMENT | chosen},
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, ValueError) and workers is not None:
            raise ConfigError(
                f"--workers {workers}: there is a Ray cluster already, whose resources say how "
                "many run at once; leave --workers out"
            ) from None
        raise ConfigError(
            f"--executor ray: no cluster can be joined ({reason}); start one with `ray start "
            "--head`, correct or unset RAY_ADDRESS, and give all nodes the same RAY_AUTH_MODE"
        ) from None


def _reach(address: str) -> None:
    """Raise `OSError` at once where nobody listens: Ray itself tries for two minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


# ------------------------------------------------------------------ the driver's side


@contextlib.contextmanager
def _probe(out: Path) -> Iterator[Path]:
    """Put a file into the folder of runs by which tasks tell whether they see it."""
    path = out.resolve() / f".shared-{secrets.token_hex(8)}"
    out.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _ended(folder: RunFolder, tasks: dict[str, Any]) -> bool:
    """Tell whether a run's task is over; then what it left is in the folder, and it is dropped."""
    task = tasks[folder.fingerprint]
    if not ray.wait([task], timeout=0)[0]:
        return False
    try:
        if not _bring_home(folder, ray.get(task)):
            return False
    except TaskCancelledError:
        pass
    except RayTaskError as error:
        reason = f"{type(error.cause).__name__}: {error.cause}".splitlines()[0][:300]
        if not folder.fail("failed", reason, str(error)):
            return False  # its node's claim has not run out yet
    except RayError as error:
        reason = f"its worker or node died {RETRIES + 1} times: {type(error).__name__}"
        if not folder.fail("failed", reason, str(error), transient=True):
            return False
    del tasks[folder.fingerprint]
    return True


def _stop(out: Path, tasks: dict[str, Any]) -> None:
    """Ask what runs to write where it stands, and wait for it; what waits is dropped."""
    for task in tasks.values():
        ray.cancel(task)  # SIGINT to those that run
    if tasks:
        ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=STOP_SECONDS)
    for fingerprint, task in tasks.items():
        with contextlib.suppress(RayError):
            _bring_home(RunFolder(out, fingerprint), ray.get(task, timeout=0))


def _bring_home(folder: RunFolder, files: Files | None) -> bool:
    """Write the files of a run made elsewhere; False while another process holds the run."""
    if files is None or folder.result() is not None:
        return True
    with folder.lock() as free:
        if not free:
            return False
        for name in sorted(files, key="result.json".__eq__):  # the result last
            write_bytes(folder.path / name, files[name])
        for name in _files(folder).keys() - files.keys():  # a checkpoint, once there is a result
            (folder.path / name).unlink()
    return True


def _files(folder: RunFolder) -> Files:
    """Read a run's files, less its claims."""
    found = (p for p in folder.path.iterdir() if not p.name.startswith((".", "claim.")))
    return {path.name: path.read_bytes() for path in found if path.is_file()}


# ------------------------------------------------------------------ the task's side


def _make(fingerprint: str, probe: str, device: str, limits: Limits, carried: Files) -> Files | None:
    """Make one run in a task; return its files if the folder of runs is not seen from here."""
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    torch.set_num_threads(1)
    if Path(probe).exists():
        _attempt(RunFolder(Path(probe).parent, fingerprint), device, limits, asked)
        return None
    with tempfile.TemporaryDirectory(prefix="mad-efla-") as scratch:
        folder = RunFolder(Path(scratch), fingerprint)
        folder.path.mkdir()
        for name, raw in carried.items():
            (folder.path / name).write_bytes(raw)
        _attempt(folder, device, limits, asked)
        return _files(folder)


def _attempt(folder: RunFolder, device: str, limits: Limits, asked: list[int]) -> None:
    with (folder.path / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        attempt.attempt(folder, device, machine.environment(device), lambda: bool(asked), limits)
