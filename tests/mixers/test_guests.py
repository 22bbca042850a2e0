"""A layer of somebody else's is trained by its name, and every wrong turn ends in a sentence."""

import copy
import dataclasses
import importlib
import pickle
import sys

import pytest
import torch
from torch import nn

from mad_efla import contract, plugins
from mad_efla.config import ConfigError, Document, validate
from mad_efla.mixers import Place
from mad_efla.plan import expand
from mad_efla.training import fits, model, step
from tests.cli.test_cli import call
from tests.tiny import PLAN, tiny

LAYERS = '''
import dataclasses
import torch
from torch import nn


class Block(nn.Module):
    """An ordinary module: a causal mean, a projection, dropout."""

    def __init__(self, dim, expand: int = 2, dropout=0.1, act=nn.GELU, **extra):
        super().__init__()
        self.inner, self.act = nn.Linear(dim, expand * dim), act()
        self.out, self.drop = nn.Linear(expand * dim, dim), nn.Dropout(dropout)

    def forward(self, x):
        n = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.drop(self.out(self.act(self.inner(x.cumsum(1) / n)))), None


class Needs(Block):
    def __init__(self, dim, heads, **extra):
        super().__init__(dim, **extra)


class Open(Block):
    def __init__(self, config):
        super().__init__(config.n_embd, config.expand)
        self.longest = config.block_size


@dataclasses.dataclass
class Settings:
    hidden_size: int = 512
    expand: int = 2
    max_length: int = 0


class Configured(Block):
    def __init__(self, config: Settings, layer_idx: int):
        super().__init__(config.hidden_size, config.expand)
        self.at = layer_idx, config.max_length


class Lazy(Block):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.inner = nn.LazyLinear(2 * d_model)


class Rotation(Block):
    """A complex parameter, a half that never decays, float64 of a kind."""

    def __init__(self, d_model):
        super().__init__(d_model)
        self.phase = nn.Parameter(torch.randn(d_model, 2, dtype=torch.complex64))
        self.gate = nn.Parameter(torch.ones(d_model, d_model))
        self.gate._no_weight_decay = True
        self.scale = nn.Parameter(torch.ones(d_model, dtype=torch.float64))

    def forward(self, x):
        y, _ = super().forward(x)
        return y * self.phase.prod(-1).real * self.scale + x @ self.gate


class Whole(Block):
    """A block of its own: norm, residual and all."""

    def __init__(self, d_model):
        super().__init__(d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x):
        return x + super().forward(self.norm(x))[0]


class MLP(nn.Module):
    def __init__(self, width_of_nothing=1, *, dim, expand=2):
        super().__init__()
        self.inner, self.out = nn.Linear(dim, expand * dim), nn.Linear(expand * dim, dim)

    def forward(self, x):
        return self.out(self.inner(x).relu())


class Narrow(Block):
    def forward(self, x):
        return super().forward(x)[0][..., 1:]


class Ahead(Block):
    def forward(self, x):
        return super().forward(x)[0] + x.flip(1)


class OnDevice(Block):
    def forward(self, x):
        raise RuntimeError("0 active drivers ([]). There should only be one.")


class Declares(Block):
    def state_size(self, seq_len):
        return 7


class Steps(nn.Module):
    """A running sum, with every ability."""

    def __init__(self, d_model):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return self.scale * x.cumsum(1)

    def initial_state(self, batch, device):
        return (torch.zeros(batch, len(self.scale), device=device),)

    def step(self, x, state):
        return self.scale * (x + state[0]), (x + state[0],)


class WithoutWidth(nn.Module):
    def __init__(self, size):
        super().__init__()

    def forward(self, x):
        return x


class WithoutForward(nn.Module):
    pass
'''


@pytest.fixture
def block(tmp_path, monkeypatch):
    """A file `block.py` in the current folder."""
    (tmp_path / "block.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield sys.modules.get("block") or importlib.import_module("block")
    del sys.modules["block"]
    plugins.mixer.cache_clear()


def guest(name, width=16, place=Place(), **fields):  # noqa: B008
    kind = plugins.mixer(name)
    config = validate(kind.Config, Document({"name": name, **fields}, {}, "plan.yaml:3"), "mixers[0]")
    return kind.placed(width, config, place)


def test_the_width_goes_where_a_constructor_takes_it_and_all_else_it_names_is_a_field(block):
    built = guest("block:Block", expand=3)
    assert built.layer.inner.weight.shape == (48, 16)
    assert built.config.model_dump() == {"name": "block:Block", "expand": 3, "dropout": 0.1}
    assert built(torch.randn(2, 5, 16)).shape == (2, 5, 16)


def test_a_configuration_class_is_built_from_the_fields_and_place_and_length_are_given(block):
    built = guest("block:Configured", place=Place(3, 4, 99), expand=1)
    assert built.layer.at == (3, 99)
    assert built.layer.inner.weight.shape == (16, 16)
    assert built.config.model_dump() == {"name": "block:Configured", "expand": 1}


def test_a_configuration_without_a_class_has_the_fields_as_attributes(block):
    built = guest("block:Open", place=Place(0, 1, 77), expand=3)
    assert built.layer.longest == 77
    with pytest.raises(ValueError, match="the configuration has no expand; give the field expand a value"):
        guest("block:Open")
    with pytest.raises(ValueError, match="expnd is not read by Open; did you mean 'expand'"):
        guest("block:Open", expand=3, expnd=2)


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("block:Block", {"expnd": 3}, r"plan.yaml:3: mixers\[0\].expnd: unknown key; did you mean 'expand'"),
        ("block:Block", {"dim": 8}, "dim=8 is the model's width; leave it out, and set model.width"),
        ("block:Block", {"expand": "two"}, r"mixers\[0\].expand=\"two\": input should be a valid integer"),
        ("block:Needs", {}, r"mixers\[0\].heads is missing; give it a value"),
        ("block:Blok", {}, "block has no 'Blok'; did you mean 'Block'"),
        ("blok:Block", {}, "No module named 'blok'; write it as package.module:Name"),
        ("block:WithoutWidth", {}, r"WithoutWidth\(size\) has no argument for the model's width"),
        ("block:WithoutForward", {}, "has to define forward"),
        ("block:LAYERS", {}, "block has no 'LAYERS'"),
        ("torch:relu", {}, "it must be a class derived from torch.nn.Module"),
        ("fla.layers:GatedDeltaNet", {}, "pip install flash-linear-attention"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(block, name, fields, why):
    with pytest.raises(ConfigError, match=why):
        guest(name, **fields)


def test_a_module_that_cannot_be_imported_says_where(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wrong_syntax.py").write_text("class Block:\n    def (self)\n")
    (tmp_path / "wants_driver.py").write_text("raise RuntimeError('no NVIDIA driver')\n")
    with pytest.raises(ConfigError, match=r"wrong_syntax.py:2: invalid syntax"):
        plugins.mixer("wrong_syntax:Block")
    with pytest.raises(ConfigError, match="importing wants_driver fails: it needs a CUDA device"):
        plugins.mixer("wants_driver:Block")


@pytest.mark.parametrize(("name", "state"), [("LSTM", 2 * 16), ("GRU", 16), ("RNN", 16)])
def test_recurrent_modules_of_torch_are_guests_of_a_known_state(name, state):
    built = guest(f"torch.nn:{name}")
    assert built.layer.batch_first
    assert built.state_size(1_000) == state
    assert guest(f"torch.nn:{name}", num_layers=2).state_size(9) == 2 * state
    assert not built.decodes
    _, found = contract.check(f"torch.nn:{name}")
    assert not [f for f in found if f.broken]


def test_abilities_of_a_layer_are_those_of_the_mixer(block):
    _, found = contract.check("block:Steps")
    assert not [f for f in found if f.broken]
    assert len(found) == len(contract.LAYER_PROMISES) + len(contract.DECODING_PROMISES)
    assert guest("block:Steps").state_size(9) == 16
    assert guest("block:Declares").state_size(9) == 7
    assert guest("block:Block").state_size(9) is None
    with pytest.raises(NotImplementedError, match="cannot go token by token"):
        guest("block:Block").step(torch.zeros(1, 16), ())


def test_a_guest_is_pickled_and_copied(block):
    built = guest("block:Block", expand=3).eval()
    x = torch.randn(2, 5, 16)
    for other in (pickle.loads(pickle.dumps(built)), copy.deepcopy(built)):
        assert torch.equal(other(x), built(x))
        assert other.config == built.config


@pytest.mark.parametrize("name", ["Block", "Lazy", "Rotation", "Configured"])
def test_a_sound_layer_is_checked_and_trains(block, name, tmp_path):
    from mad_efla.runs.folder import RunFolder
    from mad_efla.training.loop import train

    _, found = contract.check(f"block:{name}")
    assert not [f for f in found if f.broken]
    run = tiny(mixers=[f"block:{name}"], train__steps=10, optim__weight_decay=0.1)
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    folder.create(run)
    result = train(folder.run(), folder)
    assert result.status == "finished"
    assert result.state_size is None


def test_the_mark_of_a_parameter_that_never_decays_is_honoured(block):
    run = tiny(mixers=["block:Rotation"], optim__weight_decay=0.1)
    built = model.build(run)
    decayed, kept = step._adamw(built, run.optim, False).param_groups
    gate = next(p for n, p in built.named_parameters() if n.endswith("gate"))
    assert any(p is gate for p in kept["params"])
    assert not any(p is gate for p in decayed["params"])


def test_a_channel_mixer_by_its_name_stands_where_ours_do(block):
    run = tiny(model__channel={"name": "block:MLP", "expand": 3})
    assert run.model.channel == {"name": "block:MLP", "expand": 3, "width_of_nothing": 1}
    assert tiny(model__channel="block:MLP").model.channel["expand"] == 2
    assert "block:MLP" in run.code
    built = model.build(run)
    assert len(built.mixers) == 1
    assert built.stack.layers[1].module.layer.inner.out_features == 48
    assert built(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 8)
    for wrong, why in (
        ({"name": "block:MLP", "expnd": 3}, r"model.channel.expnd: unknown key; did you mean 'expand'"),
        ("swiglue", "must be a channel mixer or package.module:Name; did you mean 'swiglu'"),
        ("block:MPL", "model.channel: mixer 'block:MPL': block has no 'MPL'; did you mean 'MLP'"),
    ):
        with pytest.raises(ConfigError, match=why):
            tiny(model__channel=wrong)


def test_a_channel_mixer_that_looks_ahead_is_refused(block, files):
    found = expand.expand("task.yaml", "plan.yaml", ["model.channel='block:Ahead'"], "float32")
    with pytest.raises(ConfigError, match=r"layer block:Ahead.*changes with token"):
        fits.check(found)


def test_whole_blocks_stand_alone(block):
    run = tiny(mixers=["block:Whole"], model__blocks=True, model__channel="none", model__depth=2)
    built = model.build(run).eval()
    assert not built.stack.norms
    x = torch.zeros(2, 5, dtype=torch.long)
    first, second = built.mixers
    wanted = second(first(built.stack.embed(x)))
    assert torch.equal(built.stack(x), wanted)
    with pytest.raises(ConfigError, match="a block has its own; set channel to none"):
        tiny(mixers=["block:Whole"], model__blocks=True)


REFUSED = {
    "Narrow": "for an input (3, 21, ",
    "Ahead": "the output at token 0 changes with token",
    "OnDevice": "it needs a CUDA device (RuntimeError: 0 active drivers",
}


@pytest.mark.parametrize("name", REFUSED)
def test_check_dry_run_and_sweep_refuse_alike_and_before_the_first_run(block, files, name):
    mixers = ["--set", f"mixers=['block:{name}']"]
    said = [
        call("check", f"block:{name}", code=1).stdout,
        call("sweep", "task.yaml", "--plan", "plan.yaml", "--no-tracking", *mixers, "--dry-run", code=2).stderr,
        call("sweep", "task.yaml", "--plan", "plan.yaml", "--no-tracking", *mixers, code=2).stderr,
    ]
    for text in said:
        flat = " ".join(text.replace("│", " ").split())
        assert "Traceback" not in flat
        core = REFUSED[name].replace("21", "11") if "--" not in flat and "sweep" in flat else REFUSED[name]
        assert core.split(" (3")[0] in flat
    assert not (files / "runs").exists()


def test_a_layer_in_the_current_folder_stands_in_one_table_beside_ours_and_an_lstm(block, files):
    (files / "plan.yaml").write_text(PLAN.replace("{name: deltanet, heads: 2}", "'block:Block', 'torch.nn:LSTM'"))
    done = call("sweep", "task.yaml", "--plan", "plan.yaml", "--no-tracking", "--workers", "0", "--set", "seeds=[0]")
    for label in ("block:Block", "torch.nn:LSTM", "efla(heads=2)"):
        assert label in done.stdout
    assert "unknown" in done.stdout
    dry = call("sweep", "task.yaml", "--plan", "plan.yaml", "--dry-run", "--set", "match=state")
    assert "block:Block has an unknown number" in dry.stdout
    assert "torch.nn:LSTM has 32" in dry.stdout


def test_a_task_that_does_not_fit_is_refused_before_the_first_run(files, monkeypatch):
    (files / "odd.py").write_text(
        "import numpy as np\n"
        "from mad_efla.tasks import IGNORE\n"
        "from mad_efla.tasks.recall import Recall\n"
        "class Scoreless(Recall):\n"
        "    name: str\n"
        "    def sample(self, n, rng, split, world):\n"
        "        found = super().sample(n, rng, split, world)\n"
        "        return found._replace(targets=np.full_like(found.targets, IGNORE), next_tokens=None)\n"
        "class Single(Recall):\n"
        "    name: str\n"
        "    def sample(self, n, rng, split, world):\n"
        "        return super().sample(n, np.random.default_rng(0), split, world)\n"
    )
    monkeypatch.syspath_prepend(files)
    for name, why in (("Scoreless", "has no scored position"), ("Single", "too few distinct sequences")):
        (files / "task.yaml").write_text(f"task: {{name: 'odd:{name}', vocab_size: 8, seq_len: 12}}\n")
        with pytest.raises(ConfigError, match=why):
            fits.check(expand.expand("task.yaml", "plan.yaml", [], "float32"))
    del sys.modules["odd"]


def test_an_installed_layer_is_known_by_its_file_and_version(monkeypatch):
    monkeypatch.setattr(plugins, "_versions", lambda package: [f"{package}==1"])
    before = plugins.source_digest("torch.nn:LSTM")
    assert plugins.source_digest("torch.nn:LSTM") == before
    monkeypatch.setattr(plugins, "_versions", lambda package: [f"{package}==2"])
    assert plugins.source_digest("torch.nn:LSTM") != before


def test_fields_may_be_those_of_a_dataclass_with_a_factory(block):
    @dataclasses.dataclass
    class Config:
        d_model: int
        sizes: list = dataclasses.field(default_factory=lambda: [1])

    class Layer(nn.Linear):
        def __init__(self, config: Config):
            super().__init__(config.d_model, config.d_model * len(config.sizes))

    Layer.__init__.__annotations__["config"] = Config
    from mad_efla.mixers._guest import adopt

    kind = adopt("here:Layer", Layer)
    assert kind(8, kind.Config(name="here:Layer"), Place())(torch.zeros(1, 2, 8)).shape == (1, 2, 8)
