"""Data that runs share: generated once, then mapped into the memory of every run that needs it.

    <out>/data/<key>/
      train.inputs.npy, train.targets.npy, ...    an array each, mapped copy-on-write
      digest                                      of all of them, as `data.make` computed it

The key is the hash of all that the bytes depend on. A folder appears whole, by a rename, and is
read through its digest: what is missing, cut or altered is generated again. So it may be removed at
any moment (memory that is mapped stays), and a disk that is full costs time and nothing else. Where
files cannot be locked several processes may generate the same data, of which one's is kept.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mad_efla.config import canonical_json
from mad_efla.config import digest as short_digest
from mad_efla.plan.run import DataConfig, RunConfig, code_of
from mad_efla.runs import claims
from mad_efla.tasks import Examples, Task
from mad_efla.training import data
from mad_efla.training.data import Data

FOLDER = "data"  # beside the run folders
_STALE_SECONDS = 86_400.0  # what a killed driver left, and nobody opened for so long
_log = logging.getLogger(__name__)


def key(task: Task, seed: int, sizes: DataConfig) -> str:
    """Name the data of a task, a seed and sizes; of a task of the user's own, of this version."""
    named = task.model_dump(mode="json"), type(task).version, seed, sizes.model_dump()
    named += tuple(code_of(task, ()).values())
    return short_digest(canonical_json(named))


def load(folder: Path, task: Task, seed: int, sizes: DataConfig) -> Data:
    """Return a task's data, mapped from files that are written by whoever needs them first.

    Args:
        folder: Where they are kept.
        task: What to generate.
        seed: Equal seeds give equal bytes on any machine.
        sizes: Examples of each split.

    Raises:
        ConfigError: As `data.make`.
    """
    path = folder / key(task, seed, sizes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f".{path.name}.lock"):
            found = _read(path, task, seed)
            if found is None:
                if path.exists():
                    _log.warning("%s: is broken and is made again", path)
                made = data.make(task, seed, sizes)
                try:
                    _write(path, made)
                except OSError as error:  # a full disk, or another was first: a run needs data, not files
                    _log.info("%s: cannot be kept: %s", path, error)
                found = _read(path, task, seed) or made
        return found
    except OSError:  # the folder cannot be written at all
        return data.make(task, seed, sizes)


class Needs:
    """Which data the runs of a call still need; what nobody needs any more is removed.

    Args:
        folder: Where it is kept.
        runs: The runs that are to be made.
    """

    def __init__(self, folder: Path, runs: Iterable[RunConfig]):
        self._folder = folder
        self._keys: dict[str, str] = {}
        self._left: Counter[str] = Counter()
        for run in runs:
            self.add(run)
        left = list(folder.glob("*"))  # of calls that were killed
        now = claims.clock(folder) if left else 0.0
        for path in left:
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > _STALE_SECONDS:
                    _remove(path)

    def add(self, run: RunConfig) -> None:
        """Take note of another run."""
        self._keys[run.fingerprint] = key(run.task, run.seed, run.data)
        self._left[self._keys[run.fingerprint]] += 1

    def drop(self, run: RunConfig) -> None:
        """Take note that a run has ended."""
        name = self._keys[run.fingerprint]
        self._left[name] -= 1
        if not self._left[name]:
            _remove(self._folder / name)
            with contextlib.suppress(OSError):
                self._folder.rmdir()  # once it is empty


def _read(path: Path, task: Task, seed: int) -> Data | None:
    try:
        digest = (path / "digest").read_text(encoding="ascii")
        splits = {split: _columns(path, split) for split in data.SPLITS}
        if data.digest(splits) != digest:
            return None
        os.utime(path)
    except (OSError, ValueError, EOFError, TypeError):  # numpy's, for a file that is none of its
        return None
    return Data(**splits, digest=digest, world=task.world(data.stream(seed, "world")))


def _columns(path: Path, split: str) -> Examples:
    found = {}
    for file in path.glob(f"{split}.*.npy"):
        # Copy-on-write: torch wants memory it may write to, and never does.
        mapped = np.load(file, mmap_mode="c", allow_pickle=False)
        found[file.name.split(".")[1]] = mapped.view(np.ndarray)
    return Examples(**found)


def _write(path: Path, made: Data) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.mkdir()
        for split in data.SPLITS:
            for name, column in getattr(made, split)._asdict().items():
                if column is not None:
                    np.save(temporary / f"{split}.{name}.npy", column, allow_pickle=False)
        (temporary / "digest").write_text(made.digest, encoding="ascii")
        shutil.rmtree(path, ignore_errors=True)  # a broken one
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(path: Path) -> None:
    """Take a folder out of sight at once, then its files; and its lock."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)  # it was a file
    with contextlib.suppress(OSError):
        path.with_name(f".{path.name}.lock").unlink()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for whoever else generates, where files can be locked; the lock dies with its process."""
    with path.open("ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
