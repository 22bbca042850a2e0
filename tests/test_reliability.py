"""What may happen to a sweep from outside: after the next call it is as if nothing had."""

import errno
import itertools
import multiprocessing
import os
import random
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mad_efla import spectrum
from mad_efla.cli import cli
from mad_efla.execution import pool
from mad_efla.runs import files
from mad_efla.runs import folder as folders
from mad_efla.runs.files import write_bytes
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.sweeps import read_sweeps
from mad_efla.training import loop
from tests.tiny import PLAN, TASK, tiny

SWEEP = ["sweep", "task.yaml", "--plan", "plan.yaml"]
QUIET = ["--no-tracking"]


def make(runs, out):
    pool.execute(runs, out, device="cpu", workers=0)


def same(a, b):
    """Tell whether two folders of a run hold equal scores, weights and curves."""
    curves = [
        [(r.step, {k: v for k, v in r.metrics.items() if "second" not in k}) for r in f.rows()[0]] for f in (a, b)
    ]
    weights = a.load_model(), b.load_model()
    return (
        a.result().test == b.result().test
        and curves[0] == curves[1]
        and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[1])
    )


class FullDisk:
    """A disk that takes `room` writes, and of the next one only a part; `for_good` or once."""

    def __init__(self, monkeypatch, room, for_good):
        self.room, self.for_good, self.refused = room, for_good, 0
        whole, append = write_bytes, RunFolder.append

        def refusing(path, raw):
            self.take(path)
            whole(path, raw)

        def append_rows(folder, rows):
            path = folder.path / "metrics.jsonl"
            self.take(path, '{"step": 99, "ti')
            append(folder, rows)

        for module in (files, folders):
            monkeypatch.setattr(module, "write_bytes", refusing)
        monkeypatch.setattr(RunFolder, "append", append_rows)

    def take(self, path, torn=""):
        self.room -= 1
        if self.room < 0 and (self.for_good or not self.refused):
            self.refused += 1
            if torn:
                with path.open("a") as file:
                    file.write(torn)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The undisturbed run."""
    out, run = tmp_path_factory.mktemp("quiet"), tiny(train__steps=12, train__eval_every=6)
    make([run], out)
    return RunFolder(out, run.fingerprint)


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize(
    ("room", "checkpoints"), [*((n, False) for n in range(7)), *((n, True) for n in (1, 2, 6, 11, 17))]
)
def test_a_full_disk_at_any_write_loses_nothing(tmp_path, quiet, room, checkpoints, for_good):
    run = quiet.run()
    folder = RunFolder(tmp_path, run.fingerprint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CHECKPOINT_SECONDS", -1.0 if checkpoints else 60.0)
        disk = FullDisk(patch, room, for_good)
        try:
            make([run], tmp_path)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            assert not for_good and folder.failure().transient
    assert disk.refused
    make([run], tmp_path)
    assert same(folder, quiet)
    assert not list(folder.path.glob(".*.partial"))


def test_a_full_disk_is_said_in_a_line(files, monkeypatch):
    FullDisk(monkeypatch, 3, True)
    done = CliRunner().invoke(cli, [*SWEEP, "--workers", "0", "--no-tracking"])
    assert done.exit_code == 1
    assert "No space left on device" in done.stderr
    assert "once it can, the same command goes on" in done.stderr
    assert "Traceback" not in done.output


def test_a_worker_that_cannot_even_write_why_says_so_to_the_driver(tmp_path, monkeypatch):
    run = tiny(train__steps=12)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full.py").write_text(
        "from mad_efla.runs import files, folder\n"
        "from mad_efla.mixers.efla import EFLA\n"
        "def full(path, raw): raise OSError(28, 'No space left on device', str(path))\n"
        "class Full(EFLA):\n"
        "    class Config(EFLA.Config):\n"
        "        name: str\n"
        "    def forward(self, x):\n"
        "        files.write_bytes = folder.write_bytes = full\n"
        "        return super().forward(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = tiny(mixers=[{"name": "full:Full", "heads": 2}])
    with pytest.raises(OSError, match="No space left on device"):
        pool.execute([run], tmp_path / "runs", device="cpu", workers=1)
    sys.modules.pop("full", None)


@pytest.mark.parametrize("seed", range(6))
def test_checkpoints_cut_or_flipped_anywhere_end_with_equal_bits(tmp_path, quiet, seed):
    run, rng = quiet.run(), random.Random(seed)
    folder = RunFolder(tmp_path, run.fingerprint)
    folder.create(run)
    calls = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
        with pytest.raises(loop.Interrupted), folder.lock():
            loop.train(run, folder, stop=lambda: next(calls) >= 7, look=spectrum.training_scalars)
    for name in ("checkpoint.pt", "checkpoint.previous.pt")[: 1 + seed % 2]:
        raw = bytearray((folder.path / name).read_bytes())
        if rng.random() < 0.5:
            raw = raw[: rng.randrange(len(raw))]
        else:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (folder.path / name).write_bytes(raw)
    make([run], tmp_path)
    assert same(folder, quiet)


def test_a_clock_that_goes_backwards_moves_nothing(tmp_path, quiet, monkeypatch):
    ticks = itertools.count(2_000_000_000_000, -3_600_000)
    for module in (folders, loop):
        monkeypatch.setattr(module, "now", lambda: next(ticks))
    run = quiet.run()
    folder = RunFolder(tmp_path, run.fingerprint)
    folder.create(run)
    with folder.lock():  # a claim from what is now the future
        ahead = time.time() + 86_400
        os.utime(folder.path / "claim.1", (ahead, ahead))
    make([run], tmp_path)
    assert same(folder, quiet)
    times = [row.time for row in folder.rows()[0]]
    assert times == sorted(times, reverse=True)
    assert folder.result().ended < folder.result().started
    assert 0 < folder.result().seconds < 600


def test_any_order_of_runs_gives_equal_bits(tmp_path):
    runs = [tiny(seed=s, train__steps=12) for s in range(4)]
    for name, order in (("a", runs), ("b", runs[::-1]), ("c", random.Random(0).sample(runs, 4))):
        for run in order:  # one call each: the engine would put them in its own order
            make([run], tmp_path / name)
    for run in runs:
        first, *others = (RunFolder(tmp_path / n, run.fingerprint) for n in "abc")
        assert all(same(first, other) for other in others)


def _sweep(number):
    done = CliRunner().invoke(cli, [*SWEEP, "--set", "train.steps=4", "--workers", "0", *QUIET])
    Path(f"{number}.out").write_text(f"{done.exit_code}\n{done.stdout}")
    Path(f"{number}.err").write_text(done.stderr)


def test_eight_sweeps_may_begin_in_one_empty_folder(files):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_sweep, args=(n,)) for n in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    outputs = {(files / f"{n}.out").read_text() for n in range(8)}
    assert len(outputs) == 1  # all print the one table
    assert outputs.pop().startswith("0\n")
    (record,) = read_sweeps(files / "runs")
    for fingerprint in record.fingerprints:
        folder = RunFolder(files / "runs", fingerprint)
        logged = [(row.step, name) for row in folder.rows()[0] for name in row.metrics]
        assert folder.status() == "finished"
        assert len(logged) == len(set(logged)) > 0
    assert not (files / "runs" / "data").exists()


WORDS = st.sampled_from(
    [
        "task",
        "name",
        "recall",
        "vary",
        "mixers",
        "efla",
        "grid",
        "optim.lr",
        "seeds",
        "train",
        "steps",
        "-1",
        "1e9",
        "[",
        "]",
        "{",
        "}",
        ":",
        ",",
        "\n",
        "  ",
        "- ",
        "&a",
        "*a",
        "!!python/object:os.system",
        "é",
        "🦉",
        "null",
        "~",
        "'",
        '"',
        "#",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(st.lists(WORDS, max_size=8).map("".join), max_size=6), plan=st.booleans())
def test_any_file_is_a_plan_or_status_2_with_its_place(tmp_path, lines, plan):
    text = (PLAN if plan else TASK) + "\n".join(lines)
    (tmp_path / "task.yaml").write_text(TASK if plan else text)
    (tmp_path / "plan.yaml").write_text(text if plan else PLAN)
    begun, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = CliRunner().invoke(cli, [*SWEEP, "--dry-run"])
    assert time.process_time() - begun < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 200 * 1024  # KiB
    assert done.exit_code in (0, 2), done.output
    assert done.exit_code == 0 or any(f in done.stderr for f in ("task.yaml:", "plan.yaml:"))
    assert isinstance(done.exception, SystemExit | None)
