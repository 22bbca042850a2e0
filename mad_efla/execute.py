"""Where runs run: local worker processes, or this process.

A worker takes one run at a time, holds a claim on it, and writes everything into its folder; the
driver follows by reading the folders. So a worker that is killed costs one attempt of one run.
"""

import contextlib
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
from pathlib import Path
from typing import NamedTuple

import torch
from pebble import ProcessFuture, ProcessPool

from mad_efla.config import ConfigError
from mad_efla.lease import Fenced
from mad_efla.run import RunConfig
from mad_efla.store import RunFolder, Status
from mad_efla.train import Interrupted, train

ATTEMPTS = 2  # of a run whose worker was killed under it
_POLL_SECONDS = 0.2

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
) -> None:
    """Make every run that has no result yet; results and failures are in the folders.

    Args:
        runs: What to run.
        out: The folder of run folders.
        device: `cpu` or `cuda`.
        workers: Worker processes; 0 runs everything in this process.
        watch: Told what happens.
        deadline: When to stop, by `time.monotonic`.

    Raises:
        KeyboardInterrupt: Asked to stop; what was running is marked interrupted.
        OutOfTime: The deadline passed; likewise.
    """
    longest_first = sorted(runs, key=lambda r: -r.tokens)
    for run in longest_first:
        RunFolder(out, run.fingerprint).create(run)
    about = environment(device)
    if workers == 0:
        _in_this_process(longest_first, out, device, about, watch, deadline)
        return
    with terminate_as_interrupt():
        _in_workers(longest_first, out, device, workers, about, watch, deadline)


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


# ------------------------------------------------------------------ workers


def _in_workers(
    runs: list[RunConfig],
    out: Path,
    device: str,
    workers: int,
    about: dict[str, str],
    watch: Watch,
    deadline: float,
) -> None:
    os.environ.update(ALLOCATOR | os.environ)
    pool = ProcessPool(
        max_workers=min(workers, len(runs)) or 1,
        context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    attempts: dict[str, int] = {}
    futures: dict[str, ProcessFuture] = {}

    def submit(run: RunConfig) -> None:
        attempts[run.fingerprint] = attempts.get(run.fingerprint, 0) + 1
        futures[run.fingerprint] = pool.schedule(
            _work, args=[run.fingerprint, str(out), device, about]
        )

    waiting = {r.fingerprint: r for r in runs}
    try:
        for run in runs:
            submit(run)
        while waiting:
            time.sleep(_POLL_SECONDS)
            ended = [r for f, r in waiting.items() if futures[f].done()]
            for run in ended:
                if _ended(run, futures[run.fingerprint], out, attempts[run.fingerprint]):
                    del waiting[run.fingerprint]
                else:
                    submit(run)
            watch(_events(ended, waiting, futures, out))
            if waiting and time.monotonic() > deadline:
                raise OutOfTime
        pool.close()
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.join()
        mark_interrupted(runs, out)


def _ended(run: RunConfig, future: ProcessFuture, out: Path, attempt: int) -> bool:
    """Record how a run's worker ended; False if the run deserves another attempt."""
    error = future.exception()
    if error is None:
        return True
    if attempt < ATTEMPTS:
        return False
    RunFolder(out, run.fingerprint).fail(
        "failed",
        f"its worker died {attempt} times: {error}",
        getattr(error, "traceback", ""),
        transient=True,
    )
    return True


def _events(
    ended: list[RunConfig],
    waiting: dict[str, RunConfig],
    futures: dict[str, ProcessFuture],
    out: Path,
) -> list[Event]:
    events = []
    for run in ended:
        if run.fingerprint not in waiting:
            folder = RunFolder(out, run.fingerprint)
            events.append(Event(run, folder.status(), folder))
    for fingerprint, run in waiting.items():
        if futures[fingerprint].running():
            events.append(Event(run, "running", RunFolder(out, fingerprint)))
    return events


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's business
    torch.set_num_threads(1)


def _work(fingerprint: str, out: str, device: str, about: dict[str, str]) -> None:
    """Make one run in a worker; whatever goes wrong is in its folder."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    parent = multiprocessing.parent_process()
    driver = parent.pid if parent else None  # not getppid: the driver may be dead by now
    folder = RunFolder(Path(out), fingerprint)
    with (folder.path / "log.txt").open("a") as log, contextlib.redirect_stderr(log):
        attempt(folder, device, about, lambda: bool(asked) or os.getppid() != driver)
    if asked or os.getppid() != driver:
        os._exit(0)  # the pool is gone


def attempt(
    folder: RunFolder, device: str, about: dict[str, str], stop: Callable[[], bool]
) -> None:
    """Make one run in this process, once it is free; whatever goes wrong is in its folder."""
    with contextlib.suppress(Fenced), _hold(folder, stop) as held:  # a run taken over is not ours
        if not held or folder.result() is not None:  # another sweep may just have made it
            return
        try:
            folder.begin()
            train(folder.run(), folder, device=device, environment=about, stop=stop)
        except Interrupted as error:
            folder.fail("interrupted", str(error), "")
        except Fenced:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            outside = isinstance(error, OSError | MemoryError | torch.OutOfMemoryError)
            folder.fail("failed", reason, traceback.format_exc(), transient=outside)


@contextlib.contextmanager
def _hold(folder: RunFolder, stop: Callable[[], bool]) -> Iterator[bool]:
    """Hold a run, waiting while another sweep makes it; yields False if told to stop waiting."""
    while True:
        with folder.lock() as free:
            if free:
                yield True
                return
        if stop():
            yield False
            return
        time.sleep(_POLL_SECONDS)


def _in_this_process(
    runs: list[RunConfig],
    out: Path,
    device: str,
    about: dict[str, str],
    watch: Watch,
    deadline: float,
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in runs:
            folder = RunFolder(out, run.fingerprint)
            watch([Event(run, "running", folder)])
            attempt(folder, device, about, lambda: time.monotonic() > deadline)
            watch([Event(run, folder.status(), folder)])
            if folder.result() is None and time.monotonic() > deadline:
                raise OutOfTime
    finally:
        torch.set_num_threads(threads)
        mark_interrupted(runs, out)


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
