"""Where runs run: local worker processes, or this process.

A worker takes one run at a time, the longest that is left, holds a claim on it, and writes
everything into its folder; the driver follows by reading the folders. So a worker that is killed
costs one attempt of one run, and all workers end together.
"""

import contextlib
import functools
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mad_efla import shared
from mad_efla.config import ConfigError
from mad_efla.estimate import Costs
from mad_efla.lease import Fenced
from mad_efla.run import Limits, RunConfig
from mad_efla.store import RunFolder, Status
from mad_efla.train import Interrupted, train

NO_LIMITS = Limits()
ATTEMPTS = 2  # of a run whose worker was killed under it
_POLL_SECONDS = 0.2
_STOP_SECONDS = 30.0  # for a worker to finish its step and write a checkpoint
_ELSEWHERE_SECONDS = 2.0  # until a run that another sweep makes is looked at again
_GRACE_SECONDS = 10.0  # for a run to notice by itself that its time is over

# glibc: keep freed memory instead of handing it back; a training step is 5 to 10 % faster.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_MMAP_THRESHOLD_": "33554432"}


class Event(NamedTuple):
    """How a run stands: `running`, or the status it has just ended with."""

    run: RunConfig
    status: Status
    folder: RunFolder


Watch = Callable[[list[Event]], None]
"""Called a few times a second with what is running or has just ended."""


class OutOfTime(Exception):
    """The time that was allowed is over; what was running goes on with the next call."""


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
    work = Work(runs, out, costs or Costs(runs))
    perform(
        work, device=device, workers=workers, watch=watch, deadline=deadline, limits=limits
    )  # fmt: skip


def perform(
    work: "Work",
    *,
    device: str,
    workers: int,
    watch: Watch = lambda events: None,
    deadline: float = math.inf,
    limits: Limits = NO_LIMITS,
) -> None:
    """Do work until there is none left; as `execute`, of which this is the general form."""
    about = environment(device)
    try:
        if workers == 0:
            _in_this_process(work, device, about, watch, deadline, limits)
        else:
            with terminate_as_interrupt():
                _Pool(work, min(workers, work.total), device, about, limits).run(watch, deadline)
    finally:
        mark_interrupted(work.runs, work.out)


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


# ------------------------------------------------------------------ the pool


class Work:
    """The runs that are to be made: which is next, and what each one's end teaches.

    Args:
        runs: What to run.
        out: The folder of run folders.
        costs: What is known of the runs' costs.
    """

    def __init__(self, runs: list[RunConfig], out: Path, costs: Costs):
        self.runs, self.out, self.costs = runs, out, costs
        self.waiting = {r.fingerprint: r for r in runs}
        self._not_before: dict[str, float] = {}
        self.needs = shared.Needs(out / shared.FOLDER, runs)
        for run in runs:
            RunFolder(out, run.fingerprint).create(run)

    @property
    def total(self) -> int:
        """How many there are to be."""
        return len(self.runs)

    def next(self) -> RunConfig | None:
        """Take the longest that is left; None if there is none, or none just now."""
        now = time.monotonic()
        free = [f for f in self.waiting if self._not_before.get(f, now) <= now]
        return self.waiting.pop(self.costs.longest(free)) if free else None

    def again(self, run: RunConfig, later: float = 0.0) -> None:
        """Put a run back that has lost its worker, or that another sweep is making.

        Args:
            run: Which.
            later: Seconds until it is handed out again.
        """
        self.waiting[run.fingerprint] = run
        self._not_before[run.fingerprint] = time.monotonic() + later

    def verdict(self, run: RunConfig) -> str:
        """Say why a run under way should be ended; empty to let it go on."""
        del run
        return ""

    def __iter__(self) -> Iterator[RunConfig]:
        """Take one after the other."""
        while run := self.next():
            yield run

    def ended(self, run: RunConfig) -> Event:
        """Take note that a run needs nothing more."""
        folder = RunFolder(self.out, run.fingerprint)
        result = folder.result()
        if result:
            self.costs.learn(run.fingerprint, result)
        self.needs.drop(run)
        return Event(run, folder.status(), folder)


class _Worker:
    """A worker process, seen from the driver.

    Attributes:
        process: It.
        pipe: Runs go out; `began` and `ended` come back, or what a full disk says.
        run: What it makes; None while it is idle.
        meter: How long and how large its run has grown, from when it began.
        doomed: Why it was killed by us.
        pruned: Whether its run was told to end.
    """

    def __init__(self, arguments: tuple[object, ...]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self.run: RunConfig | None = None
        self.meter: _Meter | None = None
        self.doomed, self.pruned = "", False
        # Ctrl-C is the driver's business, from the worker's first moment on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def hand(self, run: RunConfig) -> None:
        """Give it a run; if it is dead by now, its end will be seen."""
        self.run, self.meter, self.pruned = run, None, False
        with contextlib.suppress(OSError):
            self.pipe.send(("run", run.fingerprint))

    def prune(self, reason: str) -> None:
        """Tell its run to end after the step it is at."""
        self.pruned = True
        with contextlib.suppress(OSError):
            self.pipe.send(("prune", reason))

    def heard(self) -> list[Any]:
        """Return what it has said."""
        said = []
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                said.append(self.pipe.recv())
        return said


class _Pool:
    """Worker processes that make the runs of a call."""

    def __init__(
        self, work: Work, workers: int, device: str, about: dict[str, str], limits: Limits
    ):
        os.environ.update(ALLOCATOR | os.environ)
        self._work, self._limits = work, limits
        self._arguments = (str(work.out), device, about, limits)
        self._workers = [_Worker(self._arguments) for _ in range(workers)]
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

    def _look(self, worker: _Worker) -> list[Event]:
        """Take in what a worker has said, whether it lives, and whether its run went too far."""
        dead = not worker.process.is_alive()  # asked first: what it said before is still heard
        run, ended = worker.run, False
        for word in worker.heard():
            if word == "began":
                worker.meter = _Meter(self._limits, worker.process.pid)
            elif word == "ended":
                worker.run, worker.meter, ended = None, None, True
            elif word == "elsewhere":
                worker.run = None
                if run:
                    self._attempts[run.fingerprint] -= 1
                    self._work.again(run, _ELSEWHERE_SECONDS)
            else:
                raise word
        if dead:
            self._workers[self._workers.index(worker)] = _Worker(self._arguments)
            if worker.run:
                ended = self._died(worker, worker.run)
            worker.pipe.close()
        elif worker.meter and not worker.doomed and (reason := worker.meter.passed(_GRACE_SECONDS)):
            worker.doomed = reason
            worker.process.kill()
        elif worker.run and not worker.pruned and (reason := self._work.verdict(worker.run)):
            worker.prune(reason)
        return [self._work.ended(run)] if run and ended else []

    def _died(self, worker: _Worker, run: RunConfig) -> bool:
        """Record why a run lost its worker; False if the run deserves another attempt."""
        folder = RunFolder(self._work.out, run.fingerprint)
        reason, attempt = worker.doomed, self._attempts[run.fingerprint]
        if not reason and attempt >= ATTEMPTS and folder.result() is None:
            reason = f"its worker died {attempt} times, {_how_it_ended(worker.process.exitcode)}"
        with folder.lock() as free:  # unless another sweep has taken it up since
            if reason and free:
                folder.fail("failed", reason, "", transient=not worker.doomed)
                return True
        self._work.again(run)
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


# ------------------------------------------------------------------ a worker


def _serve(pipe: Connection, out: str, device: str, about: dict[str, str], limits: Limits) -> None:
    """Make runs until the driver has no more, says stop, or is dead."""
    asked: list[int] = []
    pruned: list[str] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    driver = parent.pid if parent else None  # not getppid: the driver may be dead by now

    def stop() -> bool:
        return bool(asked) or os.getppid() != driver

    def verdict() -> str:
        try:
            while not pruned and pipe.poll():
                pruned.append(pipe.recv()[1])
        except (EOFError, OSError):
            asked.append(0)  # the driver is dead
        return pruned[0] if pruned else ""

    with contextlib.suppress(EOFError, OSError):  # the pipe is closed
        while not stop():
            word, text = pipe.recv()
            if word == "prune":  # it had ended before it heard of it
                continue
            pruned.clear()
            folder = RunFolder(Path(out), text)
            try:
                with (folder.path / "log.txt").open("a") as log, contextlib.redirect_stderr(log):
                    began = functools.partial(pipe.send, "began")
                    made = attempt(folder, device, about, stop, limits, verdict, began, wait=False)
                pipe.send("ended" if made else "elsewhere")
            except OSError as error:  # not even the failure could be written
                pipe.send(error)
    os._exit(0)  # the interpreter would take a while to say goodbye


class _Meter:
    """How long a run takes and how large its process grows, against its limits.

    Args:
        limits: Of the run.
        process: Its process.
    """

    def __init__(self, limits: Limits, process: int | None):
        self._limits, self._process = limits, process
        self._since = time.monotonic()

    def passed(self, grace: float = 0.0) -> str:
        """Say which limit has been passed; empty for none.

        Args:
            grace: Seconds to be added to the limit of time.
        """
        minutes, memory = self._limits.minutes, self._limits.memory_gib
        if minutes is not None and time.monotonic() - self._since > 60 * minutes + grace:
            return f"time limit of {minutes:g} min reached"
        if memory is not None and _resident(self._process) > memory * 2**30:
            return f"memory limit of {memory:g} GiB reached"
        return ""


def _resident(process: int | None) -> int:
    """Return the resident bytes of a process; 0 where the system does not tell."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = Path(f"/proc/{process or 'self'}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0


def attempt(
    folder: RunFolder,
    device: str,
    about: dict[str, str],
    stop: Callable[[], bool],
    limits: Limits = NO_LIMITS,
    verdict: Callable[[], str] = lambda: "",
    began: Callable[[], None] = lambda: None,
    *,
    wait: bool = True,
) -> bool:
    """Make one run in this process; whatever goes wrong is in its folder.

    Args:
        folder: Of the run, with its configuration.
        device: `cpu` or `cuda`.
        about: Of the surroundings, for the result.
        stop: Asked after every step; when true, a checkpoint is written and the run interrupted.
        limits: How long and how large it may grow.
        verdict: Asked after every step: why a search ends it here; empty to go on.
        began: Called once the run is ours.
        wait: Wait while another sweep makes it.

    Returns:
        False if another sweep has it.
    """
    try:
        with _hold(folder, stop, wait) as held:
            if held and folder.result() is None:  # another sweep may just have made it
                began()
                _make(folder, device, about, stop, limits, verdict)
            return held
    except Fenced:  # a run taken over is not ours
        return False


def _make(
    folder: RunFolder,
    device: str,
    about: dict[str, str],
    stop: Callable[[], bool],
    limits: Limits,
    verdict: Callable[[], str],
) -> None:
    meter = _Meter(limits, None)
    try:
        folder.begin()
        train(
            folder.run(), folder, device=device, environment=about,
            stop=lambda: stop() or bool(meter.passed() or verdict()),
        )  # fmt: skip
    except Interrupted as error:
        if reason := verdict():
            folder.fail("pruned", reason, "")
        elif reason := meter.passed():
            folder.fail("failed", reason, "")
        else:
            folder.fail("interrupted", str(error), "")
    except Fenced:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        outside = isinstance(error, OSError | MemoryError | torch.OutOfMemoryError)
        folder.fail("failed", reason, traceback.format_exc(), transient=outside)


@contextlib.contextmanager
def _hold(folder: RunFolder, stop: Callable[[], bool], wait: bool) -> Iterator[bool]:
    """Hold a run, or wait while another sweep makes it; yields False if it is not to be had."""
    while True:
        with folder.lock() as free:
            if free:
                yield True
                return
        if not wait or stop():
            yield False
            return
        time.sleep(_POLL_SECONDS)


def _in_this_process(
    work: Work,
    device: str,
    about: dict[str, str],
    watch: Watch,
    deadline: float,
    limits: Limits,
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while run := work.next():
            folder = RunFolder(work.out, run.fingerprint)
            watch([Event(run, "running", folder)])
            attempt(
                folder, device, about, lambda: time.monotonic() > deadline, limits,
                functools.partial(work.verdict, run),
            )  # fmt: skip
            watch([work.ended(run)])
            if folder.result() is None and time.monotonic() > deadline:
                raise OutOfTime
    finally:
        torch.set_num_threads(threads)


def mark_interrupted(runs: list[RunConfig], out: Path) -> None:
    """Mark what was begun and neither ended nor said why."""
    for run in runs:
        folder = RunFolder(out, run.fingerprint)
        if folder.status() == "interrupted" and folder.failure() is None:
            folder.fail("interrupted", "stopped with the sweep", "")


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


# ------------------------------------------------------------------ surroundings


def _cpu_has_bfloat16() -> bool:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            flags = Path("/proc/cpuinfo").read_text().split()
            return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def _cpu_name() -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
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
    done = subprocess.run(
        ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
