"""The public face: small, lazy, with examples that hold, and the same as the commands."""

import doctest
import inspect
import json
import subprocess
import sys

import pandas
import pytest

import mad_efla as mad
from mad_efla.api import functions
from mad_efla.runs.read import load
from tests.cli.test_cli import call
from tests.tiny import write_files


def test_the_face_is_what_is_promised():
    assert mad.__all__ == [
        "ConfigError",
        "Mixer",
        "Run",
        "Runs",
        "Task",
        "check",
        "data",
        "dry_run",
        "load",
        "mixer",
        "plot",
        "sweep",
        "task",
    ]
    for name in mad.__all__:
        found = getattr(mad, name)
        assert inspect.getdoc(found), f"{name} has no docstring"


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_arguments_have_the_order_and_the_defaults_that_are_promised():
    empty = inspect.Parameter.empty
    assert parameters(mad.data) == [("name", empty), ("setting", "baseline"), ("seed", 0), ("sets", None)]
    assert parameters(mad.task) == [("name", empty), ("fields", empty)]
    assert parameters(mad.mixer) == [("name", empty), ("width", 128), ("fields", empty)]
    assert parameters(mad.check) == [("name", empty), ("sets", None), ("width", 32)]
    assert parameters(mad.load) == [("places", empty)]
    assert parameters(mad.sweep) == [
        ("tasks", empty),
        ("plan", "quick"),
        ("mixers", None),
        ("sets", None),
        ("device", "auto"),
        ("workers", None),
        ("out", "runs"),
        ("tracking_uri", None),
        ("hours", None),
        ("known", ()),
        ("retry_failed", False),
        ("progress", None),
    ]


def test_importing_it_loads_neither_torch_nor_pandas():
    code = "import sys, mad_efla; print(json.dumps([m for m in ('torch', 'pandas', 'click', 'numpy') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", "import json; " + code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.filterwarnings("ignore")
def test_examples_of_docstrings_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(functions)
    assert found.attempted >= 10
    assert not found.failed


@pytest.fixture
def swept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return mad.sweep("task.yaml", plan="plan.yaml", workers=0)


def test_a_sweep_leaves_what_the_command_leaves_and_makes_nothing_twice(swept, tmp_path):
    before = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("result.json")}
    assert len(before) == len(swept) == 4
    again = call("sweep", "task.yaml", "--plan", "plan.yaml", "--no-tracking")
    assert {p: p.read_bytes() for p in (tmp_path / "runs").rglob("result.json")} == before
    for sentence in swept.verdict():
        assert sentence in again.stdout
    assert len(load(tmp_path / "runs")) == 1


def test_the_frame_gives_what_the_table_gives(swept):
    frame = swept.frame()
    means = frame[frame.role == "measured"].groupby("mixer").score.mean()
    scores = swept.scores().set_index("mixer")
    assert means.to_dict() == pytest.approx(scores.accuracy.to_dict())
    assert set(frame.status) == {"finished"}
    assert {"optim.lr", "task.vocab_size", "test_loss", "seconds", "data_digest"} <= set(frame.columns)
    (pair,) = swept.differences().itertuples()
    assert pair.difference == pytest.approx(means[pair.first] - means[pair.second])


def test_runs_are_filtered_like_a_frame(swept):
    efla = swept[swept.mixer == "efla(heads=2)"]
    assert len(efla) == 2
    assert efla.scores().mixer.tolist() == ["efla(heads=2)"]
    assert [run.config.seed for run in efla] == [0, 1]
    with pytest.raises(AttributeError, match="did you mean 'mixer'"):
        swept.mixr  # noqa: B018
    with pytest.raises(mad.ConfigError, match="has no run that is done"):
        efla.best("attention")


def test_a_run_gives_its_model_its_data_and_its_curves(swept):
    run = swept.best("efla(heads=2)")
    examples = run.data("test")
    assert examples.inputs.shape == (32, 11)
    model = run.model()
    assert not model.training
    with pytest.raises(mad.ConfigError, match=r"split='tset'.*did you mean"):
        run.data("tset")
    assert set(run.curves().columns) == {"step", "metric", "value"}
    curves = swept.curves()
    assert set(curves.run) == set(swept.frame().index)
    assert isinstance(swept.probes(), pandas.DataFrame)


def test_runs_show_themselves_as_the_terminal_does(swept):
    text, page = repr(swept), swept._repr_html_()
    for sentence in swept.verdict():
        assert sentence.split(" [")[0] in " ".join(text.split())
        assert "<table>" in page
    assert "efla(heads=2)" in text


def test_figures_are_those_of_the_report(swept):
    runs = swept
    for draw in (mad.plot.leaderboard, mad.plot.forest, mad.plot.learning):
        figure = draw(runs, width=4)
        assert figure.get_size_inches()[0] == pytest.approx(4, abs=0.5)
        assert figure.axes
    found = mad.plot.spectra(runs.best("efla(heads=2)"), examples=2)
    assert {"eigenvalues", "reach"} <= set(found)
    with pytest.raises(mad.ConfigError, match="nothing to tell of difficulty"):
        mad.plot.difficulty(runs)


def test_a_wrong_word_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mad.ConfigError, match="did you mean 'recall'"):
        mad.task("recal")
    with pytest.raises(mad.ConfigError, match="did you mean 'efla'"):
        mad.mixer("elfa")
    with pytest.raises(mad.ConfigError, match="name at least one task"):
        mad.sweep()
    with pytest.raises(mad.ConfigError, match="holds no sweep"):
        mad.load()


def test_what_the_command_would_say_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"model.width": 16, "train.steps": 2, "data.train_examples": 64, "data.validation_examples": 16}
    small |= {"data.test_examples": 16, "settings": "baseline", "seeds": [0], "optim.lr": 0.006}
    with pytest.warns(UserWarning, match="protocol custom, not quick: .*by --set"):
        runs = mad.sweep("recall", mixers=["efla"], sets=small, workers=0)
    assert set(runs.protocol) == {"custom"}
