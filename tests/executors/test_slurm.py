"""Slurm jobs, run by submitit's processes on this machine: the same script, without a queue."""

import os
import signal
import threading

import pytest
import torch

from mad_efla import execute
from mad_efla.config import ConfigError
from mad_efla.estimate import Costs
from mad_efla.execute import OutOfTime
from mad_efla.store import RunFolder
from tests.tiny import tiny


@pytest.fixture
def slurm():
    pytest.importorskip("submitit")
    from mad_efla.executors.slurm import Slurm

    return Slurm("cpu", 2, 1, cluster="local")


@pytest.mark.cluster
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning"
)  # submitit leaves its processes to the collector
def test_jobs_and_this_process_give_equal_bits(tmp_path, slurm):
    runs = [tiny(seed=s) for s in range(2)]
    seen = []
    slurm.perform(execute.Work(runs, tmp_path / "jobs", Costs(runs)), watch=seen.extend)
    assert {e.run.fingerprint for e in seen if e.status == "finished"} == {
        r.fingerprint for r in runs
    }
    execute.execute(runs, tmp_path / "here", device="cpu", workers=0)
    for run in runs:
        ours, theirs = (
            RunFolder(tmp_path / name, run.fingerprint).load_model() for name in ("jobs", "here")
        )
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
        slurm.perform(execute.Work([run], tmp_path, Costs([run])), watch=stop_once_begun)
    ended = threading.Event()
    for _ in range(600):  # the job's process ends a little later than its driver
        if folder.status() == "interrupted" and folder.load_checkpoint():
            break
        ended.wait(0.1)
    assert folder.load_checkpoint()["step"] > 0
    with pytest.raises(OutOfTime):
        slurm.perform(execute.Work([run], tmp_path, Costs([run])), deadline=0.0)


def test_slurm_without_sbatch_is_refused(monkeypatch):
    pytest.importorskip("submitit")
    from mad_efla.executors.slurm import Slurm

    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="there is no sbatch on this machine"):
        Slurm("cpu", None, 1)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/sbatch")
    with pytest.raises(ConfigError, match="a Slurm job has its GPU for itself"):
        Slurm("cuda", None, 2)
