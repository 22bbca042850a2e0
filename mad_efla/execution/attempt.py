"""One attempt of a run, in this process: hold its claim, train it, write down what went wrong."""

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mad_efla import spectrum
from mad_efla.config import ConfigError
from mad_efla.plan.run import Limits, check_code
from mad_efla.runs.claims import Fenced
from mad_efla.runs.folder import RunFolder
from mad_efla.training.loop import Interrupted, train

NO_LIMITS = Limits()
_POLL_SECONDS = 0.2


class LimitMonitor:
    """How long a run takes and how large its process grows, against its limits.

    Args:
        limits: Of the run.
        process: Its process.
    """

    def __init__(self, limits: Limits, process: int | None):
        self._limits, self._process = limits, process
        self._since = time.monotonic()

    def exceeded(self, grace: float = 0.0) -> str:
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
        pages = Path(f"/proc/{process or 'self'}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0


def attempt(
    folder: RunFolder,
    device: str,
    about: dict[str, str],
    stop: Callable[[], bool],
    limits: Limits = NO_LIMITS,
    prune_reason: Callable[[], str] = lambda: "",
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
        prune_reason: Asked after every step: why a search ends it here; empty to go on.
        began: Called once the run is ours.
        wait: Wait while another sweep makes it.

    Returns:
        False if another sweep has it.
    """
    try:
        with _hold(folder, stop, wait) as held:
            if held and folder.result() is None:  # another sweep may just have made it
                folder.quarantine()
                began()
                _make(folder, device, about, stop, limits, prune_reason)
            return held
    except Fenced:  # a run taken over is not ours
        return False
    except ConfigError:  # a newer version's: nothing of it is touched
        return True


def _make(
    folder: RunFolder,
    device: str,
    about: dict[str, str],
    stop: Callable[[], bool],
    limits: Limits,
    prune_reason: Callable[[], str],
) -> None:
    monitor = LimitMonitor(limits, None)
    try:
        folder.begin()
        run = folder.run()
        check_code(run)
        train(
            run,
            folder,
            device=device,
            environment=about,
            stop=lambda: stop() or bool(monitor.exceeded() or prune_reason()),
            look=spectrum.training_scalars,
        )
    except Interrupted as error:
        if reason := prune_reason():
            folder.fail("pruned", reason, "")
        elif reason := monitor.exceeded():
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
