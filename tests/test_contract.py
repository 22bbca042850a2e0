"""A broken promise is found, by the check that is meant to find it, and said in words."""

import random
import re
from typing import ClassVar

import numpy as np
import pytest
import torch

from mad_efla import contract
from mad_efla.config import ConfigError
from mad_efla.contract import MixerUnderTest
from mad_efla.mixers import Mixer, MixerConfig
from mad_efla.tasks import IGNORE
from mad_efla.tasks.recall import Recall
from tests.cli.test_cli import call


class Decay(Mixer):
    """A mixer that keeps every promise."""

    class Config(MixerConfig):
        name: str = "tests.test_contract:Decay"
        start: float = 0.9

    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        self.logit = torch.nn.Parameter(torch.full((d_model,), config.start).logit())

    def forward(self, x):
        lags = torch.arange(x.shape[1])
        lags = (lags[:, None] - lags).clamp_min(0)
        weights = self.logit.sigmoid() ** lags[..., None] * torch.ones_like(lags).tril()[..., None]
        return torch.einsum("tsd,bsd->btd", weights.to(x.dtype), x)

    def initial_state(self, batch, device):
        return (torch.zeros(batch, self.d_model, device=device),)

    def step(self, x, state):
        y = self.logit.sigmoid() * state[0] + x
        return y, (y,)


class Widens(Decay):
    def forward(self, x):
        return super().forward(x.double())


class LooksAhead(Decay):
    def forward(self, x):
        return super().forward(x) + x.roll(-1, dims=1)


class SharesRows(Decay):
    def forward(self, x):
        return super().forward(x) + x.mean(dim=0)


class Idle(Decay):
    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        self.idle = torch.nn.Parameter(torch.zeros(1))


class StepsElsewhere(Decay):
    def step(self, x, state):
        y = 0.5 * state[0] + x
        return y, (y,)


class HidesState(Decay):
    def state_size(self, seq_len):
        return 1


class DrawsFreely(Decay):
    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        rng = np.random.default_rng()
        self.logit.data += torch.as_tensor(rng.normal(size=d_model), dtype=torch.float32)


class NeverSet(Decay):
    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        self.logit = torch.nn.Parameter(torch.empty(d_model))


class Peeks(Decay):
    """Looks ahead where no gradient passes."""

    def forward(self, x):
        return super().forward(x) * (1 + x.round().sum(1, keepdim=True).sign() * 0.1)


class Normed(Decay):
    """Sees the other rows while it trains."""

    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        self.norm = torch.nn.BatchNorm1d(d_model)

    def forward(self, x):
        return self.norm(super().forward(x).mT).mT


class AlwaysDrops(Decay):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.5)


class Counts(Decay):
    """Carries something from call to call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Loses(Decay):
    """Holds numbers that no state_dict has."""

    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        self.direction = torch.randn(d_model)

    def forward(self, x):
        return super().forward(x) * self.direction.to(x.dtype)


class Blind(Decay):
    def forward(self, x):
        return self.logit.expand_as(x) * 1.0


class Detaches(Decay):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Switches(Decay):
    def forward(self, x):
        torch.set_default_dtype(torch.float64)
        return super().forward(x)


class Seeds(Decay):
    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        torch.manual_seed(0)


class Unsized(Decay):
    def state_size(self, seq_len):
        raise RuntimeError("who knows")


class Rounds(Decay):
    def forward(self, x):
        rough = torch.is_autocast_enabled("cpu")
        return super().forward(x.mul(4).round() / 4 if rough else x)


MIXERS = {
    Widens: ("keeps_shape_and_dtype", "float32 became torch.float64"),
    LooksAhead: ("is_causal", "the output at token 0 changes with token 1"),
    SharesRows: ("rows_are_independent", "differs from the row alone"),
    Idle: ("gradients_are_finite", "idle gets no gradient"),
    StepsElsewhere: ("stepping_equals_forward", "`step` and `forward` differ"),
    HidesState: ("state_size_is_true", "says 1, `step` carries 32"),
    DrawsFreely: ("seeds_decide_weights", "logit differs"),
    NeverSet: ("seeds_decide_weights", "logit holds numbers that nobody set"),
    Peeks: ("is_causal", "outputs before token 65 change with what comes later"),
    Normed: ("rows_are_independent", "in training a row changes with the others"),
    AlwaysDrops: ("is_the_same_twice", "draw only while self.training"),
    Counts: ("is_the_same_twice", "carry nothing from call to call"),
    Loses: ("survives_saving", "register_buffer keeps it"),
    Blind: ("trains", "does not depend on its input"),
    Detaches: ("trains", "its output carries no gradient"),
    Seeds: ("leaves_the_process_alone", "it seeds torch's generator"),
    Unsized: ("has_a_size", "who knows"),
    Rounds: ("runs_under_autocast", "it is off by"),
}


EVERY = (*contract.LAYER_PROMISES, *contract.MIXER_PROMISES, *contract.DECODING_PROMISES)


def test_a_sound_mixer_keeps_every_promise():
    kind, found = contract.check("tests.test_contract:Decay")
    assert kind == "mixer"
    assert len(found) == len(EVERY)
    assert not [f for f in found if f.broken]


@pytest.mark.parametrize("broken", MIXERS)
def test_a_broken_mixer_is_found_by_the_check_meant_for_it(broken):
    promise, why = MIXERS[broken]
    (promise,) = (p for p in EVERY if p.__name__ == promise)
    found = contract.hold(promise, MixerUnderTest(broken, Decay.Config()))
    assert re.search(why, found.broken), found
    assert torch.get_default_dtype() == torch.float32


def test_every_mixer_promise_has_a_mixer_that_breaks_it():
    assert {name for name, _ in MIXERS.values()} == {p.__name__ for p in EVERY}


class Silent(Decay):
    """Starts as zero, as a residual branch may, and draws from other generators than torch's."""

    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        self.out = torch.nn.Parameter(torch.zeros(d_model) + 0 * random.random())

    def forward(self, x):
        return super().forward(x) * self.out

    def step(self, x, state):
        y, state = super().step(x, state)
        return y * self.out, state


def test_a_projection_that_starts_at_zero_passes_with_a_word():
    _, found = contract.check("tests.test_contract:Silent")
    assert "it starts as zero: looked at with small weights for out" in [f.word for f in found]
    assert any("it draws from Python's generator" in f.word for f in found)
    assert not [f for f in found if f.broken]


def test_a_layer_that_throws_a_switch_is_named_and_not_refused():
    (promise,) = (p for p in EVERY if p.__name__ == "leaves_the_process_alone")
    found = contract.hold(promise, MixerUnderTest(Switches, Decay.Config()))
    assert not found.broken
    assert re.search(
        r"it leaves the default type .* at torch.float64, which was torch.float32; a run gives it back", found.word
    )
    assert torch.get_default_dtype() == torch.float32


class OnlyForward(Mixer):
    """A mixer without any further ability."""

    def forward(self, x):
        return x.cumsum(1)


def test_a_mixer_needs_only_forward():
    _, found = contract.check("tests.test_contract:OnlyForward")
    assert not [f for f in found if f.broken]
    assert len(found) == len(EVERY) - len(contract.DECODING_PROMISES)
    assert any("state unknown" in f.word for f in found)


class WrongSolver(Recall):
    def solve(self, inputs, world):
        answers = super().solve(inputs, world)
        return np.where(answers >= 0, answers + 1, answers).astype(answers.dtype)


class Clairvoyant(Recall):
    def solve(self, inputs, world):
        answers = super().solve(inputs, world)
        answers[0] = inputs[-1]
        return answers


class TooLong(Recall):
    @property
    def input_length(self):
        return super().input_length + 1


class Forgetful(Recall):
    calls: ClassVar[list[int]] = []

    def sample(self, n, rng, split, world):
        self.calls.append(n)
        return super().sample(n, np.random.default_rng(len(self.calls)), split, world)


class Repeats(Recall):
    def sample(self, n, rng, split, world):
        return super().sample(n, np.random.default_rng(0), split, world)


class Nameless(Recall):
    def describe(self, inputs):
        return []


class Scoreless(Recall):
    def sample(self, n, rng, split, world):
        found = super().sample(n, rng, split, world)
        return found._replace(targets=np.full_like(found.targets, IGNORE), next_tokens=None)


class Fractions(Recall):
    def sample(self, n, rng, split, world):
        found = super().sample(n, rng, split, world)
        return found._replace(targets=found.targets.astype(float))


class TooFewIds(Recall):
    @property
    def vocabulary(self):
        return 3


class OneId(Recall):
    @property
    def vocabulary(self):
        return 1


TASKS = {
    WrongSolver: ("solver_answers_everything", "answered wrongly"),
    Clairvoyant: ("solver_sees_only_the_prefix", "answers change"),
    TooLong: ("shapes_types_and_ids_are_as_stated", r"inputs are \(30, 127\), not \(30, 128\)"),
    Scoreless: ("shapes_types_and_ids_are_as_stated", "a sequence has no scored position"),
    Fractions: ("shapes_types_and_ids_are_as_stated", "targets float64, not .*: ids are whole numbers"),
    TooFewIds: ("shapes_types_and_ids_are_as_stated", "the vocabulary has 3"),
    OneId: ("shapes_types_and_ids_are_as_stated", "vocabulary=1 leaves nothing to choose from"),
    Forgetful: ("seeds_decide_bytes", "different data twice"),
    Repeats: ("splits_are_disjoint", "too few distinct sequences"),
    Nameless: ("every_token_has_a_role", "0 roles for 127 tokens"),
}


@pytest.mark.parametrize("broken", TASKS)
def test_a_broken_task_is_found_by_the_check_meant_for_it(broken):
    promise, why = TASKS[broken]
    assert re.search(why, contract.hold(getattr(contract, promise), broken()).broken)


def test_every_task_promise_has_a_task_that_breaks_it():
    assert {name for name, _ in TASKS.values()} == {p.__name__ for p in contract.TASK_PROMISES}


def test_the_command_says_what_fails_and_its_status_is_1():
    done = call("check", "tests.test_contract:HidesState", code=1)
    (line,) = [row for row in done.stdout.splitlines() if "FAILS" in row]
    assert "says 1, `step` carries 32" in " ".join(done.stdout.split())
    assert "state_size" in line
    assert done.stdout.count("holds") == len(EVERY) - 1


def test_the_command_takes_fields_and_built_in_names():
    assert "FAILS" not in call("check", "recall", "--set", "vocab_size=32").stdout
    done = call("check", "efla", "--set", "heads=5", code=2)
    assert "heads=5 must divide model.width=32" in " ".join(done.stderr.split())
    done = call("check", "eflaa", code=2)
    assert "did you mean 'efla'" in " ".join(done.stderr.split())


def test_what_is_neither_is_refused():
    with pytest.raises(ConfigError, match=r"the class Path; it must be a class derived from Task or torch.nn.Module"):
        contract.check("pathlib:Path")


def test_a_crash_is_a_finding_with_its_reason():
    class Unfinished(Decay):
        def step(self, x, state):
            raise NotImplementedError("no step yet")

    found = contract.hold(contract.stepping_equals_forward, MixerUnderTest(Unfinished, Decay.Config()))
    assert found.broken == "NotImplementedError: no step yet"
