"""A protocol's name fixes everything that moves a number, and says what it leaves free."""

import json
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from mad_efla import config
from mad_efla.config import ConfigError
from mad_efla.plan import expand, protocols
from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder
from tests.tiny import tiny

PLANS = {"mad": "mad", "mad-lab": "mad_lab", "mad-mini": "mad_mini", "quick": "quick"}
FREE = {"mixers", "code", "seed", "setting", "protocol"}


def first(protocol, task="fuzzy_recall"):
    return expand.expand(task, PLANS[protocol], ["mixers=[efla]"], "float32").runs[0]


def leaves(value: Any, path: tuple[str, ...] = ()):
    """Walk over every field of a run, of its sections too: path, annotation, value."""
    for name, field in type(value).model_fields.items():
        held = getattr(value, name)
        if isinstance(held, BaseModel):
            yield from leaves(held, (*path, name))
        else:
            yield (*path, name), field.annotation, held


def other(annotation: Any, value: Any) -> Any:
    """Return another value of a field's kind; a kind that is not known here fails the test."""
    kinds = [a for a in (annotation, *get_args(annotation)) if get_origin(a) is Literal]
    if kinds:
        return next((v for v in get_args(kinds[0]) if v != value), "another")
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        return (*value[:-1], value[-1] / 2)
    if isinstance(value, int | float):
        return value + type(value)(1)
    if isinstance(value, str) and str in get_args(annotation):
        return "another"
    if value is None:
        return 1 if int in get_args(annotation) else 1.0
    raise AssertionError(f"no other value is known for {annotation} {value!r}: place the field")


def with_value(run: Any, path: tuple[str, ...], value: Any) -> Any:
    inner = value if len(path) == 1 else with_value(getattr(run, path[0]), path[1:], value)
    return run.model_copy(update={path[0]: inner})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("protocol", PLANS)
def test_every_field_of_a_run_is_fixed_or_on_the_free_list(protocol):
    run = first(protocol)
    assert protocols.departures(run) == []
    free = protocols.definition(protocol, run.task.name).free
    assert set(free) == ({"train.precision"} if protocol in ("quick", "mad-mini") else set())
    assert set(protocols.FREE) == FREE
    seen = set()
    for path, annotation, value in leaves(run):
        name = ".".join(path)
        if name in FREE:
            continue
        changed = with_value(run, path, other(annotation, value))
        found = [d.field for d in protocols.departures(changed)]
        assert found == ([] if name in free else [name]), name
        seen.add(path[0])
    assert seen | FREE == set(RunConfig.model_fields)


@pytest.mark.parametrize("protocol", PLANS)
def test_shipped_plans_keep_to_their_protocol_whatever_it_leaves_free(protocol):
    sets = ["mixers=[{name: efla, heads: 4}, [efla, identity]]", "seeds=[7, 8]"]
    for task in ("recall", "memorization"):
        found = expand.expand(task, PLANS[protocol], sets, "float32")
        assert (found.protocol, found.notes) == (protocol, ())
        assert {r.protocol for r in found.runs} == {protocol}


@pytest.mark.parametrize(
    ("plan", "text", "note"),
    [
        ("mad", "optim.betas=[0.5, 0.6]", "optim.betas=[0.5, 0.6] by --set (mad: [0.9, 0.999])"),
        ("mad", "model.norm_eps=1e-6", "model.norm_eps=1e-06 by --set (mad: 1e-05)"),
        ("mad", "data.validation_examples=9", "data.validation_examples=9 by --set (mad: 1280)"),
        ("mad", "train.eval_every=5", "train.eval_every=5 by --set (mad: none)"),
        ("mad", "task.vocab_size=20", "task.vocab_size=20 by --set (mad: 16 or 32 or 64 or 128)"),
        ("mad_lab", "task.multi_query=false", "task.multi_query=false by --set (mad-lab: true)"),
        ("quick", "optim.lr=0.5", "optim.lr=0.5 by --set (quick: 0.002 or 0.006 or 0.02)"),
        ("quick", "train.steps=5000", "train.steps=5000 by --set (quick: 500)"),
        ("mad_mini", "train.batch_size=32", "(mad-mini: 64 or 32 or 16, though not beside the run's other values)"),
    ],
)
def test_a_set_that_departs_makes_the_runs_custom_and_says_so(plan, text, note):
    found = expand.expand("recall", plan, [text, "mixers=[efla]"], "float32")
    assert found.protocol == "custom"
    assert {r.protocol for r in found.runs} == {"custom"}
    (said,) = found.notes
    assert said.startswith("protocol custom, not ") and note in said


def test_the_published_grid_in_part_is_still_the_protocol():
    found = expand.expand("recall", "mad", ["optim.lr=[1e-4, 1e-3]", "settings=[baseline]"], "float32")
    assert found.protocol == "mad" and len(found.runs) == 4 * 2 * 2


def test_a_plan_that_departs_from_the_protocol_it_names_is_refused(tmp_path):
    shipped = next(p for p in config.presets("sweeps") if p.stem == "mad").read_text()

    def refused(text, *sets):
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(ConfigError) as error:
            expand.expand("recall", "own.yaml", sets, "float32")
        return str(error.value)

    (tmp_path / "own.yaml").write_text(shipped.replace("deltanet, ", ""))
    assert expand.expand("recall", "own.yaml", [], "float32").protocol == "mad"
    assert expand.expand("recall", "own.yaml", ["optim.betas=[0.5, 0.6]"], "float32").protocol == "custom"
    message = refused(shipped.replace("batch_size: 128", "batch_size: 64"))
    assert "own.yaml:10: train.batch_size=64 departs from protocol 'mad', which fixes it to 128; name" in message
    message = refused(shipped.replace(", loss: sequence", ""))
    assert "own.yaml:2: train.loss=answers departs from protocol 'mad'" in message
    assert "optim.schedule=constant departs" in refused(shipped, "protocol=mad", "optim.schedule=constant")
    message = refused(shipped.replace("protocol: mad", "protocol: quick"))
    assert "train.epochs=200 departs from protocol 'quick', which fixes it to none" in message


def test_a_task_file_that_departs_makes_the_runs_custom_and_says_so(tmp_path):
    (tmp_path / "recall.yaml").write_text("task: {name: recall, multi_query: false}\n")
    found = expand.expand("recall.yaml", "quick", ["mixers=[efla]"], "float32")
    assert found.notes == ["protocol custom, not quick: task.multi_query=false by recall.yaml:1 (quick: true)"]
    found = expand.expand("counting", "quick", ["mixers=[efla]", "settings=baseline", "train.steps=9"], "float32")
    assert "task.name=counting" in found.notes[0] and found.protocol == "custom"


def test_a_run_folder_is_read_whatever_its_protocol_has_become(tmp_path):
    run = tiny(protocol="mad", train__loss="answers")
    folder = RunFolder(tmp_path, run.fingerprint)
    folder.create(run)
    assert folder.run() == run
    assert json.loads((folder.path / "config.json").read_text())["protocol"] == "mad"
