"""Runs as job arrays of a Slurm cluster, through submitit and a folder that all nodes share.

A job makes one run on one core, and on a GPU of its own. An array holds as many jobs as the cluster
allows; further ones wait for the array before, so that no more jobs run at once. Partition, account
and time are sbatch's own to ask for, by its variables: SBATCH_PARTITION, SBATCH_ACCOUNT,
SBATCH_TIMELIMIT. Slurm's logs are in `slurm/` beside the runs. A job that Slurm stops at its time
limit, or takes the node from, is queued again and goes on from the run's checkpoint.
"""

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import torch

from mad_efla.config import ConfigError
from mad_efla.execution import attempt, machine, pool, processes
from mad_efla.execution.attempt import NO_LIMITS
from mad_efla.execution.queue import RunQueue, Watch, mark_interrupted
from mad_efla.execution.schedulers import follow
from mad_efla.plan.run import Limits, RunConfig
from mad_efla.runs.folder import RunFolder

try:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError
except ImportError:
    raise ConfigError("--executor slurm: needs the package submitit; pip install 'mad-efla[slurm]'") from None

AT_ONCE = 256  # jobs that run at once, unless --workers says otherwise
ARRAY_SIZE = 1001  # jobs of an array, where the cluster does not say: Slurm's own default
QUEUE_SECONDS = 15.0  # between looks at the scheduler's queue


class Slurm:
    """A Slurm cluster, as it is reached from this machine.

    Args:
        device: `cpu`, `cuda`, or `auto` for what this machine has. A login node without a GPU may
            ask for `cuda`; `train.precision: auto` then means bfloat16.
        workers: Jobs at once; 256 by default.
        per_device: Must be 1.
        cluster: `slurm`, or `local` for processes of this machine, as the tests do.

    Raises:
        ConfigError: There is no `sbatch` here, or several runs are to share a GPU.
    """

    def __init__(self, device: str, workers: int | None, per_device: int, cluster: str = "slurm"):
        if cluster == "slurm" and not shutil.which("sbatch"):
            raise ConfigError("--executor slurm: there is no sbatch on this machine; call it where jobs are submitted")
        if per_device != 1:
            raise ConfigError(
                f"--per-device {per_device}: a Slurm job has its GPU for itself; use --executor "
                "local or ray inside one allocation"
            )
        self.cluster, self.slots = cluster, workers or AT_ONCE
        self.device = device if device == "cuda" else machine.resolve_device(device)
        here = self.device == "cpu" or torch.cuda.is_available()
        self.precision = machine.resolve_precision(self.device) if here else "bfloat16"

    def perform(
        self,
        work: RunQueue,
        *,
        watch: Watch = lambda events: None,
        deadline: float = math.inf,
        limits: Limits = NO_LIMITS,
    ) -> None:
        """See `Executor`; the folder of runs must be seen by all nodes."""
        out, longest_first = work.out, list(work)
        names = [r.fingerprint for r in longest_first]
        make = _Make(str(out.resolve()), self.device, limits)
        os.environ.update(processes.ENVIRONMENT | os.environ)  # which jobs inherit
        jobs: dict[str, submitit.Job] = {}
        with pool.terminate_as_interrupt():
            try:
                self._submit(make, names, jobs, out.resolve() / "slurm")
                queue = _Queue(jobs) if self.cluster == "slurm" else _Processes(jobs)
                follow(
                    work,
                    longest_first,
                    watch=watch,
                    deadline=deadline,
                    slots=lambda: self.slots,
                    ended=lambda run: _ended(jobs[run.fingerprint], queue.lost(run), out, run),
                )
            finally:
                for job in jobs.values():
                    if not job.paths.result_pickle.exists():
                        job.cancel(check=False)  # SIGTERM, and SIGKILL later
                mark_interrupted(work.runs, out)

    def _submit(self, make: "_Make", names: list[str], jobs: dict[str, submitit.Job], folder: Path) -> None:
        """Submit a job for each run, in arrays of the size that the cluster allows.

        Args:
            make: Makes a run in a job.
            names: The runs.
            jobs: Takes the jobs, those of each array as soon as it is submitted.
            folder: Where Slurm's logs go.

        Raises:
            ConfigError: The cluster does not take them.
        """
        size = array_size()
        together = max(1, self.slots // size)  # arrays that may run side by side
        arrays: list[str] = []
        for start in range(0, len(names), size):
            batch = names[start : start + size]
            before = f"afterany:{arrays[-together]}" if len(arrays) >= together else None
            executor = submitit.AutoExecutor(folder, cluster=self.cluster)
            executor.update_parameters(
                name="mad-efla",
                timeout_min=24 * 60,
                slurm_array_parallelism=self.slots // together,
                cpus_per_task=1,
                slurm_additional_parameters={"dependency": before} if before else {},
                **({"gpus_per_node": 1} if self.device == "cuda" else {}),
            )
            try:
                found = executor.map_array(make, batch)
            except (FailedJobError, FailedSubmissionError) as error:
                raise ConfigError(f"--executor slurm: sbatch refuses the jobs: {error}") from error
            jobs |= dict(zip(batch, found, strict=True))
            arrays.append(found[0].job_id.partition("_")[0])


def array_size() -> int:
    """Return how many jobs an array of this cluster may have: its MaxArraySize, if it says so."""
    try:
        command = ["scontrol", "show", "config"]
        told = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ARRAY_SIZE
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", told, re.MULTILINE)
    return max(1, int(found[1])) if found else ARRAY_SIZE


def _ended(job: submitit.Job, lost: bool, out: Path, run: RunConfig) -> bool:
    """Tell whether a job is over; one that died without a word is a failure of its run."""
    if not (job.paths.result_pickle.exists() or lost):
        return False
    folder = RunFolder(out, run.fingerprint)
    if folder.result() is None and folder.failure() is None:
        error = None if lost else job.exception()
        if lost or error:
            reason = f"its job {job.job_id} died; see the end of {job.paths.stderr}"
            return folder.fail("failed", reason, str(error or ""), transient=True)  # once its claim has run out
    return True


class _Queue:
    """Which jobs are lost: without a result, and no longer known to the scheduler.

    submitit would ask sacct, which answers nothing on a cluster that keeps no accounts.

    Args:
        jobs: All that were submitted, by run.
    """

    def __init__(self, jobs: dict[str, submitit.Job]):
        self._jobs, self._asked = jobs, time.monotonic()
        self._away: dict[str, int] = {}  # how many times in a row a job was not there

    def lost(self, run: RunConfig) -> bool:
        """Tell whether a run's job was away twice in a row; a result may come a little later."""
        if time.monotonic() - self._asked > QUEUE_SECONDS:
            self._ask()
            self._asked = time.monotonic()
        return self._away.get(run.fingerprint, 0) >= 2

    def _ask(self) -> None:
        there = self._there()
        for fingerprint, job in self._jobs.items():
            if there is not None:
                away = self._away.get(fingerprint, 0) + 1
                self._away[fingerprint] = 0 if job.job_id in there else away

    def _there(self) -> set[str] | None:
        command = ["squeue", f"--user={os.getuid()}", "--noheader", "--array", "--format=%i"]
        try:
            found = subprocess.run(
                command, capture_output=True, text=True, encoding="ascii", errors="replace", timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return set(found.stdout.split()) if found.returncode == 0 else None


class _Processes(_Queue):
    """As `_Queue`, for jobs that are processes of this machine."""

    def _there(self) -> set[str]:
        return {job.job_id for job in self._jobs.values() if not job.done()}


class _Make:
    """Make one run in a job; submitit asks `checkpoint` what to queue when Slurm stops it."""

    def __init__(self, out: str, device: str, limits: Limits):
        self.out, self.device, self.limits = out, device, limits

    def __call__(self, fingerprint: str) -> None:
        asked: list[int] = []
        for stop in (signal.SIGTERM, signal.SIGINT):  # scancel, and a cancelled local job
            signal.signal(stop, lambda number, frame: asked.append(number))
        torch.set_num_threads(1)
        folder = RunFolder(Path(self.out), fingerprint)
        with (folder.path / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
            about = machine.environment(self.device)
            attempt.attempt(folder, self.device, about, lambda: bool(asked), self.limits)

    def checkpoint(self, fingerprint: str) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self, fingerprint)
