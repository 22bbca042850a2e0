"""Where runs run: local worker processes, or this process.

A worker takes one run at a time, the longest that is left, holds a claim on it, and writes
everything into its folder; the driver follows by reading the folders. So a worker that is killed
costs one attempt of one run, and all workers end together.
"""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import torch

from mad_efla.execution import machine
from mad_efla.execution.attempt import NO_LIMITS, attempt
from mad_efla.execution.costs import Costs
from mad_efla.execution.queue import Event, OutOfTime, RunQueue, Watch, mark_interrupted
from mad_efla.execution.worker import Worker
from mad_efla.plan.run import Limits, RunConfig
from mad_efla.runs.folder import RunFolder

ATTEMPTS = 2  # of a run whose worker was killed under it
_POLL_SECONDS = 0.2
_STOP_SECONDS = 30.0  # for a worker to finish its step and write a checkpoint
_ELSEWHERE_SECONDS = 2.0  # until a run that another sweep makes is looked at again
_GRACE_SECONDS = 10.0  # for a run to notice by itself that its time is over


def execute(
    runs: list[RunConfig],
    out: Path,
    *,
    device: str,
    workers: int,
    watch: Watch = lambda events: None,
    deadline: float = math.inf,
    limits: Limits = NO_LIMITS,
    costs: Costs | None = None,
) -> None:
    """Make every run that has no result yet; results and failures are in the folders.

    Args:
        runs: What to run.
        out: The folder of run folders.
        device: `cpu` or `cuda`.
        workers: Worker processes; 0 runs everything in this process.
        watch: Told what happens.
        deadline: When to stop, by `time.monotonic`.
        limits: How long and how large each run may grow before it is ended as failed.
        costs: What is known of the runs' costs, and learns from them.

    Raises:
        KeyboardInterrupt: Asked to stop; what was running is marked interrupted.
        OutOfTime: The deadline passed; likewise.
        OSError: Nothing can be written any more.
    """
    work = RunQueue(runs, out, costs or Costs(runs))
    perform(work, device=device, workers=workers, watch=watch, deadline=deadline, limits=limits)


def perform(
    work: "RunQueue",
    *,
    device: str,
    workers: int,
    watch: Watch = lambda events: None,
    deadline: float = math.inf,
    limits: Limits = NO_LIMITS,
) -> None:
    """Make runs until none is left; like `execute`, for a queue that may grow."""
    about = machine.environment(device)
    try:
        if workers == 0:
            _in_this_process(work, device, about, watch, deadline, limits)
        else:
            with terminate_as_interrupt():
                _Pool(work, min(workers, work.total), device, about, limits).run(watch, deadline)
    finally:
        mark_interrupted(work.runs, work.out)


class _Pool:
    """Worker processes that make the runs of a call."""

    def __init__(self, work: RunQueue, workers: int, device: str, about: dict[str, str], limits: Limits):
        self._work = work
        self._start = functools.partial(Worker, work.out, device, about, limits)
        self._workers = [self._start() for _ in range(workers)]
        self._attempts: dict[str, int] = {}

    def run(self, watch: Watch, deadline: float) -> None:
        """Make all runs; whatever ends this early, the workers are gone afterwards."""
        try:
            self._hand_out()
            while self._running() or self._work.waiting:
                pipes = [w.pipe for w in self._workers]
                wait([*pipes, *(w.process.sentinel for w in self._workers)], _POLL_SECONDS)
                ended = [event for w in list(self._workers) for event in self._look(w)]
                self._hand_out()
                running = self._running()
                watch(ended + running)
                if (running or self._work.waiting) and time.monotonic() > deadline:
                    raise OutOfTime
        finally:
            self._stop()

    def _hand_out(self) -> None:
        """Give idle workers what is left."""
        for worker in self._workers:
            if worker.run is None and (run := self._work.next()):
                self._attempts[run.fingerprint] = self._attempts.get(run.fingerprint, 0) + 1
                worker.hand(run)

    def _running(self) -> list[Event]:
        runs = [w.run for w in self._workers if w.run]
        return [Event(r, "running", RunFolder(self._work.out, r.fingerprint)) for r in runs]

    def _look(self, worker: Worker) -> list[Event]:
        """Take in what a worker has said, whether it lives, and whether its run went too far."""
        dead = not worker.process.is_alive()  # asked first: what it said before is still heard
        run, ended = worker.run, False
        for word in worker.poll_messages():
            if word == "ended":
                worker.run, worker.monitor, ended = None, None, True
            elif word == "elsewhere":
                worker.run = None
                if run:
                    self._attempts[run.fingerprint] -= 1
                    self._work.requeue(run, _ELSEWHERE_SECONDS)
            else:
                raise word
        if dead:
            self._workers[self._workers.index(worker)] = self._start()
            if worker.run:
                ended = self._died(worker, worker.run)
            worker.pipe.close()
        elif worker.monitor and not worker.kill_reason and (reason := worker.monitor.exceeded(_GRACE_SECONDS)):
            worker.kill_reason = reason
            worker.process.kill()
        elif worker.run and not worker.pruned and (reason := self._work.prune_reason(worker.run)):
            worker.prune(reason)
        return [self._work.ended(run)] if run and ended else []

    def _died(self, worker: Worker, run: RunConfig) -> bool:
        """Record why a run lost its worker; False if the run deserves another attempt."""
        folder = RunFolder(self._work.out, run.fingerprint)
        reason, attempt = worker.kill_reason, self._attempts[run.fingerprint]
        if not reason and attempt >= ATTEMPTS and folder.result() is None:
            reason = f"its worker died {attempt} times, {_how_it_ended(worker.process.exitcode)}"
        with folder.lock() as free:  # unless another sweep has taken it up since
            if reason and free:
                folder.fail("failed", reason, "", transient=not worker.kill_reason)
                return True
        self._work.requeue(run)
        return False

    def _stop(self) -> None:
        """End the workers: idle ones at once, others after their step; asked twice, at once."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.process.terminate()
            worker.pipe.close()
        patience = time.monotonic() + _STOP_SECONDS
        try:
            for worker in self._workers:
                worker.process.join(max(patience - time.monotonic(), 0))
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.join()
                worker.process.close()


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"the last time with exit status {exitcode}"
    cause = "; out of memory?" if exitcode == -signal.SIGKILL else ""
    return f"the last time by signal {-exitcode} ({signal.strsignal(-exitcode)}{cause})"


def _in_this_process(
    work: RunQueue, device: str, about: dict[str, str], watch: Watch, deadline: float, limits: Limits
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while run := work.next():
            folder = RunFolder(work.out, run.fingerprint)
            watch([Event(run, "running", folder)])
            attempt(
                folder,
                device,
                about,
                lambda: time.monotonic() > deadline,
                limits,
                functools.partial(work.prune_reason, run),
            )
            watch([work.ended(run)])
            if folder.result() is None and time.monotonic() > deadline:
                raise OutOfTime
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that both end the same clean way."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
