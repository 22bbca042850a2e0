"""Slurm jobs, run by submitit's processes on this machine: the same script, without a queue."""

import os
import shutil
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from mad_efla.config import ConfigError
from mad_efla.execution import pool
from mad_efla.execution.costs import Costs
from mad_efla.execution.queue import OutOfTime, RunQueue
from mad_efla.runs.folder import RunFolder
from tests.tiny import tiny


def _answers():
    """Tell whether a Slurm cluster can be reached from here."""
    return bool(shutil.which("sinfo")) and not subprocess.run(["sinfo"], capture_output=True).returncode


real = pytest.mark.skipif("not _answers()", reason="there is no Slurm here")


@pytest.fixture
def slurm():
    pytest.importorskip("submitit")
    from mad_efla.execution.slurm import Slurm

    return Slurm("cpu", 2, 1, cluster="local")


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Be `squeue`: its answer is a file, which a test writes; without one it fails."""
    command = tmp_path / "bin" / "squeue"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nexec cat {tmp_path}/queue\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return tmp_path / "queue"


def test_a_job_is_lost_when_it_was_away_from_the_queue_twice_in_a_row(queue, monkeypatch):
    pytest.importorskip("submitit")
    from mad_efla.execution import slurm

    monkeypatch.setattr(slurm, "QUEUE_SECONDS", -1.0)
    run = tiny()
    found = slurm._Queue({run.fingerprint: SimpleNamespace(job_id="7_1")})
    looks = []
    for answer in (None, "7_0\n", None, "7_0\n7_1\n", "7_0\n", "", "7_1\n"):
        queue.unlink(missing_ok=True)
        if answer is not None:
            queue.write_text(answer)
        looks.append(found.lost(run))
    assert looks == [False] * 5 + [True, False]


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """Be `sbatch`, which keeps what it was given, and `scontrol`, whose answer is a file."""
    commands = {
        "sbatch": f'n=$(ls {tmp_path} | grep -c "^script"); cp "$1" {tmp_path}/script$n; echo Submitted batch job 7$n',
        "srun": "exit 1",
        "scontrol": f"exec cat {tmp_path}/config",
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def _submitted(folder, workers, names):
    """Submit runs; return what sbatch was told of each array, and the jobs."""
    from mad_efla.execution import slurm

    jobs = {}
    make = slurm._Make(str(folder), "cpu", slurm.NO_LIMITS)
    slurm.Slurm("cpu", workers, 1)._submit(make, names, jobs, folder / "slurm")
    told = []
    for script in sorted(folder.glob("script*")):
        lines = script.read_text().splitlines()
        told.append([line.split("=")[1] for line in lines if line.startswith(("#SBATCH --array", "#SBATCH --dep"))])
    return told, jobs


def test_what_is_more_than_an_array_may_hold_waits_in_further_arrays(scheduler):
    pytest.importorskip("submitit")
    (scheduler / "config").write_text("Configuration data\nMaxArraySize            = 3\nMaxJobCount = 9\n")
    names = [f"run{i}" for i in range(7)]
    told, jobs = _submitted(scheduler, 2, names)
    assert told == [["0-2%2"], ["0-2%2", "afterany:70"], ["afterany:71"]]
    assert [job.job_id for job in jobs.values()] == ["70_0", "70_1", "70_2", "71_0", "71_1", "71_2", "72"]
    assert list(jobs) == names


def test_more_jobs_at_once_than_an_array_may_hold_are_arrays_side_by_side(scheduler):
    pytest.importorskip("submitit")
    (scheduler / "config").write_text("MaxArraySize = 2\n")
    told, _ = _submitted(scheduler, 4, [f"run{i}" for i in range(6)])
    assert told == [["0-1%2"], ["0-1%2"], ["0-1%2", "afterany:70"]]


def test_a_cluster_that_does_not_tell_is_taken_to_have_slurms_own_default(scheduler):
    pytest.importorskip("submitit")
    from mad_efla.execution import slurm

    assert slurm.array_size() == 1001
    (scheduler / "bin" / "scontrol").unlink()
    assert slurm.array_size() == 1001


def test_what_sbatch_refuses_is_told_in_its_own_words(scheduler):
    pytest.importorskip("submitit")
    (scheduler / "bin" / "sbatch").write_text("#!/bin/sh\necho 'Job violates accounting policy' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match=r"sbatch refuses the jobs: .*Job violates accounting policy"):
        _submitted(scheduler, 2, ["run0"])


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # submitit leaves its processes to the collector
def test_jobs_and_this_process_give_equal_bits(tmp_path, slurm):
    runs = [tiny(seed=s) for s in range(2)]
    seen = []
    slurm.perform(RunQueue(runs, tmp_path / "jobs", Costs(runs)), watch=seen.extend)
    assert {e.run.fingerprint for e in seen if e.status == "finished"} == {r.fingerprint for r in runs}
    pool.execute(runs, tmp_path / "here", device="cpu", workers=0)
    for run in runs:
        ours, theirs = (RunFolder(tmp_path / name, run.fingerprint).load_model() for name in ("jobs", "here"))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_stopped_sweep_cancels_its_jobs_and_goes_on(tmp_path, slurm):
    run = tiny(train__steps=100_000)
    folder = RunFolder(tmp_path, run.fingerprint)

    def stop_once_begun(events):
        if folder.rows()[0]:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        slurm.perform(RunQueue([run], tmp_path, Costs([run])), watch=stop_once_begun)
    ended = threading.Event()
    for _ in range(600):  # the job's process ends a little later than its driver
        if folder.status() == "interrupted" and folder.load_checkpoint():
            break
        ended.wait(0.1)
    assert folder.load_checkpoint()["step"] > 0
    with pytest.raises(OutOfTime):
        slurm.perform(RunQueue([run], tmp_path, Costs([run])), deadline=0.0)


@pytest.mark.cluster
@real
def test_on_a_real_cluster_a_killed_job_is_told_of_and_made_again(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    from mad_efla.execution import slurm

    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 2.0)
    run = tiny(train__steps=3_000)
    folder = RunFolder(tmp_path, run.fingerprint)

    def kill_once_begun(events):
        if folder.rows()[0]:
            subprocess.run(["scancel", "--signal=KILL", *(f"{job}.0" for job in _queued(tmp_path))], check=False)

    for watch in (kill_once_begun, lambda events: None):
        slurm.Slurm("cpu", 2, 1).perform(
            RunQueue([run], tmp_path, Costs([run])), watch=watch, deadline=time.monotonic() + 120
        )
        if watch is kill_once_begun:
            assert folder.failure().transient
            assert "died; see the end of" in folder.failure().reason
    assert folder.status() == "finished"


@pytest.mark.cluster
@real
def test_on_a_real_cluster_a_stopped_sweep_leaves_checkpoints_and_no_jobs(tmp_path):
    pytest.importorskip("submitit")
    from mad_efla.execution.slurm import Slurm

    run = tiny(train__steps=100_000)
    folder = RunFolder(tmp_path, run.fingerprint)

    def stop_once_begun(events):
        if folder.rows()[0]:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Slurm("cpu", 2, 1).perform(RunQueue([run], tmp_path, Costs([run])), watch=stop_once_begun)
    for _ in range(100):
        if folder.status() == "interrupted" and not _queued(tmp_path):
            break
        time.sleep(0.2)
    assert folder.load_checkpoint()["step"] > 0
    assert "stopped after step" in folder.failure().reason


def _queued(out):
    """Name the jobs of a folder of runs that Slurm still has."""
    ours = {script.name.split("_")[0] for script in (out / "slurm").glob("*_submission.sh")}
    command = ["squeue", "--noheader", "--array", "--format=%i %A"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[0] for line in lines if ours & set(line.replace("_", " ").split())]


def test_slurm_without_sbatch_is_refused(monkeypatch):
    pytest.importorskip("submitit")
    from mad_efla.execution.slurm import Slurm

    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="there is no sbatch on this machine"):
        Slurm("cpu", None, 1)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/sbatch")
    with pytest.raises(ConfigError, match="a Slurm job has its GPU for itself"):
        Slurm("cuda", None, 2)
