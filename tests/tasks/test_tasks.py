"""One battery that every task passes, found by discovery; then what each task means."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mad_efla.tasks
from mad_efla import config, plugins
from mad_efla.config import ConfigError
from mad_efla.plan.expand import settings as settings_of
from mad_efla.plan.run import DataConfig, build_task
from mad_efla.tasks import IGNORE, Examples, RealTask
from mad_efla.tasks.compression import Compression
from mad_efla.tasks.copying import Copying
from mad_efla.tasks.counting import Counting
from mad_efla.tasks.filtering import Filtering
from mad_efla.tasks.flip_flop import FlipFlop
from mad_efla.tasks.fuzzy_recall import FuzzyRecall
from mad_efla.tasks.group_words import GroupWords
from mad_efla.tasks.induction import Induction
from mad_efla.tasks.memorization import Memorization
from mad_efla.tasks.modular_arithmetic import ModularArithmetic
from mad_efla.tasks.mqar import MQAR
from mad_efla.tasks.noisy_recall import NoisyRecall
from mad_efla.tasks.overwrite import Overwrite
from mad_efla.tasks.palindrome import Palindrome
from mad_efla.tasks.parity import Parity
from mad_efla.tasks.recall import Recall
from mad_efla.tasks.retention import Retention
from mad_efla.tasks.selective_copying import SelectiveCopying
from mad_efla.tasks.stack import Stack
from mad_efla.training import data

ALL = plugins.names(mad_efla.tasks)
# Those that generate; the others are in test_pixels.py.
NAMES = [name for name in ALL if not issubclass(plugins.task(name), RealTask)]
FEW = DataConfig(train_examples=600, validation_examples=100, test_examples=100)


@st.composite
def fuzzy_recalls(draw):
    key_tokens, value_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    multi_query = draw(st.booleans())
    ids = 2 * max(key_tokens, value_tokens, 2) + (1 if multi_query else 2)
    return FuzzyRecall(
        vocab_size=draw(st.integers(ids, 200)),
        seq_len=draw(st.integers(2 * (key_tokens + value_tokens) + 1, 120)),
        multi_query=multi_query,
        key_tokens=key_tokens,
        value_tokens=value_tokens,
    )


@st.composite
def copyings(draw):
    count = draw(st.integers(1, 20))
    return SelectiveCopying(
        vocab_size=draw(st.integers(4, 200)),
        seq_len=draw(st.integers(2 * count + 2, 2 * count + 80)),
        tokens_to_copy=count,
        as_mad_lab=draw(st.booleans()),
    )


@st.composite
def mqars(draw):
    pairs = draw(st.integers(1, 12))
    return MQAR(
        vocab_size=draw(st.integers(2 * pairs + 2, 300)),
        seq_len=draw(st.integers(2 * pairs, 2 * pairs + 40).map(lambda n: 2 * n)),
        pairs=pairs,
        gap_power=draw(st.floats(0.01, 1)),
        random_filler=draw(st.booleans()),
    )


@st.composite
def expressions(draw):
    brackets = draw(st.booleans())
    step = 1 if brackets else 2
    return ModularArithmetic(
        modulus=draw(st.integers(2, 30)),
        seq_len=(longest := draw(st.integers(2, 40))) * step,
        shortest=draw(st.none() | st.integers(2, longest).map(lambda n: n * step)),
        operators=draw(st.sampled_from(["+", "+-", "+-*"])),
        brackets=brackets,
    )


@st.composite
def strings(draw, kind):
    letters = draw(st.integers(1, 40))
    return kind(
        vocab_size=draw(st.integers(4, 200)),
        seq_len=2 * letters,
        shortest=draw(st.none() | st.integers(1, letters).map(lambda n: 2 * n)),
    )


@st.composite
def long_memories(draw, kind):
    pairs = draw(st.integers(1, 12))
    return kind(
        vocab_size=draw(st.integers(4 * pairs + 4, 300)),
        seq_len=draw(st.integers(3 * pairs, 3 * pairs + 60)),
        pairs=pairs,
    )


even = st.integers(2, 60).map(lambda n: 2 * n)

# Random valid settings of each task.
STRATEGIES = {
    "compression": st.builds(Compression, vocab_size=st.integers(3, 200), seq_len=st.integers(2, 100)),
    "fuzzy_recall": fuzzy_recalls(),
    "memorization": st.builds(Memorization, vocab_size=st.integers(5, 300), seq_len=even),
    "mqar": mqars(),
    "noisy_recall": st.builds(
        NoisyRecall,
        vocab_size=st.integers(35, 200),
        seq_len=even,
        multi_query=st.booleans(),
        noise_vocab_size=st.integers(1, 30),
        noise_fraction=st.floats(0, 0.99),
    ),
    "recall": st.builds(Recall, vocab_size=st.integers(5, 200), seq_len=even, multi_query=st.booleans()),
    "selective_copying": copyings(),
    "parity": st.builds(
        lambda n, short: Parity(seq_len=n, shortest=short and min(short, n)),
        st.integers(1, 60),
        st.none() | st.integers(1, 60),
    ),
    "modular_arithmetic": expressions(),
    "group_words": st.builds(
        GroupWords, group=st.sampled_from(["Z2", "Z3", "Z60", "S3", "A4", "S4", "A5", "S5"]), seq_len=st.integers(1, 60)
    ),
    "flip_flop": st.builds(FlipFlop, seq_len=even, ignore=st.floats(0, 1)),
    "counting": st.builds(Counting, seq_len=st.integers(1, 80), most=st.integers(1, 80), idle=st.floats(0, 0.99)),
    "copying": strings(Copying),
    "palindrome": strings(Palindrome),
    "stack": st.builds(
        Stack, stacks=st.integers(1, 80), elements=st.integers(2, 80), seq_len=st.integers(2, 40).map(lambda n: 3 * n)
    ),
    "induction": st.builds(Induction, vocab_size=st.integers(3, 200), seq_len=st.integers(3, 100)),
    "retention": long_memories(Retention),
    "filtering": long_memories(Filtering),
    "overwrite": long_memories(Overwrite),
}

# Raise a task's `version` when its digest changes here: the data of finished runs was another.
DIGESTS = {
    "compression": (1, "d866e56e1f0fb1ce"),
    "fuzzy_recall": (1, "550affd64c08972d"),
    "memorization": (1, "3c64bba011657979"),
    "mqar": (1, "1e6f2cfe1106b556"),
    "noisy_recall": (1, "5168d31a3b9e3b05"),
    "recall": (1, "d2f5f6a365796094"),
    "selective_copying": (1, "09523d3d5cc3f58f"),
    "parity": (1, "67102b9e949ce56d"),
    "modular_arithmetic": (1, "6d645c97cae586f0"),
    "group_words": (1, "6674af7987b00b72"),
    "flip_flop": (1, "5dc7f78ae967a5ba"),
    "counting": (1, "171593730243dfae"),
    "copying": (1, "94d64046ff046250"),
    "palindrome": (1, "f1e958f30b723824"),
    "stack": (1, "fba64a1d379d2ecd"),
    "induction": (1, "342a99480fbdb7f1"),
    "retention": (1, "b223423147e2f165"),
    "filtering": (1, "4a3ce138c2010eed"),
    "overwrite": (1, "d118882567e9f371"),
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


@pytest.mark.parametrize("name", ALL)
def test_defaults_are_valid_and_the_shipped_file_holds_them(name):
    task = plugins.task(name)()
    assert task.name == name
    document = config.read(config.find(name, "tasks"))
    assert build_task(document.part("task")) == task


@given(any_task(), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
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
@settings(max_examples=100, deadline=None)
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
    assert examples.targets.dtype == examples.inputs.dtype
    assert not np.shares_memory(examples.inputs, examples.targets)  # rows are drawn again in place
    if examples.next_tokens is not None:
        assert np.array_equal(examples.next_tokens[:, :-1], examples.inputs[:, 1:])
        assert np.array_equal(examples.next_tokens[scored], examples.targets[scored])


@given(any_task(), st.sampled_from([2, 4, 8]))
@settings(max_examples=100, deadline=None)
def test_a_longer_sequence_has_the_same_vocabulary_and_is_solved(task, times):
    fields = task.model_dump()
    longer = type(task)(**{**fields, "seq_len": times * fields["seq_len"]})
    assert longer.vocabulary == task.vocabulary
    assert longer.input_length > task.input_length
    world = task.world(data.stream(0, "world"))
    assert solved(longer, longer.sample(5, data.stream(0, "test"), "test", world), world) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_bytes_and_others_do_not(name):
    task = plugins.task(name)()
    first, again, other = (data.make(task, seed, FEW) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert first.train.inputs.tobytes() == again.train.inputs.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_a_version_do_not_change(name):
    task = plugins.task(name)
    assert (task.version, data.make(task(), 0, FEW).digest) == DIGESTS[name]


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
    draws = [
        data.stream(0, *key).integers(0, 2**32, 4).tolist()
        for key in (("train", 0), ("train", 1), ("train", 0, 1), ("test", 0), ("world",))
    ]
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
    ("name", "fields", "message"),
    [
        ("recall", {"seq_len": 127}, "seq_len=127 must be even: keys and values alternate; use 126"),
        ("recall", {"seq_len": 2}, "seq_len=2 must be at least 4"),
        ("recall", {"vocab_size": 3}, "vocab_size=3 must be at least 4"),
        ("recall", {"vocab_size": 4, "multi_query": False}, "vocab_size=4 must be at least 5"),
        ("recall", {"vocab_size": 99_999}, "vocab_size=99999: input should be less than"),
        ("recall", {"vocab_size": "16"}, 'vocab_size="16": input should be a valid integer'),
        ("recall", {"seqlen": 16}, "seqlen: unknown key; did you mean 'seq_len'?"),
        ("recall", {"as_mad_lab": True}, "as_mad_lab: unknown key"),
        ("noisy_recall", {"seq_len": 127}, "seq_len=127 must be even"),
        ("noisy_recall", {"vocab_size": 19}, "vocab_size=19 must be at least 20: two keys, two"),
        (
            "noisy_recall",
            {"vocab_size": 20, "multi_query": False},
            "vocab_size=20 must be at least 21: two keys, two values, the copy token and noise",
        ),
        ("noisy_recall", {"noise_vocab_size": 0}, "noise_vocab_size=0 must be at least 1; for no"),
        ("noisy_recall", {"noise_vocab_size": 29}, "vocab_size=32 must be at least 33"),
        ("noisy_recall", {"noise_fraction": 1.0}, "noise_fraction=1.0 must be in [0, 1): some"),
        ("noisy_recall", {"noise_fraction": -0.1}, "noise_fraction=-0.1 must be in [0, 1)"),
        ("noisy_recall", {"multi_query": "yes"}, 'multi_query="yes": input should be a valid bool'),
        ("fuzzy_recall", {"vocab_size": 6}, "vocab_size=6 must be at least 7: 6 ids for keys of 3"),
        (
            "fuzzy_recall",
            {"vocab_size": 9, "value_tokens": 4, "multi_query": False},
            "vocab_size=9 must be at least 10: 8 ids for keys of 3 and values of 4 different",
        ),
        ("fuzzy_recall", {"seq_len": 12}, "seq_len=12 must be more than 12, two pairs of key_tok"),
        ("fuzzy_recall", {"key_tokens": 0}, "key_tokens=0 must be 1, 2, 3 or 4"),
        ("fuzzy_recall", {"value_tokens": 5}, "value_tokens=5 must be 1, 2, 3 or 4"),
        ("fuzzy_recall", {"as_mad_lab": 1}, "as_mad_lab=1: input should be a valid boolean"),
        ("selective_copying", {"vocab_size": 3}, "vocab_size=3 must be at least 4: two tokens"),
        (
            "selective_copying",
            {"seq_len": 33},
            "seq_len=33 must be more than 2 tokens_to_copy + 1 = 33: the tokens, a blank, the copy "
            "token, the answers; use at least 34, or copy fewer tokens",
        ),
        ("selective_copying", {"tokens_to_copy": 0}, "tokens_to_copy=0 must be at least 1"),
        ("selective_copying", {"tokens_to_copy": 128}, "seq_len=256 must be more than"),
        ("compression", {"vocab_size": 2}, "vocab_size=2 must be at least 3: two tokens and the"),
        ("compression", {"seq_len": 1}, "seq_len=1 must be at least 2: a token and the compress"),
        ("memorization", {"vocab_size": 4}, "vocab_size=4 must be at least 5: two keys, two"),
        ("memorization", {"seq_len": 31}, "seq_len=31 must be even: an insert token follows each"),
        ("memorization", {"seq_len": 0}, "seq_len=0 must be at least 2"),
        ("mqar", {"pairs": 0}, "pairs=0 must be at least 1"),
        ("mqar", {"pairs": 17}, "seq_len=64 must be at least 4 pairs = 68"),
        ("mqar", {"seq_len": 63}, "seq_len=63 must be even: pairs and query slots are two tokens"),
        ("mqar", {"vocab_size": 9}, "vocab_size=9 must be at least 2 pairs + 2 = 10: no key or"),
        ("mqar", {"gap_power": 0.0}, "gap_power=0.0 must be in (0, 1]; the published value is"),
        ("mqar", {"gap_power": 1.5}, "gap_power=1.5 must be in (0, 1]"),
        ("mqar", {"random_filler": 3}, "random_filler=3: input should be a valid boolean"),
        ("parity", {"seq_len": 0}, "seq_len=0 must be at least 1"),
        ("parity", {"shortest": 41}, "shortest=41 must be at most seq_len = 40; leave it"),
        ("parity", {"shortest": 0}, "shortest=0 must be at least 1"),
        ("modular_arithmetic", {"modulus": 1}, "modulus=1 must be at least 2"),
        ("modular_arithmetic", {"seq_len": 41}, "seq_len=41 must be a multiple of 2; use 40 or 42"),
        ("modular_arithmetic", {"operators": "-"}, 'operators="-": input should be'),
        ("modular_arithmetic", {"brackets": True, "seq_len": 1}, "seq_len=1 must be at least 2"),
        ("group_words", {"group": "S2"}, "group='S2' must be Z2 to Z1000, S3 to S6 or A3 to A6"),
        ("group_words", {"group": "D4"}, "group='D4' must be Z2"),
        ("group_words", {"group": "Z1"}, "group='Z1' must be Z2"),
        ("group_words", {"seq_len": 0}, "seq_len=0 must be at least 1"),
        ("group_words", {"moves": 1}, "moves=1 must leave S3 something to draw"),
        ("group_words", {"group": "A4", "moves": 2}, "moves=2 must leave A4"),
        ("group_words", {"group": "Z5", "moves": 2}, "moves=2 must leave Z5"),
        ("flip_flop", {"seq_len": 2}, "seq_len=2 must be at least 4"),
        ("flip_flop", {"seq_len": 7}, "seq_len=7 must be a multiple of 2; use 6 or 8"),
        ("flip_flop", {"ignore": 1.1}, "ignore=1.1 must be in [0, 1]: it is a probability"),
        ("counting", {"seq_len": 0}, "seq_len=0 must be at least 1"),
        ("counting", {"most": 0}, "most=0 must be at least 1"),
        ("counting", {"idle": 1.0}, "idle=1.0 must be in [0, 1): some tokens must count"),
        ("copying", {"vocab_size": 3}, "vocab_size=3 must be at least 4: two letters, the bar and"),
        ("copying", {"seq_len": 65}, "seq_len=65 must be a multiple of 2; use 64 or 66"),
        ("copying", {"shortest": 66}, "shortest=66 must be at most seq_len = 64"),
        ("palindrome", {"vocab_size": 3}, "vocab_size=3 must be at least 4: two letters, the bar and"),
        ("palindrome", {"seq_len": 65}, "seq_len=65 must be a multiple of 2; use 64 or 66"),
        ("palindrome", {"shortest": 66}, "shortest=66 must be at most seq_len = 64"),
        ("stack", {"seq_len": 3}, "seq_len=3 must be at least 6"),
        ("stack", {"seq_len": 256}, "seq_len=256 must be a multiple of 3; use 255 or 258"),
        ("stack", {"stacks": 0}, "stacks=0 must be at least 1"),
        ("stack", {"elements": 1}, "elements=1 must be at least 2"),
        ("induction", {"vocab_size": 2}, "vocab_size=2 must be at least 3: two tokens and the mark"),
        ("induction", {"seq_len": 2}, "seq_len=2 must be at least 3: the mark, its answer"),
        ("retention", {"pairs": 0}, "pairs=0 must be at least 1"),
        ("retention", {"pairs": 50}, "seq_len=128 must be at least 3 pairs = 150"),
        ("retention", {"vocab_size": 17}, "vocab_size=17 must be at least 2 pairs + 2 = 18"),
        ("filtering", {"pairs": 0}, "pairs=0 must be at least 1"),
        ("filtering", {"pairs": 50}, "seq_len=128 must be at least 3 pairs = 150"),
        ("filtering", {"vocab_size": 35}, "vocab_size=35 must be at least 4 pairs + 4 = 36"),
        ("overwrite", {"pairs": 0}, "pairs=0 must be at least 1"),
        ("overwrite", {"pairs": 50}, "seq_len=128 must be at least 3 pairs = 150"),
        ("overwrite", {"vocab_size": 17}, "vocab_size=17 must be at least 2 pairs + 2 = 18"),
    ],
)
def test_a_task_refuses_what_it_cannot_generate(name, fields, message):
    with pytest.raises(ConfigError) as error:
        build_task(config.Document({"name": name, **fields}))
    assert f"task.{message}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("recall", 11),
        ("noisy_recall", 14),
        ("fuzzy_recall", 11),
        ("selective_copying", 13),
        ("compression", 11),
        ("memorization", 6),
    ],
)
def test_the_file_holds_every_published_setting(name, count):
    found = settings_of(name)
    assert len({(s.task, s.data) for s in found}) == len(found) == count
    assert all(s.data.test_examples == 1280 for s in found)
    baseline = 256 if name == "memorization" else 12_800
    assert found[0].data.train_examples == baseline


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_setting_is_solved(name):
    for _, task, _ in settings_of(name):
        world = task.world(data.stream(0, "world"))
        examples = task.sample(20, data.stream(0, "test"), "test", world)
        assert solved(task, examples, world) == 1.0


# ------------------------------------------------------------------ noisy recall


def scored_per_example(task, split="test", n=20_000):
    targets = task.sample(n, data.stream(0, split), split, None).targets
    return (targets != IGNORE).sum(axis=1).mean()


def test_noisy_recall_has_the_published_number_of_scored_positions():
    assert abs(scored_per_example(NoisyRecall()) - 43.7) < 0.2
    assert abs(scored_per_example(NoisyRecall(noise_fraction=0.8)) - 7.9) < 0.1


def test_noise_comes_in_aligned_pairs_and_at_its_rate():
    task = NoisyRecall(noise_fraction=0.4)
    examples = task.sample(2_000, data.stream(0, "test"), "test", None)
    tokens = np.concatenate([examples.inputs, examples.next_tokens[:, -1:]], axis=1)
    noise = (tokens >= 16).reshape(2_000, 64, 2)
    assert np.array_equal(noise[..., 0], noise[..., 1])
    assert not noise[:, -1].any()
    assert abs(noise[:, :-1, 0].mean() - 0.4 * 62 / 63) < 0.01
    assert set(np.unique(tokens[tokens >= 16])) == set(range(16, 32))
    assert not noise[:, :, 0].all(axis=1).any()


def test_one_pair_is_sure_however_much_noise_there_is():
    task = NoisyRecall(noise_fraction=0.99, seq_len=8)
    examples = task.sample(2_000, data.stream(0, "test"), "test", None)
    assert (examples.inputs[:, :6:2] < 8).any(axis=1).all()
    assert examples.targets[:, -1].min() >= 8


def test_without_noise_noisy_recall_is_recall():
    noisy = NoisyRecall(vocab_size=32, noise_fraction=0.0)
    assert abs(scored_per_example(noisy) - scored_per_example(Recall())) < 0.1


# ------------------------------------------------------------------ fuzzy recall


def test_fuzzy_recall_has_the_published_number_of_scored_positions():
    for fields, expected, within in (({}, 4.4, 0.1), ({"vocab_size": 32}, 2.1, 0.1), ({"seq_len": 256}, 12.3, 0.3)):
        assert abs(scored_per_example(FuzzyRecall(**fields)) - expected) < within
    assert abs(scored_per_example(FuzzyRecall(seq_len=1024), n=1_000) - 148) < 3


def key_lengths(task, split):
    inputs = task.sample(500, data.stream(0, split), split, None).inputs
    roles = [task.describe(row) for row in inputs]
    runs = ["".join("k" if r == "key" else "." for r in row).split(".") for row in roles]
    return {len(run) for row in runs for run in row if run}


def test_fuzzy_keys_are_of_full_length_where_weights_are_chosen_and_scored():
    assert key_lengths(FuzzyRecall(), "train") == {1, 2, 3}
    assert key_lengths(FuzzyRecall(), "validation") == {3}
    assert key_lengths(FuzzyRecall(), "test") == {3}


def fuzzy_by_hand(task, rng, split):
    """Draw one sequence pair by pair; return scored positions, padding, whether it is answerable."""
    half, longest = (task.vocab_size - 1) // 2, 6
    values = task.vocab_size - 1 - half

    def key():
        return tuple(rng.permutation(half)[: rng.integers(1, 4) if split == "train" else 3])

    def value():
        return tuple(half + rng.permutation(values)[: rng.integers(1, 4)])

    asked, answer = key(), value()
    probe = len(asked) + len(answer)
    offset = rng.integers(task.seq_len - 2 * probe)
    length = scored = 0
    value_of = {}
    while length < task.seq_len - probe - longest:
        drawn = asked if length >= offset and asked not in value_of else key()
        known = drawn in value_of
        found = value_of.setdefault(drawn, answer if drawn == asked else value())
        length += len(drawn) + len(found)
        scored += len(found) if known else 0
    padding = task.seq_len + 1 - length - probe
    return scored + len(answer), padding, asked in value_of


@pytest.mark.parametrize("split", ["train", "test"])
def test_fuzzy_sequences_are_distributed_as_if_drawn_pair_by_pair(split):
    task, n = FuzzyRecall(seq_len=40, as_mad_lab=True), 4_000
    rng = np.random.default_rng(0)
    wanted = np.array([fuzzy_by_hand(task, rng, split) for _ in range(n)], float)
    examples = task.sample(20_000, data.stream(0, split), split, None)
    scored = examples.targets != IGNORE
    known = task.answerable(examples, examples, None)
    padding = (examples.inputs == task.vocab_size - 1).sum(axis=1)
    found = np.stack([scored.sum(1), padding, (known == scored).all(axis=1)], axis=1)
    error = np.sqrt(wanted.var(axis=0) / n + found.var(axis=0) / len(found))
    assert (np.abs(wanted.mean(axis=0) - found.mean(axis=0)) < 4 * error).all()
    assert np.allclose(wanted.std(axis=0), found.std(axis=0), rtol=0.1)


@given(
    fuzzy_recalls().filter(lambda t: t.multi_query),
    st.booleans(),
    st.sampled_from(["train", "test"]),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_fuzzy_recall_scores_every_value_of_every_key_seen_before(task, flawed, split, seed):
    few_keys = task.model_copy(update={"vocab_size": 2 * 4 + 1, "as_mad_lab": flawed})
    examples = few_keys.sample(30, data.stream(seed, split), split, None)
    for inputs, targets, following in zip(*examples, strict=True):
        whole = np.concatenate([inputs[:1], following])
        expected, seen, start, end = np.full_like(targets, IGNORE), set(), 0, 0
        roles = [*few_keys.describe(whole), "key"]
        while end < len(whole):
            start = roles.index("key", end)
            middle = roles.index("value", start)
            end = roles.index("key", middle)
            if (key := tuple(whole[start:middle])) in seen or end == len(whole):
                expected[middle - 1 : end - 1] = whole[middle:end]
            seen.add(key)
        assert np.array_equal(targets, expected)


def test_fuzzy_recall_asks_for_a_key_it_has_shown():
    for multi_query in (True, False):
        task = FuzzyRecall(seq_len=20, multi_query=multi_query)
        examples = task.sample(1_000, data.stream(0, "train"), "train", None)
        assert solved(task, examples, None) == 1.0
        last = (examples.targets != IGNORE)[:, ::-1].argmax(axis=1)
        assert (last == 0).all()  # the query ends every sequence


def test_as_mad_lab_fuzzy_recall_may_ask_for_a_key_it_has_not_shown():
    for fields, lowest, highest in (({}, 0.987, 0.994), ({"multi_query": False}, 0.97, 0.985)):
        task = FuzzyRecall(**fields, as_mad_lab=True)
        made = data.make(task, 0, FEW.model_copy(update={"test_examples": 8_000}))
        assert lowest < data.ceiling(task, made) < highest
        assert data.ceiling(FuzzyRecall(**fields), data.make(FuzzyRecall(**fields), 0, FEW)) == 1.0


@given(fuzzy_recalls(), st.sampled_from(["train", "test"]), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_answerable_is_what_the_solver_answers(task, split, seed):
    flawed = task.model_copy(update={"as_mad_lab": True})
    examples = flawed.sample(30, data.stream(seed, split), split, None)
    answers = np.stack([flawed.solve(row, None) for row in examples.inputs])
    scored = examples.targets != IGNORE
    expected = scored & (answers == examples.targets)
    assert np.array_equal(flawed.answerable(examples, examples, None), expected)


def test_single_query_fuzzy_recall_scores_the_last_value_only():
    task = FuzzyRecall(multi_query=False)
    examples = task.sample(200, data.stream(0, "test"), "test", None)
    for inputs, targets in zip(examples.inputs, examples.targets, strict=True):
        (copy,) = np.flatnonzero(inputs == 15)
        scored = np.flatnonzero(targets != IGNORE)
        assert scored.tolist() == list(range(copy + 3, len(inputs)))
        assert 1 <= len(scored) <= 3


# ------------------------------------------------------------------ selective copying


def test_blanks_fall_anywhere_around_the_tokens():
    examples = SelectiveCopying().sample(5_000, data.stream(0, "test"), "test", None)
    columns = np.nonzero(examples.inputs[:, :-17] < 14)[1]
    places = columns.reshape(5_000, 16)
    edges = np.concatenate([np.full((5_000, 1), -1), places, np.full((5_000, 1), 239)], axis=1)
    gaps = np.diff(edges, axis=1) - 1
    assert np.abs(gaps.mean(axis=0) - 223 / 17).max() < 0.3
    assert np.abs(gaps.var(axis=0) - 223 / 17 * 16 / 17).max() < 1.5
    assert (examples.inputs[:, 239] == 15).all()
    assert ((examples.targets != IGNORE).sum(axis=1) == 16).all()
    assert (examples.inputs[:, 240:] == 14).all()


def test_as_mad_lab_the_last_token_always_stands_before_the_copy_token():
    flawed = SelectiveCopying(as_mad_lab=True).sample(500, data.stream(0, "test"), "test", None)
    assert (flawed.inputs[:, 238] < 14).all()
    ours = SelectiveCopying().sample(500, data.stream(0, "test"), "test", None)
    assert (ours.inputs[:, 238] == 14).mean() > 0.99


# ------------------------------------------------------------------ compression


def test_compression_scores_every_token_and_asks_for_the_autoencoder():
    examples = Compression().sample(2_000, data.stream(0, "test"), "test", None)
    assert Compression.backbone == "autoencoder"
    assert np.array_equal(examples.inputs, examples.targets)
    assert examples.targets.shape[1] == 32
    assert (examples.inputs[:, -1] == 15).all()
    counts = np.bincount(examples.inputs[:, :-1].ravel(), minlength=16)
    assert counts[15] == 0
    assert np.abs(counts[:15] / counts.sum() - 1 / 15).max() < 0.005


# ------------------------------------------------------------------ memorization


def test_memorization_has_one_table_that_no_input_shows():
    task = Memorization()
    made = data.make(task, 3, DataConfig(train_examples=256))
    table = made.world
    assert len(set(table.tolist())) == len(table) == 127
    assert table.min() >= 127
    assert table.max() < 255
    for split in data.SPLITS:
        inputs, targets, _ = getattr(made, split)
        assert (inputs[:, 1::2] == 255).all()
        assert inputs[:, ::2].max() < 127
        assert np.array_equal(targets[:, 1::2], table[inputs[:, ::2]])
        assert (targets[:, ::2] == IGNORE).all()
    assert not np.array_equal(table, data.make(task, 4, FEW).world)


@pytest.mark.parametrize(("vocab_size", "published"), [(256, 1.0), (2048, 0.988), (4096, 0.871), (8192, 0.640)])
def test_what_training_never_showed_nobody_can_answer(vocab_size, published):
    task = Memorization(vocab_size=vocab_size)
    made = data.make(task, 0, DataConfig(train_examples=256))
    ceiling = data.ceiling(task, made)
    shown = set(made.train.inputs[:, ::2].ravel().tolist())
    asked = made.test.inputs[:, ::2].ravel().tolist()
    assert ceiling == np.mean([key in shown for key in asked])
    assert abs(ceiling - published) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_of_a_baseline_everything_can_be_answered(name):
    found = settings_of(name)[0]
    sizes = found.data.model_copy(update={"train_examples": min(found.data.train_examples, 800)})
    assert data.ceiling(found.task, data.make(found.task, 0, sizes)) == 1.0


# ------------------------------------------------------------------ mqar


def test_the_file_of_mqar_holds_the_published_lengths_and_pairs():
    found = {(s.task.seq_len, s.task.pairs) for s in settings_of("mqar")}
    rwkv7 = {(64, 4), (128, 8), (256, 16), (512, 64), (1024, 128), (2048, 256)}
    assert found >= rwkv7 | {(256, pairs) for pairs in (4, 8, 16, 32, 64)}
    assert all(s.task.vocab_size == 8192 for s in settings_of("mqar"))


def test_mqar_asks_once_for_each_key_and_shows_nothing_twice():
    task = MQAR(vocab_size=40, seq_len=32, pairs=6)
    examples = task.sample(500, data.stream(0, "test"), "test", None)
    keys, values = examples.inputs[:, :12:2], examples.inputs[:, 1:12:2]
    assert keys.min() == 1
    assert keys.max() == 19
    assert values.min() == 20
    assert values.max() == 39
    for row, targets in zip(examples.inputs, examples.targets, strict=True):
        assert len(set(row[:12].tolist())) == 12
        asked = np.flatnonzero(targets != IGNORE)
        assert sorted(row[asked]) == sorted(row[:12:2])
        assert (asked >= 12).all()
        assert (asked % 2 == 0).all()
        rest = np.setdiff1d(np.arange(12, 32), asked)
        assert (row[rest] == 0).all()


def test_mqar_queries_come_soon_by_a_power_law():
    task, n = MQAR(), 40_000
    examples = task.sample(n, data.stream(0, "test"), "test", None)
    slots = 28
    weight = np.arange(1, slots + 1) ** (0.01 - 1)
    first = (examples.inputs[:, 8:] == examples.inputs[:, :1]).argmax(axis=1) // 2
    counts = np.bincount(first, minlength=slots) / n
    assert np.abs(counts - weight / weight.sum()).max() < 0.01  # the first key draws alone

    rng = np.random.default_rng(0)
    p = weight / weight.sum()
    drawn = np.concatenate([rng.choice(slots, 4, replace=False, p=p) for _ in range(10_000)])
    wanted = np.bincount(drawn, minlength=slots) / 10_000
    found = (examples.targets[:, 8::2] != IGNORE).mean(axis=0)
    assert np.abs(found - wanted).max() < 0.02


def test_mqar_may_fill_its_gaps_with_anything():
    examples = MQAR(vocab_size=64, random_filler=True).sample(500, data.stream(0, "test"), "test", None)
    filler = examples.inputs[:, 8:][examples.targets[:, 8:] == IGNORE]
    counts = np.bincount(filler, minlength=64) / len(filler)
    assert np.abs(counts - 1 / 64).max() < 0.004


def test_distinct_ids_are_drawn_evenly_in_every_order():
    draws = mad_efla.tasks.distinct(data.stream(0, "x"), 60_000, 3, 5, 9)
    codes, counts = np.unique(draws @ [100, 10, 1], return_counts=True)
    assert len(codes) == 4 * 3 * 2
    assert np.abs(counts / 60_000 - 1 / 24).max() < 0.004
    whole = mad_efla.tasks.distinct(data.stream(0, "x"), 10, 128, 0, 128)
    assert np.array_equal(np.sort(whole, axis=1), np.tile(np.arange(128), (10, 1)))


def test_chance_is_what_the_commonest_answer_of_training_gets():
    rows = ([3, 3, 1, IGNORE], [3, 1, 3, 2])
    train, test = (Examples(np.zeros((1, 4), np.int8), np.array([row], np.int8)) for row in rows)
    assert data.chance(data.Data(train, train, test, "", None)) == 0.5
    assert data.chance(data.make(Recall(name="recall", vocab_size=16, seq_len=32), 0, FEW)) == pytest.approx(
        1 / 8, abs=0.03
    )
