"""Tasks with real inputs: where their examples come from, how they are split, probed, learned."""

import numpy as np
import pytest
import torch

from mad_efla import contract
from mad_efla.config import ConfigError, Document, from_paths, merge
from mad_efla.plan import expand
from mad_efla.plan.run import DataConfig, build
from mad_efla.runs.folder import RunFolder
from mad_efla.tasks import IGNORE
from mad_efla.tasks.digits import Digits
from mad_efla.tasks.smnist import SMNIST
from mad_efla.training import data, fits, loop, model
from mad_efla.training.model import BareClassifier, Classifier
from tests.cli.test_cli import call
from tests.pixels import write_set

TOY = SMNIST(dataset="toy", side=4, corruptions={"intensity": (1.0, 1e30), "dropout": (0.0, 1.0)})


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder of data sets, with one in it."""
    write_set(tmp_path / "sets" / "toy")
    monkeypatch.setenv("MAD_EFLA_DATA", str(tmp_path / "sets"))
    return tmp_path / "sets"


def classify(body="bare", **fields):
    """Build a run on the toy data set."""
    document = Document(
        {
            "task": {
                "name": "smnist",
                "dataset": "toy",
                "side": 4,
                "body": body,
                "corruptions": {"intensity": [1, 1e30], "dropout": [0, 1]},
            },
            "data": {"train_examples": 48, "validation_examples": 12, "test_examples": 20},
            "model": {"width": 16, "depth": 1, "channel": "none"},
            "mixers": [{"name": "plain_efla"}],
            "optim": {"lr": 1e-2, "schedule": "constant"},
            "train": {"batch_size": 16, "steps": 60, "eval_every": 20},
        }
    )
    paths = {name.replace("__", "."): value for name, value in fields.items()}
    return build(merge(document, from_paths(paths, "test")))


def trained(run, tmp_path):
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    folder.create(run)
    return loop.train(run, folder), folder


@pytest.mark.parametrize("promise", contract.REAL_TASK_PROMISES, ids=lambda p: p.__name__)
def test_digits_keep_every_promise(promise):
    promise(Digits())


@pytest.mark.parametrize("promise", contract.REAL_TASK_PROMISES, ids=lambda p: p.__name__)
def test_files_of_the_format_keep_every_promise(promise, toy):
    promise(TOY)


class TooLong(SMNIST):
    @property
    def input_length(self):
        return 17


class Moody(SMNIST):
    """Hands out another order, and other probes, at every call."""

    def corpus(self):
        rng = np.random.default_rng()
        return super().corpus()._replace(train=self.sample_all("train", rng), test=self.sample_all("test", rng))

    def sample_all(self, part, rng):
        found = getattr(SMNIST.corpus(self), part)
        return found.rows(rng.permutation(len(found.inputs)))


class Twice(SMNIST):
    def corpus(self):
        found = super().corpus()
        return found._replace(train=found.train.rows([*range(30), *range(30)]))


class Nameless(SMNIST):
    def describe(self, inputs):
        return []


class Restless(SMNIST):
    def probes(self, test, stream):
        rng = np.random.default_rng()
        for probe in super().probes(test, lambda name: rng):
            yield probe._replace(severity=0.5)


BROKEN = {
    TooLong: ("real_examples_are_as_stated", r"inputs are \(60, 16\), not \(60, 17\)"),
    Moody: ("seeds_decide_bytes", "different data twice"),
    Twice: ("splits_are_disjoint", "share [0-9]+ sequences"),
    Nameless: ("every_token_has_a_role", "0 roles for 16 tokens"),
    Restless: ("probes_are_exact", "one seed, two probes"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_real_task_is_found_by_the_check_meant_for_it(broken, toy):
    promise, why = BROKEN[broken]
    task = broken(dataset="toy", side=4, corruptions={"dropout": (0.5,)})
    with pytest.raises(contract.Broken, match=why):
        getattr(contract, promise)(task)


def test_a_test_split_that_moves_is_found(toy):
    with pytest.raises(contract.Broken, match="two test splits"):
        contract.the_test_split_is_the_same_for_every_seed(Moody(dataset="toy", side=4))


def test_every_promise_of_a_real_task_is_broken_above():
    broken = {name for name, _ in BROKEN.values()} | {"the_test_split_is_the_same_for_every_seed"}
    assert broken == {p.__name__ for p in contract.REAL_TASK_PROMISES}


def test_pixels_are_shares_of_white_and_the_class_stands_last(toy):
    corpus = TOY.corpus()
    assert corpus.train.inputs.shape == (60, 16)
    assert corpus.train.inputs.max() == 1
    assert (corpus.train.targets[:, :-1] == IGNORE).all()
    assert corpus.train.targets[:, -1].tolist() == [i % 8 for i in range(60)]
    assert Digits().corpus().train.inputs.shape == (1400, 64)
    assert np.bincount(Digits().corpus().test.targets[:, -1]).min() > 25


def test_splits_are_drawn_by_the_seed_from_one_part_and_use_each_image_once(toy):
    sizes = DataConfig(train_examples=50, validation_examples=10, test_examples=15)
    one, two = (data.make(TOY, seed, sizes) for seed in (0, 1))
    assert not np.array_equal(one.validation.inputs, two.validation.inputs)
    learned = np.concatenate([one.train.inputs, one.validation.inputs])
    assert sorted(map(bytes, learned)) == sorted(map(bytes, TOY.corpus().train.inputs))
    assert np.array_equal(one.test.inputs, TOY.corpus().test.inputs[:15])
    small = data.make(TOY, 0, sizes.model_copy(update={"train_examples": 20}))
    assert np.array_equal(small.train.inputs, one.train.inputs[:20])


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        (
            {"train_examples": 55, "validation_examples": 6, "test_examples": 1},
            r"data.train_examples \+ data.validation_examples=61 must be at most 60",
        ),
        (
            {"train_examples": 1, "validation_examples": 1, "test_examples": 21},
            "data.test_examples=21 must be at most 20",
        ),
    ],
)
def test_more_examples_than_there_are_cannot_be_asked_for(toy, sizes, why):
    with pytest.raises(ConfigError, match=why):
        data.make(TOY, 0, DataConfig(**sizes))


def test_what_is_wrong_with_the_files_is_said_before_the_first_run(toy, monkeypatch):
    def expanded(*sets):
        fits.check(expand.expand("smnist", "robustness_as_published", sets, "float32"))

    with pytest.raises(ConfigError, match=r"sets/mnist: lacks train-images-idx3-ubyte, .*put them"):
        expanded()
    with pytest.raises(ConfigError, match="images are 4 x 4, must be 28 x 28"):
        expanded("task.dataset=toy")
    with pytest.raises(ConfigError, match="must be at most 60"):
        expanded("task.dataset=toy", "task.side=4")
    write_set(toy / "mnist")
    with pytest.raises(ConfigError, match="the published file 47040016"):
        expanded("task.side=4")
    write_set(toy / "odd", n=(60, 20))
    (toy / "odd" / "train-labels-idx1-ubyte").write_bytes((toy / "odd" / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(ConfigError, match="20 labels for 60 images"):
        expanded("task.dataset=odd", "task.side=4")
    monkeypatch.delenv("MAD_EFLA_DATA")
    with pytest.raises(ConfigError, match=r"--data-dir or MAD_EFLA_DATA\. They are never downloaded"):
        expanded()


def test_labels_beyond_the_classes_are_refused(tmp_path, monkeypatch):
    write_set(tmp_path / "wide", side=6)  # twelve classes
    monkeypatch.setenv("MAD_EFLA_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match="label 11 must be under 10"):
        SMNIST(dataset="wide", side=6).corpus()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ({"fog": [1]}, "fog: unknown"),
        ({"noise": [0.2, 0.1]}, "must rise"),
        ({"noise": []}, "name one at least"),
        ({"dropout": [0, 1.5]}, r"must lie in \[0, 1\]"),
    ],
)
def test_grids_that_cannot_be_meant_are_refused(text, why):
    with pytest.raises(ConfigError, match=why):
        classify(task__corruptions=text)


def test_the_bodies_are_what_they_say(toy):
    bare, stack = model.build(classify()), model.build(classify("stack"))
    assert isinstance(bare, BareClassifier)
    assert isinstance(stack, Classifier)
    names = set(bare.state_dict())
    assert names == {
        "stack.embed.position",
        "stack.embed.value.weight",
        "stack.layers.0.qkv.weight",
        "stack.layers.0.beta.weight",
        "stack.layers.0.beta.bias",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    assert set(stack.state_dict()) == names - {"norm.bias"} | {"stack.norms.0.weight"}
    x = torch.rand(3, 16)
    inner = torch.nn.functional.gelu(bare.stack.embed(x))
    assert torch.allclose(bare(x), bare.head(bare.norm(bare.mixers[0](inner))))
    with pytest.raises(ConfigError, match=r"model\.channel=mlp has no place in the bare"):
        model.build(classify(model__channel="mlp"))


@pytest.mark.parametrize("body", ["bare", "stack"])
def test_a_classifier_learns_and_is_probed(toy, tmp_path, body):
    result, folder = trained(classify(body), tmp_path)
    assert result.test.token_accuracy > 0.5
    found = {(p.name, p.severity): p for p in result.probes}
    assert list(found) == [("intensity", 1.0), ("intensity", 1e30), ("dropout", 0.0), ("dropout", 1.0)]
    assert found["intensity", 1.0].accuracy == found["dropout", 0.0].accuracy == result.test.token_accuracy
    assert found["dropout", 1.0].accuracy < 0.3
    assert folder.result() == result
    again, _ = trained(classify(body), tmp_path / "again")
    assert again.probes == result.probes


def test_an_answer_that_is_not_finite_is_wrong(toy, tmp_path):
    run = classify(mixers=[{"name": "plain_delta", "step": "euler"}], train__steps=2)
    result, _ = trained(run, tmp_path)
    blown = {p.severity: p for p in result.probes if p.name == "intensity"}[1e30]
    assert (blown.accuracy, blown.finite) == (0, 0)


def test_the_data_folder_is_named_on_the_command_line(toy, monkeypatch):
    monkeypatch.setenv("MAD_EFLA_DATA", "")
    sets = ("--set", "task.dataset=toy", "--set", "task.side=4")
    assert "--data-dir" in call("show", "smnist", *sets, code=2).stderr
    done = call("show", "smnist", *sets, "--data-dir", str(toy), "--examples", "1")
    assert "scored" in done.stdout
    assert "solver" not in done.stdout
