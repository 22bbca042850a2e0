"""A Ray cluster of two nodes on this machine: what is killed is made again, with equal bits."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mad_efla.execution import attempt
from mad_efla.execution.costs import Costs
from mad_efla.execution.queue import RunQueue
from mad_efla.plan import expand
from mad_efla.runs.folder import RunFolder
from tests.tiny import write_files

pytestmark = [
    pytest.mark.cluster,
    # Ray leaves files and processes to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STEPS = 400  # some seconds of a run: time to kill something under it
SETS = [f"train.steps={STEPS}", "seeds=[0, 1]"]


@pytest.fixture(scope="module")
def nodes():
    """Two nodes of one core each: the head and one to be killed, started one after the other."""
    before = dict(os.environ)
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", "0123456789abcdef" * 2
    utils = pytest.importorskip("ray.cluster_utils")  # only now: it reads them once
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": quick, "include_dashboard": False}
    )
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def runs(files):
    return expand.expand("task.yaml", "plan.yaml", SETS, "float32").runs


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The same runs made by local workers, in another order."""
    folder = tmp_path_factory.mktemp("quiet")
    write_files(folder)
    end(start("--set", "seeds=[1, 0]", executor="local", folder=folder))
    return folder / "there"


def start(*more, executor="ray", folder=None):
    command = ["sweep", "task.yaml", "--plan", "plan.yaml", "--no-tracking", "--out", "there"]
    sets = [word for text in SETS for word in ("--set", text)]
    return subprocess.Popen(
        [Path(sys.executable).with_name("mad-efla"), *command, "--executor", executor, *sets, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def end(driver, code=0):
    said, _ = driver.communicate(timeout=100)
    assert driver.returncode == code, said
    return said


def owners(out="there"):
    """Return the process that holds each run which is being made and has logged something."""
    found = {}
    for claim in Path(out).glob("*/claim.*"):
        with contextlib.suppress(OSError, ValueError):
            folder = RunFolder(Path(out), claim.parent.name)
            pid = int(claim.read_text().splitlines()[0].split()[-1])
            if folder.status() == "running" and folder.rows()[0]:
                found[pid] = folder
    return found


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def raylet(node):
    (process,) = node.all_processes["raylet"]
    return process.process.pid


def wait_for(find, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def attempts(folder):
    return len(list(folder.path.glob("claim.*")))


def assert_made_once_with_equal_bits(runs, quiet):
    out = Path("there")
    for run in runs:
        there, here = (RunFolder(folder, run.fingerprint) for folder in (out, quiet))
        assert there.status() == "finished"
        assert there.result().test == here.result().test
        ours, theirs = there.load_model(), here.load_model()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        steps, expected = ([row.step for row in f.rows()[0]] for f in (there, here))
        assert steps == expected
        assert not (there.path / "checkpoint.pt").exists()
    assert not list(out.glob(".shared-*"))


def test_a_killed_node_costs_time_and_nothing_else(nodes, runs, quiet):
    node = nodes.add_node(num_cpus=1)
    driver = start()
    doomed = wait_for(lambda: {p: f for p, f in owners().items() if parent(p) == raylet(node)})
    for pid in (raylet(node), *doomed):
        os.kill(pid, signal.SIGKILL)
    said = end(driver)
    nodes.remove_node(node, allow_graceful=False)
    assert "raylet" not in said
    assert_made_once_with_equal_bits(runs, quiet)
    again = {r.fingerprint for r in runs if attempts(RunFolder(Path("there"), r.fingerprint)) > 1}
    assert again == {folder.fingerprint for folder in doomed.values()}


def test_a_killed_worker_costs_time_and_nothing_else(nodes, runs, quiet):
    driver = start()
    pid, folder = next(iter(wait_for(owners).items()))
    os.kill(pid, signal.SIGKILL)
    end(driver)
    assert attempts(folder) == 2
    assert_made_once_with_equal_bits(runs, quiet)


def test_an_interrupted_sweep_goes_on(nodes, runs, quiet):
    driver = start()
    (folder,) = wait_for(owners).values()
    driver.send_signal(signal.SIGINT)
    assert "the same command goes on" in end(driver, 130)
    assert folder.status() == "interrupted"
    assert "stopped after step" in folder.failure().reason
    step = folder.load_checkpoint()["step"]
    assert 0 < step < STEPS
    end(start())
    assert_made_once_with_equal_bits(runs, quiet)


def test_without_a_shared_folder_the_files_come_home(nodes, runs, quiet, monkeypatch):
    from mad_efla.execution import ray
    from mad_efla.execution.executors import choose

    @contextlib.contextmanager
    def nowhere(out):
        yield Path("/nonexistent/probe")

    # One run was begun at home: what it has goes along, and is gone on from.
    first = runs[0]
    begun = RunFolder(Path("there"), first.fingerprint)
    begun.create(first)
    attempt.attempt(begun, "cpu", {}, lambda: len(begun.rows()[0]) > 20)
    assert begun.failure().kind == "interrupted"
    monkeypatch.setattr(ray, "_probe", nowhere)
    seen = []
    choose("ray").perform(RunQueue(runs, Path("there"), Costs(runs)), watch=lambda events: seen.extend(events))
    assert sorted(e.run.fingerprint for e in seen) == sorted(r.fingerprint for r in runs)
    assert {e.status for e in seen} == {"finished"}
    assert_made_once_with_equal_bits(runs, quiet)
