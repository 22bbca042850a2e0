"""What executors share that hand runs to somebody else's scheduler."""

import time
from collections.abc import Callable

from mad_efla.execution.queue import Event, OutOfTime, RunQueue, Watch
from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder

_POLL_SECONDS = 0.5


def follow(
    work: RunQueue,
    runs: list[RunConfig],
    *,
    ended: Callable[[RunConfig], bool],
    slots: Callable[[], int],
    watch: Watch,
    deadline: float,
) -> None:
    """Watch runs that a scheduler makes, in the order they were handed to it, until all ended.

    Args:
        work: Whose runs they are.
        runs: In that order.
        ended: Asked again and again whether the scheduler is done with a run.
        slots: How many runs can be under way at once; twice as many are looked at.
        watch: Told what happens.
        deadline: When to stop, by `time.monotonic`.

    Raises:
        OutOfTime: The deadline passed.
    """
    waiting = {r.fingerprint: r for r in runs}
    while waiting:
        begun = time.monotonic()
        over = [run for run in waiting.values() if ended(run)]
        for run in over:
            del waiting[run.fingerprint]
        first = list(waiting.values())[: 2 * slots()]
        folders = [(run, RunFolder(work.out, run.fingerprint)) for run in first]
        running = [Event(r, "running", f) for r, f in folders if f.status() == "running"]
        watch([work.ended(run) for run in over] + running)
        if waiting:
            if time.monotonic() > deadline:
                raise OutOfTime
            looked = time.monotonic() - begun  # long where a slow server holds the folders
            time.sleep(max(_POLL_SECONDS, 4 * looked))
