"""Data: a task and a seed give disjoint train, validation and test arrays, always the same bytes.

Examples come in blocks, each from its own counter-based stream keyed by (seed, split, block). So a
training set of 800 is the beginning of the one of 12,800, the test set is the same whatever is
trained on, and memory and result do not depend on who generates what.

A real task's examples are there already. Its test split is the beginning of the test part of its
corpus, the same for every seed; the seed draws validation and training split from the other part.
"""

import contextlib
import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mad_efla.config import ConfigError, canonical_json
from mad_efla.plan.run import DataConfig
from mad_efla.tasks import IGNORE, Examples, Probe, RealTask, Split, Task

BLOCK = 512
SPLITS: tuple[Split, ...] = ("test", "validation", "train")  # a later split gives way to an earlier
_MAX_REDRAWS = 20


class Data(NamedTuple):
    """The three splits of a task under one seed.

    Attributes:
        train: Examples to train on.
        validation: Examples that choose.
        test: Examples that score.
        digest: Hash of every generated token and target: equal digests, equal data.
        world: What the splits share (see `Task.world`); None for most tasks.
    """

    train: Examples
    validation: Examples
    test: Examples
    digest: str
    world: Any


def make(task: Task, seed: int, sizes: DataConfig | None = None) -> Data:
    """Generate a task's data.

    Args:
        task: What to generate.
        seed: Equal seeds give equal bytes on any machine.
        sizes: Examples of each split; the published numbers by default.

    Raises:
        ConfigError: The task has too few distinct sequences to keep the splits apart, or a real
            one fewer examples than asked for.
    """
    sizes = sizes or DataConfig()
    if isinstance(task, RealTask):
        splits = _drawn(task, seed, sizes)
        return Data(**splits, digest=digest(splits), world=None)
    world = task.world(stream(seed, "world"))
    taken: set[bytes] = set()
    splits: dict[str, Examples] = {}
    for split in SPLITS:
        examples = _draw(task, seed, split, getattr(sizes, f"{split}_examples"), world, taken)
        taken |= {row.tobytes() for row in examples.inputs}
        splits[split] = examples
    return Data(**splits, digest=digest(splits), world=world)


def digest(splits: dict[str, Examples]) -> str:
    """Hash every token and target of the splits: equal digests, equal data."""
    sha = hashlib.sha256()
    for split in sorted(splits):
        for column in splits[split]:
            if column is not None:
                sha.update(f"{split}{column.dtype}{column.shape}".encode())
                sha.update(np.ascontiguousarray(column).data)
    return sha.hexdigest()[:16]


def check(task: Task, sizes: DataConfig) -> None:
    """Find out whether a real task's examples are there, and as many as asked for.

    Raises:
        ConfigError: They are not.
    """
    if not isinstance(task, RealTask):
        return
    corpus = task.corpus()
    learned = sizes.train_examples + sizes.validation_examples
    for field, asked, part in (
        ("train_examples + data.validation_examples", learned, corpus.train),
        ("test_examples", sizes.test_examples, corpus.test),
    ):
        if asked > len(part.inputs):
            raise ConfigError(
                f"task {task.name}: data.{field}={asked} must be at most {len(part.inputs)}, the "
                "examples there are; ask for fewer"
            )


def probes(task: Task, test: Examples, seed: int) -> Iterator[Probe]:
    """Yield what a task tests beside its test split; equal seeds, equal bytes."""
    yield from task.probes(test, lambda name: stream(seed, "probe", name))


def ceiling(task: Task, data: Data) -> float:
    """Return the share of scored test positions that anything could answer.

    A position counts if its answer follows from what stands before it or was in the training set;
    1.0 for most tasks. See `Task.answerable`.
    """
    answerable = task.answerable(data.test, data.train, data.world)
    return float(answerable.sum() / (data.test.targets != IGNORE).sum())


def chance(data: Data) -> float:
    """Return the share of scored test positions that one answer to everything gets right.

    It is the commonest answer of the training split, which is what a model can learn without
    looking at what it reads: 1/64 where 64 values are equally likely.
    """
    seen = data.train.targets[data.train.targets != IGNORE]
    asked = data.test.targets[data.test.targets != IGNORE]
    return float((asked == np.bincount(seen).argmax()).mean())


def save(folder: Path, task: Task, seed: int, sizes: DataConfig, label: str, splits: Iterable[Split]) -> Iterator[Path]:
    """Write splits of a task's data as `.npz` files that need nothing of ours to be read.

    Each holds `inputs`, `targets`, `next_tokens` where the task has them, and as text `config`
    (JSON: task, sizes, seed, setting, split), `version` (of the generator) and `digest` (of all
    three splits). A file of the same name is replaced, whole or not at all.

    Args:
        folder: Where; made if it is not there.
        task: What to generate.
        seed: Equal seeds give equal files.
        sizes: Examples of each split.
        label: What to call the setting in file names.
        splits: Which to write.

    Yields:
        The path of each file, written.

    Raises:
        ConfigError: The folder or a file in it cannot be written.
    """
    made = make(task, seed, sizes)
    stem = re.sub(r"[^\w.=+-]", "_", f"{task.name}-{label}-seed{seed}")
    for split in splits:
        resolved = {
            "task": task.model_dump(),
            "data": sizes.model_dump(),
            "seed": seed,
            "setting": label,
            "split": split,
        }
        path = folder / f"{stem}-{split}.npz"
        columns = {k: v for k, v in getattr(made, split)._asdict().items() if v is not None}
        _write(
            path,
            columns
            | {
                "config": np.array(canonical_json(resolved)),
                "version": np.array(type(task).version),
                "digest": np.array(made.digest),
            },
        )
        yield path


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ConfigError(f"{path}: {error.strerror or error}; name another --out") from None


def stream(seed: int, *key: str | int) -> np.random.Generator:
    """Return the random stream of (seed, key): independent of every other key's."""
    spawn = tuple(zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=spawn)))


def _drawn(task: RealTask, seed: int, sizes: DataConfig) -> dict[str, Examples]:
    """Take the splits of a real task from its corpus, disjoint by index."""
    check(task, sizes)
    corpus = task.corpus()
    order = stream(seed, "splits").permutation(len(corpus.train.inputs))
    held = sizes.validation_examples
    return {
        "test": corpus.test.rows(slice(sizes.test_examples)),
        "validation": corpus.train.rows(order[:held]),
        "train": corpus.train.rows(order[held : held + sizes.train_examples]),
    }


def _draw(task: Task, seed: int, split: Split, n: int, world: Any, taken: set[bytes]) -> Examples:
    blocks = []
    for block in range(-(-n // BLOCK)):
        examples = task.sample(BLOCK, stream(seed, split, block), split, world)
        blocks.append(_apart(task, examples, seed, split, block, world, taken))
    return Examples(
        inputs=np.concatenate([b.inputs for b in blocks])[:n],
        targets=np.concatenate([b.targets for b in blocks])[:n],
        next_tokens=None if blocks[0].next_tokens is None else np.concatenate([b.next_tokens for b in blocks])[:n],
    )


def _apart(
    task: Task, examples: Examples, seed: int, split: Split, block: int, world: Any, taken: set[bytes]
) -> Examples:
    """Draw again, from streams of their own, the rows that an earlier split already holds."""
    for attempt in range(1, _MAX_REDRAWS + 1):
        clash = np.array([row.tobytes() in taken for row in examples.inputs])
        if not clash.any():
            return examples
        fresh = task.sample(BLOCK, stream(seed, split, block, attempt), split, world)
        for column, new in zip(examples, fresh, strict=True):
            if column is not None and new is not None:
                column[clash] = new[clash]
    raise ConfigError(
        f"task {task.name}: too few distinct sequences to keep train, validation and test apart; "
        "raise seq_len or vocab_size, or ask for fewer examples"
    )
