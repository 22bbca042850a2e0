"""One battery that every task passes, found by discovery; then what each task means."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mad_efla.tasks
from mad_efla import config, data, plugins
from mad_efla.config import ConfigError
from mad_efla.run import DataConfig, build_task
from mad_efla.tasks import IGNORE
from mad_efla.tasks.recall import Recall

NAMES = plugins.names(mad_efla.tasks)
FEW = DataConfig(train_examples=600, validation_examples=100, test_examples=100)

# Random valid settings of each task.
STRATEGIES = {
    "recall": st.builds(
        Recall,
        vocab_size=st.integers(5, 200),
        seq_len=st.integers(2, 60).map(lambda n: 2 * n),
        multi_query=st.booleans(),
    )
}


def any_task():
    return st.one_of(*(STRATEGIES[name] for name in NAMES))


def solved(task, examples, world):
    """Share of scored positions that the solver answers."""
    right = wanted = 0
    for inputs, targets in zip(examples.inputs, examples.targets, strict=True):
        scored = targets != IGNORE
        right += (task.solve(inputs, world)[scored] == targets[scored]).sum()
        wanted += scored.sum()
    return right / wanted


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_valid_and_the_shipped_file_holds_them(name):
    task = plugins.task(name)()
    assert task.name == name
    document = config.read(config.find(name, "tasks"))
    assert build_task(document.part("task")) == task


@given(any_task(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_solver_answers_everything_from_the_prefix(task, seed):
    world = task.world(data.stream(seed, "world"))
    for split in data.SPLITS:
        examples = task.sample(20, data.stream(seed, split), split, world)
        assert solved(task, examples, world) == 1.0
        inputs = examples.inputs[0]
        whole = task.solve(inputs, world)
        for end in (1, len(inputs) // 2, len(inputs)):
            assert np.array_equal(task.solve(inputs[:end], world), whole[:end])


@given(any_task(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_shapes_types_and_ids_are_as_promised(task, seed):
    world = task.world(data.stream(seed, "world"))
    examples = task.sample(30, data.stream(seed, "train"), "train", world)
    assert examples.inputs.shape == examples.targets.shape == (30, task.input_length)
    assert examples.inputs.min() >= 0
    assert examples.inputs.max() < task.vocabulary
    scored = examples.targets != IGNORE
    assert scored.any(axis=1).all()
    assert examples.targets[scored].min() >= 0
    assert examples.targets[scored].max() < task.vocabulary
    assert examples.inputs.dtype == mad_efla.tasks.token_type(task.vocabulary)
    if examples.next_tokens is not None:
        assert np.array_equal(examples.next_tokens[:, :-1], examples.inputs[:, 1:])
        assert np.array_equal(examples.next_tokens[scored], examples.targets[scored])


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_bytes_and_others_do_not(name):
    task = plugins.task(name)()
    first, again, other = (data.make(task, seed, FEW) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert first.train.inputs.tobytes() == again.train.inputs.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint(name):
    made = data.make(plugins.task(name)(), 0, FEW)
    rows = [{r.tobytes() for r in getattr(made, s).inputs} for s in data.SPLITS]
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_smaller_training_set_is_the_beginning_of_a_larger_one(name):
    task = plugins.task(name)()
    small = data.make(task, 0, FEW)
    large = data.make(task, 0, FEW.model_copy(update={"train_examples": 1100}))
    assert np.array_equal(small.train.inputs, large.train.inputs[:600])
    assert np.array_equal(small.test.targets, large.test.targets)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_have_a_role_each(name):
    task = plugins.task(name)()
    inputs = data.make(task, 0, FEW).test.inputs[0]
    assert len(task.describe(inputs)) == len(inputs)


# ------------------------------------------------------------------ data


def test_crowded_splits_are_kept_apart_by_drawing_again():
    task = Recall(vocab_size=4, seq_len=8)  # 120 distinct inputs at most share three splits
    sizes = DataConfig(train_examples=300, validation_examples=10, test_examples=10)
    made = data.make(task, 0, sizes)
    rows = [{r.tobytes() for r in getattr(made, s).inputs} for s in data.SPLITS]
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])
    assert made.train.inputs.shape == (300, 7)


def test_a_task_with_too_few_sequences_is_refused():
    with pytest.raises(ConfigError, match=r"too few distinct sequences.*raise seq_len"):
        data.make(Recall(vocab_size=4, seq_len=4), 0, DataConfig())


def test_streams_are_independent_of_each_other():
    draws = [data.stream(0, *key).integers(0, 2**32, 4).tolist() for key in (
        ("train", 0), ("train", 1), ("train", 0, 1), ("test", 0), ("world",))]  # fmt: skip
    assert len({tuple(d) for d in draws}) == len(draws)


# ------------------------------------------------------------------ recall


def test_recall_has_the_published_number_of_scored_positions():
    for vocab_size, expected in ((16, 56.0), (128, 23.8)):
        examples = data.make(Recall(vocab_size=vocab_size), 0).test
        scored = (examples.targets != IGNORE).sum(axis=1).mean()
        assert abs(scored - expected) < 0.4


def test_recall_alternates_keys_and_values_and_keeps_its_map():
    task = Recall()
    examples = task.sample(200, data.stream(0, "test"), "test", None)
    keys, values = examples.inputs[:, ::2], examples.next_tokens[:, ::2]
    assert keys.max() < 8 <= values.min()
    for k, v in zip(keys, values, strict=True):
        pairs = set(zip(k.tolist(), v.tolist(), strict=True))
        assert len(pairs) == len(set(k.tolist()))


def test_recall_asks_for_a_key_it_has_shown_uniformly_over_keys():
    examples = Recall(seq_len=16).sample(20_000, data.stream(0, "test"), "test", None)
    probes, shown = examples.inputs[:, -1], examples.inputs[:, :-1:2]
    assert all(p in row for p, row in zip(probes, shown, strict=True))
    counts = np.bincount(probes, minlength=8) / len(probes)
    assert np.abs(counts - 1 / 8).max() < 0.01
    # Uniform over distinct keys, not over occurrences: a key shown once is as likely as another.
    once = np.array([(row == p).sum() == 1 for p, row in zip(probes, shown, strict=True)])
    singles = np.array([sum((row == k).sum() == 1 for k in set(row.tolist())) for row in shown])
    kinds = np.array([len(set(row.tolist())) for row in shown])
    assert abs(once.mean() - (singles / kinds).mean()) < 0.01


def test_single_query_recall_marks_and_scores_the_last_key_only():
    examples = Recall(multi_query=False).sample(50, data.stream(0, "test"), "test", None)
    assert examples.inputs.shape == (50, 128)
    assert (examples.inputs[:, -2] == 15).all()
    assert ((examples.targets != IGNORE).sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_len": 127}, "task.seq_len=127 must be even: keys and values alternate; use 126"),
        ({"seq_len": 2}, "task.seq_len=2 must be at least 4"),
        ({"vocab_size": 3}, "task.vocab_size=3 must be at least 4"),
        ({"vocab_size": 4, "multi_query": False}, "task.vocab_size=4 must be at least 5"),
        ({"vocab_size": 99_999}, "task.vocab_size=99999: input should be less than"),
        ({"vocab_size": "16"}, 'task.vocab_size="16": input should be a valid integer'),
        ({"seqlen": 16}, "task.seqlen: unknown key; did you mean 'seq_len'?"),
    ],
)
def test_recall_refuses_what_it_cannot_generate(fields, message):
    with pytest.raises(ConfigError) as error:
        build_task(config.Document({"name": "recall", **fields}))
    assert message in str(error.value)
