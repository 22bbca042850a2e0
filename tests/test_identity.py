"""A run is what it says it is: the code of the user's own tasks and mixers is part of its name."""

import importlib
import sys

import pytest

from mad_efla import plugins
from mad_efla.config import ConfigError
from mad_efla.execution.attempt import attempt
from mad_efla.plan import expand
from mad_efla.runs.folder import RunFolder
from mad_efla.training import data_cache
from tests.tiny import tiny

MIXER = """
from mad_efla.mixers import MixerConfig
from mad_efla.mixers.identity import Identity
from {package}.parts import FACTOR


class Mine(Identity):
    Config = MixerConfig

    def forward(self, x):
        return FACTOR * x
"""
TASK = """
from mad_efla.tasks.recall import Recall


class Mine(Recall):
    name: str
"""


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """A package of the user's own: a mixer that imports a sibling, and a task."""
    name = f"own_{abs(hash(request.node.name))}"
    folder = tmp_path / "code" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "parts.py").write_text("FACTOR = 1.0\n")
    (folder / "mixer.py").write_text(MIXER.format(package=name))
    (folder / "task.py").write_text(TASK)
    (folder / "other.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "code")
    importlib.invalidate_caches()
    yield folder
    for module in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[module]


def with_mixer(package, **fields):
    return tiny(mixers=[f"{package.name}.mixer:Mine"], **fields)


@pytest.mark.parametrize(
    ("plan", "task", "name"),
    [
        ("mad", "recall", "d6edca137980e2b6"),
        ("quick", "recall", "aafa75a4c7f06801"),
        ("mad_mini", "compression", "51a8d2a6b68461ad"),
    ],
)
def test_runs_of_built_in_parts_keep_the_names_they_had(plan, task, name):
    assert expand.expand(task, plan, [], "bfloat16").runs[0].fingerprint == name


@pytest.mark.parametrize("file", ["mixer.py", "parts.py", "__init__.py"])
def test_edited_code_is_another_run(package, file):
    before = with_mixer(package)
    assert list(before.code) == [f"{package.name}.mixer:Mine"]
    assert with_mixer(package).fingerprint == before.fingerprint
    (package / "other.py").write_text("UNUSED = 1\n")
    assert with_mixer(package).fingerprint == before.fingerprint
    with (package / file).open("a") as opened:
        opened.write("# edited\n")
    assert with_mixer(package).fingerprint != before.fingerprint
    assert with_mixer(package).mixer == before.mixer == f"{package.name}.mixer:Mine"


def test_a_run_of_other_code_is_read_and_not_gone_on_with(package, tmp_path):
    run = with_mixer(package)
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    folder.create(run)
    (package / "parts.py").write_text("FACTOR = 2.0\n")
    assert folder.run() == run
    attempt(folder, "cpu", {}, lambda: False)
    failure = folder.failure()
    assert failure.kind == "failed" and not failure.transient
    assert "the code of own_" in failure.reason and "makes a new run of it" in failure.reason


def test_data_of_an_edited_task_is_made_anew(package):
    run = tiny(task__name=f"{package.name}.task:Mine")
    before = data_cache.key(run.task, 0, run.data)
    assert data_cache.key(run.task, 0, run.data) == before
    with (package / "task.py").open("a") as opened:
        opened.write("# edited\n")
    assert data_cache.key(run.task, 0, run.data) != before


def test_a_class_without_source_is_refused_with_the_cure(monkeypatch):
    module = type(sys)("made_up")
    monkeypatch.setitem(sys.modules, "made_up", module)
    with pytest.raises(ConfigError, match=r"no source file .*define it in a module"):
        plugins.source_digest("made_up:Mixer")
