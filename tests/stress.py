"""Kill a sweep again and again, and count what it cost: `make stress`, or a few kills in the tests.

A sweep is started in a fresh folder, with MLflow on. At random moments its driver, one of its
workers or the server that they are forked from gets SIGKILL; a killed driver is followed by the
next call at once, while its workers may still be alive. After the last kill the sweep is let end,
and is compared with an undisturbed one:

    lost       runs without a result, or not FINISHED in MLflow, or with a gap in their metrics there
    doubled    runs that MLflow has twice, and metrics it has twice for one step
    differing  runs whose scores, weights or metrics are not bit-equal
"""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
import torch

from mad_efla.runs.folder import RunFolder
from mad_efla.runs.sweeps import read_sweeps

TASK = "task: {name: recall, vocab_size: 8, seq_len: 16}\n"
PLAN = """
mixers: [{{name: efla, heads: 2}}, {{name: mamba2, heads: 2}}]
settings: baseline
seeds: {seeds}
model: {{width: 16, depth: 1}}
data: {{train_examples: 256, validation_examples: 64, test_examples: 64}}
optim: {{lr: 1e-2}}
train: {{batch_size: 16, steps: {steps}, eval_every: 20}}
"""
# Nothing else may depend on the clock.
CLOCK = {"train/tokens_per_second", "total/seconds", "total/train_seconds"}


class Count(NamedTuple):
    """What a stress run cost."""

    runs: int
    kills: int
    lost: int
    doubled: int
    differing: int
    seconds: float


def stress(folder: Path, kills: int, runs: int, steps: int, seed: int) -> Count:
    """Disturb a sweep `kills` times and count.

    Args:
        folder: An empty folder.
        kills: How many processes are killed.
        runs: Runs of the sweep, an even number.
        steps: Steps of each.
        seed: Of the moments and the victims.
    """
    begun = time.monotonic()
    (folder / "task.yaml").write_text(TASK)
    (folder / "plan.yaml").write_text(PLAN.format(seeds=list(range(runs // 2)), steps=steps))
    rng = random.Random(seed)
    driver = _start(folder, "disturbed")
    made = 0
    while made < kills:
        time.sleep(rng.uniform(0.5, 8))
        if driver.poll() is not None:
            if driver.returncode == 0:
                break  # it ended before the last kill: raise `steps`
            driver = _start(folder, "disturbed")
            continue
        victims = [driver.pid, *_workers(driver.pid, and_server=True)]
        with_driver = rng.random() < 0.5
        victim = victims[0] if with_driver or len(victims) == 1 else rng.choice(victims[1:])
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
        made += 1
        if victim == driver.pid:
            driver.wait()
            driver = _start(folder, "disturbed")
    for _ in range(3):  # a worker that is killed twice fails its run; the next call makes it
        if driver.wait() == 0:
            break
        driver = _start(folder, "disturbed")
    _start(folder, "quiet").wait()
    lost, doubled, differing = _compare(folder)
    return Count(runs, made, lost, doubled, differing, round(time.monotonic() - begun, 1))


def _start(folder: Path, name: str) -> subprocess.Popen:
    arguments = ["sweep", "task.yaml", "--plan", "plan.yaml", "--workers", "2", "--out", name]
    uri = f"sqlite:///{folder / name}.db"
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            [Path(sys.executable).with_name("mad-efla"), *arguments, "--tracking-uri", uri],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def _workers(driver: int, *, and_server: bool = False) -> list[int]:
    """Name the worker processes of a driver, and the process they are forked from."""
    servers = [p for p in _children(driver) if b"forkserver" in _command(p)]
    workers = [p for server in servers for p in _children(server)]
    return servers + workers if and_server else workers


def _children(process: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has just ended
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def _command(process: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def _compare(folder: Path) -> tuple[int, int, int]:
    out = folder / "disturbed"
    (record,) = read_sweeps(out)
    entries = _entries(folder / "disturbed.db")
    lost = doubled = differing = 0
    for fingerprint in record.fingerprints:
        there, quiet = (RunFolder(folder / n, fingerprint) for n in ("disturbed", "quiet"))
        result, expected = there.result(), quiet.result()
        own = entries.get(fingerprint, [])
        doubled += len(own) > 1 or any(repeated for _, _, repeated in own)
        if result is None or expected is None or not own:
            lost += 1
            continue
        status, logged, _ = own[0]
        steps = {(key, row.step) for row in there.rows()[0] for key in row.metrics}
        lost += status != "FINISHED" or bool(steps - logged)
        same = result.test == expected.test and result.data_digest == expected.data_digest
        same &= _curves(there) == _curves(quiet)
        ours, theirs = there.load_model(), quiet.load_model()
        same &= all(torch.equal(ours[k], theirs[k]) for k in theirs)
        differing += not same
    return lost, doubled, differing


def _curves(folder: RunFolder) -> list[tuple[int, dict[str, float]]]:
    rows = [(r.step, {k: v for k, v in r.metrics.items() if k not in CLOCK}) for r in folder.rows()[0]]
    return [row for row in rows if row[1]]


def _entries(store: Path) -> dict[str, list[tuple[str, set[tuple[str, int]], bool]]]:
    """Read from MLflow's own tables each run's status, logged steps, and whether one is twice."""
    with contextlib.closing(sqlite3.connect(store)) as database:
        runs = database.execute(
            "SELECT value, run_uuid, status FROM runs JOIN tags USING (run_uuid) "
            "WHERE key = 'mad.fingerprint' AND lifecycle_stage = 'active'"
        ).fetchall()
        found: dict[str, list[tuple[str, set[tuple[str, int]], bool]]] = {}
        for fingerprint, uuid, status in runs:
            logged = database.execute("SELECT key, step FROM metrics WHERE run_uuid = ?", (uuid,)).fetchall()
            repeated = len(logged) != len(set(logged))
            found.setdefault(fingerprint, []).append((status, set(logged), repeated))
    return found


@click.command()
@click.option("--kills", default=50, show_default=True)
@click.option("--runs", default=16, show_default=True)
@click.option("--steps", default=3000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, runs: int, steps: int, seed: int) -> None:
    """Disturb a sweep and print what it cost; exit status 1 if that is anything."""
    with tempfile.TemporaryDirectory() as folder:
        count = stress(Path(folder), kills, runs, steps, seed)
    for name, value in count._asdict().items():
        click.echo(f"{name:10} {value}")
    sys.exit(bool(count.lost or count.doubled or count.differing or count.kills < kills))


if __name__ == "__main__":
    main()
