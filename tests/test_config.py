"""Whatever is wrong with a file is said with its place, and never as a traceback."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from mad_efla import config
from mad_efla.config import ConfigError, Document, Section


class Inner(Section):
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = 0.0


class Outer(Section):
    inner: Inner = Inner()
    sizes: tuple[int, ...] = ()
    word: str = "a"


def read(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return config.read(path)


def refused(tmp_path, text, model=Outer):
    with pytest.raises(ConfigError) as error:
        config.validate(model, read(tmp_path, text))
    return str(error.value).replace(str(tmp_path) + "/", "")


def test_numbers_are_yaml_1_2(tmp_path):
    assert read(tmp_path, "a: 1e-3\nb: off\nc: 0x10\nd: 010\n").data == {"a": 0.001, "b": "off", "c": 16, "d": 10}


def test_equal_values_and_any_order_of_keys_give_equal_json(tmp_path):
    first = config.validate(Outer, read(tmp_path, "inner: {lr: 1e-3, weight_decay: 0}\nword: b"))
    second = config.validate(Outer, read(tmp_path, "word: b\ninner: {weight_decay: 0.0, lr: .001}"))
    text = config.canonical_json(first.model_dump())
    assert text == config.canonical_json(second.model_dump())
    assert config.digest(text) == config.digest(text)
    assert json.loads(text)["inner"]["lr"] == 0.001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "word: b\ninner:\n  lr: 1\n  wieght_decay: 0",
            "plan.yaml:4: inner.wieght_decay: unknown key; did you mean 'weight_decay'?",
        ),
        ("sizzes: [1]", "plan.yaml:1: sizzes: unknown key; did you mean 'sizes'?"),
        ("zzz: 1", "plan.yaml:1: zzz: unknown key; known: inner, sizes, word"),
        ("inner: {lr: fast}", 'plan.yaml:1: inner.lr="fast": input should be a valid number'),
        ("inner:\n  lr: -1", "plan.yaml:2: inner.lr=-1: input should be greater than 0"),
        ("inner: {lr: .inf}", "plan.yaml:1: inner.lr=Infinity: input should be a finite number"),
        ("inner: {lr: true}", "plan.yaml:1: inner.lr=true: input should be a valid number"),
        ("sizes:\n- 1\n- two", 'plan.yaml:3: sizes[1]="two": input should be a valid integer'),
        ("inner: 3", "plan.yaml:1: inner=3: input should be an object"),
        ("word: b\nword: c", 'plan.yaml:2: not valid YAML: found duplicate key "word"'),
        ("a: &x 1\nb: *x", "plan.yaml:1: anchors and aliases are refused"),
        ("a: !!python/object:os.system {}", "plan.yaml:1: tag"),
        ("a: !custom 1", "plan.yaml:1: tag !custom is refused"),
        ("a: [1, 2", "plan.yaml:1: not valid YAML"),
        ("- 1\n- 2", "plan.yaml:1: must be a mapping"),
        ("1: 2", "plan.yaml:1: a key must be a word"),
        ("[a]: 2", "plan.yaml:1: a key must be a word"),
        ("a: " + "[" * 40 + "]" * 40, "plan.yaml:1: nested deeper than 16"),
        ("a: [" + "1," * 30_000 + "]", "more than 20000 entries"),
        ("x" * 300_000, "longer than 256 KiB"),
        ("", "plan.yaml: is empty"),
        ("# nothing\n", "plan.yaml: is empty"),
    ],
)
def test_bad_text_is_refused_with_its_place(tmp_path, text, message):
    assert message in refused(tmp_path, text)


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        config.read(tmp_path / "bytes.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        config.find(str(tmp_path), "tasks")
    with pytest.raises(ConfigError, match="No such file"):
        config.read(tmp_path / "absent.yaml")


def test_a_folder_named_like_a_preset_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recall").mkdir()
    assert config.find("recall", "tasks").name == "recall.yaml"
    (tmp_path / "quick").write_text("a: 1")
    assert config.find("quick", "sweeps") == Path("quick")


def test_every_error_of_a_file_is_reported_at_once(tmp_path):
    assert len(refused(tmp_path, "zzz: 1\nword: 3").splitlines()) == 2


@pytest.mark.parametrize("name", ["../x", "/etc/shadow/x", "x" * 300, "🦆", "re call", "", "a\0b"])
def test_odd_names_are_refused(name):
    with pytest.raises(ConfigError):
        config.find(name, "tasks")


def test_a_near_miss_of_a_preset_is_suggested():
    with pytest.raises(ConfigError, match=r"recal: no such file.*did you mean 'recall'\?"):
        config.find("recal", "tasks")


def test_a_path_comes_before_a_preset_of_that_name(tmp_path):
    assert config.find("recall", "tasks").name == "recall.yaml"
    assert config.find("tasks/recall.yaml", "tasks").is_file()
    (tmp_path / "recall").write_text("word: mine")
    assert config.read(config.find("recall", "tasks")).data == {"word": "mine"}


def test_a_folder_hides_no_preset(tmp_path):
    (tmp_path / "recall").mkdir()
    assert config.find("recall", "tasks").name == "recall.yaml"


class Odd(Section):
    word: str = "a"
    kind: Any = Path("somewhere")
    table: dict[str, Any] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {},
            "test: mixers[0].kind=PosixPath('somewhere'): field kind of class tests.test_config.Odd holds a value of "
            "type PosixPath, which no run's record can hold; give it numbers that are finite, words,",
        ),
        ({"kind": 1}, None),
        ({"kind": [1, {"a": None}]}, None),
    ],
)
def test_a_value_that_no_record_can_hold_is_refused_by_field_and_class(fields, message):
    document = Document(fields, {(): "test"}, "test")
    if message is None:
        assert config.validate(Odd, document, "mixers[0]").kind == fields["kind"]
        return
    with pytest.raises(ConfigError) as error:
        config.validate(Odd, document, "mixers[0]")
    assert message in str(error.value)


@pytest.mark.parametrize("value", [math.inf, {1, 2}, b"a", {1: 2}, 1j, [Path("x")]])
def test_defaults_of_odd_kinds_are_found_wherever_they_lie(value):
    odd = type("Mine", (Odd,), {"__annotations__": {"kind": Any}, "kind": {"deep": value}, "__module__": __name__})
    with pytest.raises(ConfigError, match=r"kind\.deep.*field kind of class tests\.test_config\.Mine"):
        config.validate(odd, Document({}, {(): "test"}))


def test_merging_keeps_the_place_of_what_won():
    first = config.from_paths({"a.b": 1, "a.c": 2}, "first")
    second = config.from_paths({"a.b": 3}, "second")
    merged = config.merge(first, second)
    assert merged.data == {"a": {"b": 3, "c": 2}}
    assert merged.place(("a", "b")) == "second"
    assert merged.place(("a", "c")) == "first"
    assert first.data == {"a": {"b": 1, "c": 2}}


def test_assignments_are_yaml_values():
    assert config.assignment("optim.lr=3e-3") == ("optim.lr", 0.003)
    assert config.assignment("mixers=[efla, {name: efla}]")[1] == ["efla", {"name": "efla"}]
    assert config.assignment("a.b=")[1] is None
    for text in ("optim.lr", "=3", "a=[1", "a=&x 1"):
        with pytest.raises(ConfigError, match="--set"):
            config.assignment(text)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_is_data_or_a_config_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("yaml") / "f.yaml"
    path.write_text(text, encoding="utf-8", errors="ignore")
    try:
        document = config.read(path)
    except ConfigError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(document, Document)
