"""The documents are held to the code."""

import ast
import re
from pathlib import Path

import click
import pytest
import torch

import mad_efla.mixers
import mad_efla.tasks
from mad_efla import config, contract, plugins
from mad_efla.cli import cli
from mad_efla.spectrum.diagnose import training_scalars
from mad_efla.training import model
from tests import reference
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "REFERENCE.md").read_text()


def test_the_reference_is_what_the_code_says():
    assert reference.page() == REFERENCE, "run `python -m tests.reference > REFERENCE.md`"


def test_the_readme_names_every_mixer_task_and_plan_and_fits_its_length():
    names = plugins.names(mad_efla.mixers) + plugins.names(mad_efla.tasks)
    names += [path.stem for path in config.presets("sweeps")]
    assert not [name for name in names if f"`{name}`" not in README and f"{name}.yaml" not in README]
    assert len(README.splitlines()) <= 200


def test_every_metric_that_a_training_logs_has_a_meaning():
    source = (ROOT / "mad_efla/training/loop.py").read_text()
    assert set(re.findall(r'"(train/\w+)"', source)) == set(reference.TRAIN)
    logged = set()
    for name in ("efla", "attention", "mamba3"):
        built = model.build(tiny(mixers=[{"name": name, "heads": 2}]))
        logged |= set(training_scalars(built, torch.randint(0, 8, (2, 11))))
    assert logged == {f"spectrum/{name}" for name in reference.SPECTRUM}


@pytest.mark.parametrize("document", ["README.md", "REFERENCE.md", "CONTRIBUTING.md", "DESIGN.md", "CHANGELOG.md"])
def test_options_and_files_that_documents_name_exist(document):
    text = (ROOT / document).read_text()
    options = {o for c in _commands(cli) for p in c.params for o in p.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--help", "--version"}
    named -= {"--head", "--address"}  # of `ray start`
    assert named <= options
    paths = re.findall(r"`((?:mad_efla|kernels|tasks|sweeps|tests)/[\w/.]+)`", text)
    assert not [p for p in paths if not (ROOT / p).exists()]


def _commands(command):
    yield command
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from _commands(child)


def test_public_functions_of_three_arguments_or_more_say_what_each_means():
    silent = []
    for room in ("analysis", "cli", "reporting", "spectrum", "tasks"):
        found = [f for path in (ROOT / "mad_efla" / room).rglob("*.py") for f in _public(ast.parse(path.read_text()))]
        told = {f.name for _, f in found if "Args:" in (ast.get_docstring(f) or "")}
        silent += [f"{room}: {name}" for name, f in found if f.name not in told and _arguments(f) >= 3]
    assert silent == []


def _public(tree, above=""):
    """Yield functions and methods by name; those of the same name in a room may share their Args."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from _public(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield above + node.name, node


def _arguments(function):
    """Count the arguments; none of a command, whose options are said in its help."""
    if any(ast.unparse(d) == "says_errors" for d in function.decorator_list):
        return 0
    return sum(a.arg not in ("self", "cls") for a in [*function.args.args, *function.args.kwonlyargs])


def test_every_shipped_module_opens_by_saying_what_it_is():
    for path in [*(ROOT / "mad_efla").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert path.read_text().startswith('"""'), path


def test_the_results_of_the_readme_are_those_of_the_results_page():
    page = (ROOT / "RESULTS.md").read_text()
    rows = re.findall(r"^\| \de-\d \| .+ \|$", README, re.M)
    assert len(rows) == 5
    assert rows == re.findall(r"^\| \de-\d \| .+ \|$", page, re.M)


def test_the_shortest_mixer_keeps_every_promise(tmp_path, monkeypatch):
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    (text,) = re.findall(r"```python\n(# mean.py\n.*?)```", contributing, re.S)
    (tmp_path / "mean.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    _, findings = contract.check("mean:Mean", (), 32)
    assert findings
    assert not [f for f in findings if f.broken]


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")), ids=lambda p: p.name)
def test_links_and_pictures_lead_somewhere(document):
    found = re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text())
    assert not [path for path in found if not (ROOT / path).exists()]
