"""The first hour of somebody who has just installed the package: every wrong turn, tried from outside.

    python -m tests.first_hour              every row
    python -m tests.first_hour locks link   rows whose names hold one of these words

A row is a function of an empty folder. It calls the `mad-efla` that stands beside this interpreter,
as a user would, and returns the sentence that the user saw, or raises `Bad` with it. A line is
printed for each; the exit status is 1 if any is bad. A traceback is always bad. To add a row, write
a function and put it at the end of `ROWS`.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TASK = "task: {name: recall, vocab_size: 8, seq_len: 12}\n"
PLAN = """
protocol: custom
mixers: [{name: efla, heads: 2}]
settings: baseline
seeds: [0, 1]
model: {width: 16, depth: 1}
data: {train_examples: 64, validation_examples: 32, test_examples: 32}
train: {batch_size: 16, steps: 20, eval_every: 10}
"""
SWEEP = ("sweep", "task.yaml", "--plan", "plan.yaml", "--no-tracking", "--device", "cpu", "--workers", "2")
REFUSE = """
import errno, fcntl, os, stat
def refuse(*arguments, **options):
    raise OSError(errno.ENOLCK, "No locks available")
"""


class Bad(Exception):
    """What the user saw, and it should have been something else."""


def call(folder: Path, *command: str, code: int = 0, patch: str = "", environment: dict[str, str] | None = None) -> str:
    """Call `mad-efla` in a folder; return all that it said.

    Args:
        folder: Where; a tiny task and plan are put there.
        command: Its arguments.
        code: The exit status that is right.
        patch: Python that every process of it runs first: what a strange machine would do.
        environment: Variables beside this process's own.

    Raises:
        Bad: It ended otherwise, or with a traceback.
    """
    for name, text in (("task.yaml", TASK), ("plan.yaml", PLAN)):
        if not (folder / name).exists():
            (folder / name).write_text(text, encoding="utf-8")
    patches = folder / ".patch"
    patches.mkdir(exist_ok=True)
    (patches / "sitecustomize.py").write_text(patch, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(patches), str(folder), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [Path(sys.executable).with_name("mad-efla"), *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"} | (environment or {}),
        capture_output=True,
        timeout=1800,
    )
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    if "Traceback" in said or done.returncode != code:
        raise Bad(f"exit status {done.returncode}: {_last(said)}")
    return said


def expect(said: str, pattern: str) -> str:
    """Return the line that a pattern is found in.

    Raises:
        Bad: There is none.
    """
    for line in said.splitlines():
        if re.search(pattern, line):
            return line.strip()
    raise Bad(f"no {pattern!r} in: {_last(said)}")


def _last(said: str) -> str:
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "nothing was said")


def both_done(folder: Path, said: str) -> str:
    """Return a sentence once both runs of the sweep are done.

    Raises:
        Bad: They are not.
    """
    del said
    return expect(call(folder, "status", "runs"), r"2 runs: 2 finished")


# ------------------------------------------------------------------ places


def long_tmpdir(folder: Path) -> str:
    """TMPDIR of 95 characters: names of sockets are 107 at most."""
    long = Path(tempfile.gettempdir()) / ("t" * (94 - len(tempfile.gettempdir())))
    long.mkdir(exist_ok=True)
    try:
        return both_done(folder, call(folder, *SWEEP, environment={"TMPDIR": str(long)}))
    finally:
        with contextlib.suppress(OSError):
            long.rmdir()


def no_hard_links(folder: Path) -> str:
    """A file system without hard links."""
    return both_done(folder, call(folder, *SWEEP, patch=REFUSE + "os.link = refuse"))


def no_file_locks(folder: Path) -> str:
    """A file system that refuses to lock files."""
    return both_done(folder, call(folder, *SWEEP, patch=REFUSE + "fcntl.flock = refuse"))


def no_synced_folders(folder: Path) -> str:
    """A file system whose folders cannot be synced."""
    patch = REFUSE + "sync = os.fsync\nos.fsync = lambda f: refuse() if stat.S_ISDIR(os.fstat(f).st_mode) else sync(f)"
    return both_done(folder, call(folder, *SWEEP, patch=patch))


def no_home(folder: Path) -> str:
    """A home that is not there and cannot be made."""
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"), "/proc/none")
    said = call(folder, *SWEEP, environment=nowhere)
    call(folder, "report", "runs", environment=nowhere)
    return both_done(folder, said)


def out_that_cannot_be_written(folder: Path) -> str:
    """`--out` in a place where nothing can be made."""
    return expect(call(folder, *SWEEP, "--out", "/proc/none", code=2), "--out /proc/none: cannot be written")


def out_named_like_a_task(folder: Path) -> str:
    """`--out recall`, and then the task `recall` again."""
    (folder / "recall").mkdir()
    said = call(folder, "sweep", "recall", "--plan", "plan.yaml", "--out", "recall", "--dry-run")
    return expect(said, r"\d+ runs, 0 of them done")


# ------------------------------------------------------------------ caches


def broken_loops(folder: Path) -> str:
    """Compiled loops on disk that were cut to nothing."""
    cache = folder / "numba"
    call(folder, *SWEEP, environment={"NUMBA_CACHE_DIR": str(cache)})
    before = {p.name: (p / "model.pt").read_bytes() for p in (folder / "runs").glob("*") if (p / "model.pt").exists()}
    for file in (*cache.rglob("*.nbi"), *cache.rglob("*.nbc")):
        file.write_bytes(b"")
    call(folder, *SWEEP, "--out", "again", environment={"NUMBA_CACHE_DIR": str(cache)})
    if before != {p.name: (p / "model.pt").read_bytes() for p in (folder / "again").glob("*") if p.name in before}:
        raise Bad("other bits")
    return f"{len(before)} runs of equal bits"


# ------------------------------------------------------------------ one bad folder


def one_bad_folder(folder: Path) -> str:
    """A run without its configuration, beside one that is whole."""
    call(folder, *SWEEP)
    next((folder / "runs").glob("*/config.json")).unlink()
    for command in ("status", "score", "results", "report"):
        said = expect(call(folder, command, "runs"), "cannot be read")
    return said


def plug_in_gone(folder: Path) -> str:
    """A run of a mixer whose module cannot be imported any more."""
    (folder / "mine.py").write_text(
        "from mad_efla.mixers.identity import Identity\n\n\n"
        "class Mine(Identity):\n    class Config(Identity.Config):\n        name: str\n",
        encoding="utf-8",
    )
    call(folder, *SWEEP, "--set", "mixers=[efla, 'mine:Mine']")
    (folder / "mine.py").unlink()
    for command in ("status", "score", "results", "report"):
        said = expect(call(folder, command, "runs"), "mine:Mine.*importable from here")
    return said


# ------------------------------------------------------------------ processes


def task_with_processes(folder: Path) -> str:
    """A task that starts processes of its own, with workers and without."""
    (folder / "mine.py").write_text(
        "import multiprocessing\nfrom mad_efla.tasks.recall import Recall\n\n\nclass Mine(Recall):\n    name: str\n"
        "    def sample(self, n, rng, split, world=None):\n"
        "        with multiprocessing.Pool(2) as pool:\n            pool.map(abs, [1, 2])\n"
        "        return super().sample(n, rng, split, world)\n",
        encoding="utf-8",
    )
    (folder / "task.yaml").write_text(TASK.replace("recall", "'mine:Mine'"), encoding="utf-8")
    for workers, out in (("0", "here"), ("2", "runs")):
        call(folder, *SWEEP[:-1], workers, "--out", out)
    scores = [re.findall(r"[\d.]+", call(folder, "score", out, "--csv")) for out in ("here", "runs")]
    if scores[0] != scores[1]:
        raise Bad("other scores with workers than without")
    return both_done(folder, "")


# ------------------------------------------------------------------ text


def c_locale(folder: Path) -> str:
    """The C locale, a terminal of ASCII, and words that are neither."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    (folder / "task.yaml").write_text("# Schlüssel → Wert\n" + TASK, encoding="utf-8")
    (folder / "plan.yaml").write_text(f'about: "Größe"\n{PLAN}', encoding="utf-8")
    notes = "# Über uns\r\n\r\ncafé\r\n\r\n## Was ich tat: größer\r\n".encode()
    (folder / "notes.md").write_bytes(notes)
    call(folder, *SWEEP, environment=ascii_only)
    call(folder, "results", "runs", "--into", "notes.md", environment=ascii_only)
    call(folder, "report", "runs", environment=ascii_only)
    if not (folder / "notes.md").read_bytes().startswith(notes):
        raise Bad("--into changed bytes of the user's own")
    return both_done(folder, "")


# ------------------------------------------------------------------ layers


def layer_that_reaches_out(folder: Path) -> str:
    """A layer that throws global switches, beside one that does not."""
    (folder / "mine.py").write_text(
        "import torch\nfrom mad_efla.mixers.identity import Identity\n\n\n"
        "class Mine(Identity):\n    class Config(Identity.Config):\n        name: str\n"
        "    def forward(self, x):\n        torch.set_num_threads(2)\n"
        "        torch.use_deterministic_algorithms(True, warn_only=True)\n        return x\n",
        encoding="utf-8",
    )
    call(folder, *SWEEP, "--out", "alone")
    call(folder, *SWEEP[:-1], "1", "--set", "mixers=['mine:Mine', {name: efla, heads: 2}]")
    for path in (folder / "alone").glob("*/model.pt"):
        if path.read_bytes() != (folder / "runs" / path.parent.name / "model.pt").read_bytes():
            raise Bad("its neighbour has other weights")
    return expect(call(folder, "status", "runs"), "4 finished")


ROWS: list[Callable[[Path], str]] = [
    long_tmpdir,
    no_hard_links,
    no_file_locks,
    no_synced_folders,
    no_home,
    out_that_cannot_be_written,
    out_named_like_a_task,
    broken_loops,
    one_bad_folder,
    plug_in_gone,
    task_with_processes,
    c_locale,
    layer_that_reaches_out,
]


def main(words: list[str]) -> int:
    """Try rows, print a line for each; return the exit status."""
    bad = 0
    for row in ROWS:
        if words and not any(word in row.__name__ for word in words):
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="first-hour-") as folder:
            try:
                outcome, said = "ok", row(Path(folder))
            except (Bad, subprocess.TimeoutExpired) as error:
                outcome, said, bad = "bad", str(error), bad + 1
        print(f"{outcome:<4} {row.__name__:<28} {time.monotonic() - begun:4.0f} s  {said}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
