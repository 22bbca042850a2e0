"""A run is one value, and its fingerprint its name."""

import pytest

from mad_efla.config import ConfigError, Document
from mad_efla.plan import run
from tests.tiny import BASE, tiny


def test_equal_runs_have_equal_fingerprints_however_written():
    assert tiny().fingerprint == tiny(optim__lr=0.01).fingerprint
    assert tiny(optim__lr=1e-3).fingerprint == tiny(optim__lr=0.001).fingerprint
    assert tiny(optim__weight_decay=0).fingerprint == tiny(optim__weight_decay=0.0).fingerprint


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1},
        {"optim__lr": 0.02},
        {"task__seq_len": 14},
        {"train__precision": "bfloat16"},
        {"mixers": ["efla"]},
        {"model__channel": "mlp"},
        {"train__stop_at": 0.9},
        {"data__test_examples": 33},
    ],
)
def test_everything_that_moves_a_number_moves_the_fingerprint(fields):
    assert tiny(**fields).fingerprint != tiny().fingerprint


def test_a_setting_is_a_label_and_no_part_of_the_fingerprint():
    assert tiny(setting="easy").fingerprint == tiny(setting="hard").fingerprint


def test_a_run_survives_its_json():
    first = tiny(mixers=["attention", {"name": "efla", "heads": 4}], model__depth=4)
    data = first.model_dump(mode="json")
    del data["numbers"], data["task_version"]
    assert run.build(Document(data)).fingerprint == first.fingerprint


def test_labels_show_what_departs_from_defaults():
    assert tiny(mixers=["efla"]).mixer == "efla"
    assert tiny().mixer == "efla(heads=2)"
    assert tiny(mixers=["attention", "efla"], model__depth=4).mixer == "attention+efla"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": ["eflo"]}, "mixer 'eflo' is unknown; did you mean 'efla'?"),
        ({"mixers": []}, "mixers=[] must name a mixer"),
        ({"mixers": [3]}, "mixers[0]=3 must be a mixer's name"),
        ({"mixers": [{"name": "efla", "head": 2}]}, "head: unknown key; did you mean 'heads'?"),
        ({"mixers": [{"name": "efla", "step": "euler"}]}, "step"),
        ({"mixers": ["efla", "attention"]}, "a pattern of 2 mixers does not fill model.depth=1"),
        ({"mixers": ["no.such:Mixer"]}, "write it as package.module:Name"),
        ({"mixers": ["mad_efla.runs.schema:Result"]}, "must be a class derived from torch.nn.Module"),
        ({"mixers": ["mad_efla.mixers:Mixer"]}, "has to define forward; see CONTRIBUTING.md"),
        ({"task__name": "recal"}, "task 'recal' is unknown; did you mean 'recall'?"),
        ({"task__name": 3}, "must be the name of a task"),
        ({"train__epochs": 3}, "give exactly one of them"),
        ({"train__steps": None}, "give exactly one of them"),
        ({"train__select_split": "none", "train__stop_at": 0.9}, "needs a split"),
        ({"protocol": "madd"}, "protocol"),
        ({"seed": -1}, "seed=-1: input should be greater than or equal to 0"),
        ({"optm__lr": 1}, "test: optm: unknown key; did you mean 'optim'?"),
    ],
)
def test_what_cannot_run_is_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        tiny(**fields)
    assert message in str(error.value)


def test_budget_in_epochs_counts_the_last_partial_batch():
    document = Document(BASE.data | {"train": {"batch_size": 48, "epochs": 3}})
    built = run.build(document)
    assert (built.steps_per_epoch, built.steps, built.eval_every) == (2, 6, 2)
