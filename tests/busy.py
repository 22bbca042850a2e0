"""How busy a sweep keeps the cores, and what its driver costs: `make busy` and `make thousand`.

A sweep of tiny runs is started as a user would, with MLflow on, and watched from outside, by what
the system says of its processes: the share of the cores that the workers use in each window, the
processor time and the memory of the driver, and the time from the call to its end.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from mad_efla.runs.folder import RunFolder
from mad_efla.runs.sweeps import read_sweeps
from tests.stress import PLAN, TASK, _workers

_TICKS = os.sysconf("SC_CLK_TCK")


class Watched:
    """A sweep under way, and the processor seconds of its driver and workers."""

    def __init__(self, folder: Path, runs: int, steps: int, workers: int):
        (folder / "task.yaml").write_text(TASK)
        (folder / "plan.yaml").write_text(PLAN.format(seeds=list(range(runs // 2)), steps=steps))
        arguments = ["sweep", "task.yaml", "--plan", "plan.yaml", "--workers", str(workers)]
        with (folder / "log").open("w") as log:
            self.driver = subprocess.Popen(
                [Path(sys.executable).with_name("mad-efla"), *arguments], cwd=folder, stdout=log, stderr=log
            )
        self._workers: dict[int, float] = {}
        self.driver_seconds = self.driver_mib = 0.0

    def look(self) -> float:
        """Return the processor seconds that all workers have used so far."""
        try:
            self.driver_seconds = _seconds(self.driver.pid)
            status = Path(f"/proc/{self.driver.pid}/status").read_text()
            self.driver_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
            for pid in _workers(self.driver.pid):
                self._workers[pid] = _seconds(pid)
        except (OSError, IndexError):  # it has just ended
            pass
        return sum(self._workers.values())


def _seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@click.command()
@click.option("--runs", default=100, show_default=True)
@click.option("--steps", default=1200, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--window", default=10.0, show_default=True, help="Seconds.")
def main(runs: int, steps: int, workers: int, window: float) -> None:
    """Run a sweep, print how busy it kept the cores, and what the driver used."""
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name), time.monotonic()
        watched = Watched(folder, runs, steps, workers)
        before, driver, since, shares = 0.0, 0.0, begun, []
        while watched.driver.poll() is None:
            time.sleep(0.2)
            used, now = watched.look(), time.monotonic()
            if now - since >= window:
                had = (now - since) * workers
                own = (used - before) / had
                both = own + (watched.driver_seconds - driver) / had
                shares.append((now - begun, own, both))
                click.echo(f"{now - begun:7.0f} s  workers used {own:6.1%} of the cores, with the driver {both:6.1%}")
                before, driver, since = used, watched.driver_seconds, now
        wall = time.monotonic() - begun
        (record,) = read_sweeps(folder / "runs")
        done = [RunFolder(folder / "runs", f).status() for f in record.fingerprints]
    middle = [(own, both) for at, own, both in shares[1:] if at < wall - 60]
    finished = done.count("finished")
    click.echo(f"runs         {finished} of {runs} finished, {watched.driver.returncode=}")
    click.echo(f"wall time    {wall:.1f} s, {1000 * wall / runs:.0f} ms a run")
    if middle:
        own, both = map(min, zip(*middle, strict=True))
        click.echo(
            f"least busy   {own:.1%} by workers, {both:.1%} with the driver, from the second window to the last minute"
        )
    cost = 1000 * watched.driver_seconds / runs
    click.echo(f"driver       {cost:.1f} ms of a processor a run, {watched.driver_mib:.0f} MiB at most")
    sys.exit(finished < runs)


if __name__ == "__main__":
    main()
