"""All randomness of a run is its own: layers that draw, and layers that throw switches."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mad_efla import plugins
from mad_efla.execution import pool
from mad_efla.mixers.identity import Identity
from mad_efla.runs.folder import RunFolder
from mad_efla.training import loop, randomness
from mad_efla.training.loop import Interrupted, Loop
from tests.tiny import tiny

REACHING = """
import os
import torch
from mad_efla.mixers.identity import Identity

class Reaching(Identity):
    class Config(Identity.Config):
        name: str
    def forward(self, x):
        torch.set_num_threads(2)
        torch.set_grad_enabled(self.training)
        torch.set_default_dtype(torch.float64)
        os.environ["MAD_KERNELS_BACKEND"] = "reference"
        return x
"""


class Drawing(Identity):
    """Drops and shifts by every global generator there is."""

    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        self.scale = nn.Parameter(torch.full((d_model,), 1 + 0.01 * random.random()))

    def forward(self, x):
        noise = random.random() + float(np.random.rand())  # noqa: NPY002
        return nn.functional.dropout(x * self.scale, 0.5, self.training) + 0.1 * noise * x


class Dropping(Drawing):
    def forward(self, x):
        return nn.functional.dropout(x * self.scale, 0.5, self.training)


class Switching(Identity):
    """Leaves the process's switches thrown."""

    def forward(self, x):
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("medium")
        torch.autograd.set_detect_anomaly(True, check_nan=False)
        torch.backends.mkldnn.enabled = False
        np.seterr(all="ignore")
        os.environ["MAD_KERNELS_BACKEND"] = "reference"
        os.environ.pop("HOME", None)
        os.chdir("/")
        if not self.training:
            torch.set_grad_enabled(False)
        return x


@pytest.fixture
def plugged(monkeypatch):
    """Let `identity` be another class."""

    def plug(cls):
        monkeypatch.setattr(plugins, "mixer", lambda name: cls)
        return tiny(mixers=["identity"])

    return plug


def made(run, folder, stops=()):
    folder = RunFolder(folder, run.fingerprint)
    folder.create(run)
    for stop in stops:
        count = iter(range(10_000))
        with pytest.raises(Interrupted):
            loop.train(run, folder, stop=lambda n=stop, c=count: next(c) >= n)
    result = loop.train(run, folder)
    return result.test, folder.load_model()


def test_a_run_has_the_same_bits_whatever_ran_before_it(tmp_path, plugged):
    run = plugged(Drawing)
    test, weights = made(run, tmp_path / "a")
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    again, others = made(run, tmp_path / "b")
    assert again == test
    assert all(torch.equal(weights[k], others[k]) for k in weights)
    shared, others = made(run, tmp_path / "b" / "..")  # other data folder, data made anew
    assert shared == test and all(torch.equal(weights[k], others[k]) for k in weights)


@pytest.mark.parametrize("stops", [(12,), (3, 0, 14)])
def test_a_stopped_run_goes_on_with_its_own_draws(tmp_path, plugged, stops):
    run = plugged(Drawing)
    test, weights = made(run, tmp_path / "whole")
    again, others = made(run, tmp_path / "parts", stops)
    assert again == test
    assert all(torch.equal(weights[k], others[k]) for k in weights)


def test_a_run_leaves_generators_and_switches_as_it_found_them(tmp_path, plugged):
    run = plugged(Switching)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    before = switches()
    with randomness.lent():  # what the test itself leaves is nobody's either
        torch.set_deterministic_debug_mode("error")
        inner = switches()
        made(run, tmp_path)
        found = switches()
        drawn = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    assert found == inner
    assert drawn == expected
    assert switches() == before


def switches():
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "matmul": torch.get_float32_matmul_precision(),
        "anomaly": torch.is_anomaly_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "numpy": np.geterr(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_a_layer_that_reaches_outside_itself_changes_nothing_of_its_neighbours(tmp_path, monkeypatch, workers):
    (tmp_path / "reaching.py").write_text(REACHING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    neighbour, reaching = tiny(), tiny(mixers=[{"name": "reaching:Reaching"}], train__steps=60)
    pool.execute([neighbour], Path("alone"), device="cpu", workers=0)
    pool.execute([neighbour, reaching], Path("runs"), device="cpu", workers=workers)  # the longer one first
    found = [RunFolder(Path(out), neighbour.fingerprint) for out in ("alone", "runs")]
    assert [folder.status() for folder in found] == ["finished"] * 2
    assert found[0].result().test == found[1].result().test
    assert all(torch.equal(w, found[1].load_model()[k]) for k, w in found[0].load_model().items())
    sys.modules.pop("reaching", None)


def test_scores_are_taken_in_evaluation_mode(tmp_path, plugged):
    run = plugged(Dropping)
    test, weights = made(run, tmp_path / "a")
    there = Loop(run, RunFolder(tmp_path / "b", "f" * 16), torch.device("cpu"))
    there.model.load_state_dict(weights)
    inputs, targets = there.splits["test"]
    with torch.no_grad():
        logits = there.model.eval()(inputs)
    scored = targets >= 0
    right = logits.argmax(-1)[scored] == targets[scored]
    assert test.token_accuracy == pytest.approx(right.double().mean().item(), abs=0)
    loss = nn.functional.cross_entropy(logits[scored], targets[scored].long())
    assert test.loss == pytest.approx(loss.item(), rel=1e-6)
