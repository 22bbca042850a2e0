"""One folder that cannot be read costs itself: every command shows the rest, and says what and why."""

import functools
import json
import sys
from pathlib import Path

import pytest

from mad_efla import plugins
from mad_efla.runs import read
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.schema import Row, SweepRecord, planned
from mad_efla.runs.sweeps import write_sweep
from tests.cli.test_cli import call
from tests.runs.test_folder import result
from tests.tasks.test_pixels import classify, toy, trained  # noqa: F401
from tests.tiny import tiny

OWN = """
from mad_efla.mixers.plain_efla import PlainEFLA

class Mine(PlainEFLA):
    class Config(PlainEFLA.Config):
        name: str
"""

COMMANDS = {
    "status": ["status", "runs"],
    "score": ["score", "runs"],
    "results": ["results", "runs"],
    "report": ["report", "runs"],
    "logs": ["logs", "{bad}", "--out", "runs"],
    "causes": ["causes", "runs", "--examples", "2"],
    "spectrum": ["spectrum", "{good}", "{bad}", "--out", "runs", "--examples", "2"],
}
WEIGHTS = {"causes", "spectrum"}  # the commands that look into models


def _code(text):
    def damage(folder):
        path = Path("own.py")
        path.unlink() if text is None else path.write_text(text)
        sys.modules.pop("own", None)
        plugins.mixer.cache_clear()

    return damage


def _file(name, change):
    def damage(folder):
        path = folder.path / name
        raw = change(path.read_bytes())
        path.unlink() if raw is None else path.write_bytes(raw)

    return damage


def _more(raw):
    return json.dumps(json.loads(raw) | {"energy_joules": 3}).encode()


def _folder_is_a_file(folder):
    folder.path.rename(folder.path.with_name("moved"))
    folder.path.write_bytes(b"")


BAD = {  # what is wrong, which commands have to say so, and in which words
    "plug-in gone": (_code(None), {*COMMANDS}, "importable from here"),
    "plug-in raises": (_code("1 / 0"), {*COMMANDS}, "importing own fails: ZeroDivisionError"),
    "plug-in edited": (_code(OWN + "# and more\n"), WEIGHTS, "or put the code back"),
    "field of another version": (_file("config.json", _more), {*COMMANDS}, "energy_joules: unknown key"),
    "no configuration": (_file("config.json", lambda raw: None), {*COMMANDS}, "run its sweep again to restore it"),
    "configuration cut": (_file("config.json", lambda raw: raw[:99]), {*COMMANDS}, "run its sweep again to restore it"),
    "configuration empty": (_file("config.json", lambda raw: b""), {*COMMANDS}, "run its sweep again to restore it"),
    "result cut": (_file("result.json", lambda raw: raw[:99]), {*COMMANDS} - WEIGHTS, "its sweep makes the run again"),
    "newer result": (_file("result.json", _more), {*COMMANDS} - WEIGHTS, "update mad-efla"),
    "weights cut": (_file("model.pt", lambda raw: raw[:999]), WEIGHTS, "move runs"),
    "no weights": (_file("model.pt", lambda raw: None), WEIGHTS, "move runs"),
    "metrics of other bytes": (_file("metrics.jsonl", lambda raw: b'\0\xff{"\n[]\n1\n'), set(), ""),
    "a file": (_folder_is_a_file, {*COMMANDS} - {"logs"}, "run its sweep again to restore it"),
}


@pytest.fixture
def pair(toy, tmp_path, monkeypatch):  # noqa: F811
    """A good run and one of a mixer of the user's own, of one sweep."""
    Path("own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "mixer", functools.cache(plugins.mixer.__wrapped__))
    runs = [classify(mixers=[{"name": name}], train__steps=2) for name in ("plain_efla", "own:Mine")]
    folders = [trained(run, tmp_path)[1] for run in runs]
    named = tuple(run.fingerprint for run in runs)
    record = SweepRecord(
        id="sweep",
        task="smnist",
        plan="plan",
        protocol="custom",
        command="mad-efla sweep",
        fingerprints=named,
        planned=tuple(map(planned, runs)),
        started=1,
        ended=2,
    )
    write_sweep(tmp_path / "runs", record)
    yield folders
    sys.modules.pop("own", None)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bad", BAD)
def test_the_rest_is_shown_and_what_is_bad_is_named(pair, caplog, bad, command):
    good, spoilt = pair
    damage, saying, words = BAD[bad]
    damage(spoilt)
    before = {p: p.read_bytes() for p in Path("runs").glob("*/*") if p.is_file()}
    done = call(*(w.format(good=good.fingerprint, bad=spoilt.fingerprint) for w in COMMANDS[command]))
    said = done.stdout + done.stderr + caplog.text
    if command == "report":
        said += Path("runs/report/index.html").read_text()
    if command not in ("logs", "status"):
        assert "plain_efla" in said
    if command in saying:
        assert words in said
        assert spoilt.fingerprint in said
    assert {p: p.read_bytes() for p in before} == before


def test_a_record_of_a_sweep_that_is_cut_is_named_by_whoever_shows_the_others(pair, caplog):
    Path("runs/sweeps/other.json").write_bytes(b'{"id": "ot')
    for command in ("status", "score"):
        caplog.clear()
        call(command, "runs")
        assert "runs/sweeps/other.json: is no record of a sweep; its sweep command writes it again" in caplog.text


def test_of_two_folders_a_run_is_taken_from_the_one_that_has_its_result(tmp_path):
    done, half = tiny(), tiny(seed=1)
    record = SweepRecord(
        id="sweep",
        task="recall",
        plan="plan",
        protocol="custom",
        command="mad-efla sweep",
        fingerprints=(done.fingerprint, half.fingerprint),
        planned=(planned(done), planned(half)),
        started=1,
        ended=2,
    )
    for name in ("first", "second"):
        write_sweep(tmp_path / name, record)
        for run in (done, half):
            RunFolder(tmp_path / name, run.fingerprint).create(run)
    first, second = (RunFolder(tmp_path / name, done.fingerprint) for name in ("first", "second"))
    first.append([Row(1, 1, {"a": 1.0})])
    second.finish(result(done.fingerprint))
    for spoil in (lambda: None, lambda: (first.path / "config.json").write_text("{")):
        spoil()
        (group,) = read.load(tmp_path / "first", tmp_path / "second")
        assert group.results.keys() == {done.fingerprint}
        assert group.runs.keys() == {done.fingerprint, half.fingerprint}
        assert group.folders[done.fingerprint].path == second.path
        assert group.folders[half.fingerprint].path == first.path.with_name(half.fingerprint)
        assert group.unreadable == []
