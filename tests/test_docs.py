"""The documents are held to the code."""

import re
from pathlib import Path

import click
import pytest

import mad_efla.mixers
import mad_efla.tasks
from mad_efla import config, contract, plugins
from mad_efla.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readme_names_every_command():
    for name, command in cli.commands.items():
        shown = [f"{name} {c}" for c in getattr(command, "commands", {})] or [name]
        assert all(f"mad-efla {words}" in README for words in shown), name


def test_the_readme_names_every_mixer_task_and_plan():
    names = plugins.names(mad_efla.mixers) + plugins.names(mad_efla.tasks)
    names += [path.stem for path in config.presets("sweeps")]
    assert not [name for name in names if f"`{name}`" not in README and f"{name}.yaml" not in README]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "DESIGN.md", "CHANGELOG.md"])
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


def test_every_shipped_module_opens_by_saying_what_it_is():
    for path in [*(ROOT / "mad_efla").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert path.read_text().startswith('"""'), path


def test_the_results_of_the_readme_are_those_of_the_results_page():
    page = (ROOT / "RESULTS.md").read_text()
    rows = re.findall(r"^\| \de-\d \| .+ \|$", README, re.M)
    assert len(rows) == 5
    assert rows == re.findall(r"^\| \de-\d \| .+ \|$", page, re.M)


def test_the_mixer_of_the_readme_keeps_every_promise(tmp_path, monkeypatch):
    (text,) = re.findall(r"```python\n(# mean.py\n.*?)```", README, re.S)
    (tmp_path / "mean.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    _, findings = contract.check("mean:Mean", (), 32)
    assert findings
    assert not [f for f in findings if f.broken]


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")), ids=lambda p: p.name)
def test_links_and_pictures_lead_somewhere(document):
    found = re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text())
    assert not [path for path in found if not (ROOT / path).exists()]
