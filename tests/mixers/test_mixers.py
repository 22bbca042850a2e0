"""One battery that every mixer passes, found by discovery."""

import pytest

import mad_efla.mixers
from mad_efla import contract, plugins
from mad_efla.training import model
from tests.cli.test_cli import call
from tests.mixer import L, subject

NAMES = plugins.names(mad_efla.mixers)

# Options worth the whole battery beside the defaults.
VARIANTS = [(name, {}) for name in NAMES] + [
    ("efla", {"conv": 0, "output_norm": False}),
    ("efla", {"output_gate": True, "key_dim": 6, "value_dim": 10, "heads": 3}),
    ("deltanet", {"beta": "2sigmoid"}),
    ("delta", {"keys": "l2", "step": "exact", "beta": "softplus"}),
    ("delta", {"keys": "l2", "step": "exact", "decay": "joint"}),
    ("delta", {"keys": "raw", "step": "kaczmarz", "decay": "separate", "conv": 1}),
    ("delta", {"keys": "raw", "step": "exact", "householders": 2, "decay": "joint"}),
    ("delta", {"keys": "raw", "step": "exact", "reflect": True, "decay": "channel"}),
    ("deltaproduct", {"householders": 3, "decay": "separate", "key_dim": 6, "value_dim": 10}),
    ("gated_deltanet", {"conv": 0, "output_gate": True}),
    ("kda", {"output_gate": "low_rank", "key_dim": 6, "value_dim": 10, "heads": 3}),
    ("kda", {"keys": "raw", "step": "exact", "conv": 0}),
    ("comba", {"conv": 0, "output_gate": True}),
    ("comba", {"key_dim": 6, "value_dim": 10, "heads": 3, "reflect": True}),
    ("pgdn", {"key_dim": 6, "value_dim": 10, "heads": 3, "beta": "2sigmoid"}),
    ("pkda", {"conv": 0, "output_gate": "low_rank"}),
    ("gdn2", {"output_gate": "low_rank", "key_dim": 6, "value_dim": 10, "heads": 3}),
    ("gated_efla", {"conv": 0, "beta": "softplus"}),
    ("mamba2", {"conv": 0, "output_norm": False}),
    ("mamba2", {"expand": 2, "state_dim": 4}),
    ("plain_delta", {"heads": 4, "keys": "l2", "decay": "separate"}),
    ("attention", {"conv": 4, "output_norm": True}),
    ("attention", {"rotary": False}),
    ("attention", {"window": 1}),
    ("attention", {"window": 5, "conv": 4}),
    ("attention", {"window": L, "rotary": False}),
    ("linear_attention", {"normalizer": True, "output_norm": False, "conv": 0}),
    ("linear_attention", {"key_dim": 6, "value_dim": 10, "heads": 3}),
    ("mamba", {"expand": 2, "state_dim": 4, "dt_rank": 3}),
    ("mamba", {"conv": 0}),
    ("gla", {"conv": 0, "output_norm": False}),
    ("gla", {"key_dim": 6, "value_dim": 10, "heads": 3}),
    ("rwkv7", {"conv": 0}),
    ("retnet", {"conv": 0, "output_norm": False}),
    ("retnet", {"key_dim": 6, "value_dim": 10, "heads": 3, "output_gate": False}),
    ("mlstm", {"conv": 0, "soft_cap": 5.0}),
    ("mlstm", {"key_dim": 6, "value_dim": 10, "heads": 3, "output_gate": False}),
    ("mesa", {"conv": 0, "decay": "none"}),
    ("mesa", {"key_dim": 6, "value_dim": 10, "heads": 3, "output_gate": True}),
    ("mamba3", {"conv": 4, "expand": 2}),
    ("mamba3", {"state_dim": 6, "rotary": 1.0, "heads": 4}),
    ("hyena", {"conv": 0, "scale": 8}),
    ("hyena", {"bands": 1, "filter_layers": 1, "frequency": 10.0}),
]


@pytest.mark.parametrize(("name", "fields"), VARIANTS)
@pytest.mark.parametrize("promise", contract.MIXER_PROMISES, ids=lambda p: p.__name__)
def test_every_mixer_keeps_every_promise(promise, name, fields):
    promise(subject(name, fields))


# Mixers whose state grows with the sequence, or that have none.
NOT_FIXED = {"attention", "hyena", "identity"}
ONE_HEAD = {"plain_delta", "plain_efla", "plain_deltanet"}  # as published


# What stands beside a memory of 2,048 numbers: the diagonal of the keys' second moment, a
# normaliser, the token before.
BESIDE = {"pgdn": 128, "pkda": 128, "mlstm": 128, "mamba3": 16 + 128}


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_FIXED - ONE_HEAD))
def test_default_states_of_fixed_state_mixers_are_equal(name):
    fields = {"conv": 0} if "conv" in plugins.mixer(name).Config.model_fields else {}
    assert subject(name, fields, 128).build().state_size(128) == 2048 + BESIDE.get(name, 0)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("efla", {"heads": 5}, "heads=5 must divide"),
        ("mamba2", {"heads": 5}, "heads=5 must divide"),
        ("attention", {"heads": 5}, "heads=5 must divide"),
        ("attention", {"heads": 32}, "even head width"),
        ("linear_attention", {"heads": 5}, "heads=5 must divide"),
        ("delta", {"step": "rk2", "decay": "joint"}, "decay=joint is one exact flow, not step=rk2"),
        ("mamba", {"dt_min": 0.2}, "dt_min=0.2 must not be above dt_max=0.1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        subject(name, fields).build()


# Width 128, length 128, by hand: weights of two axes, other parameters, state, window, mixing.
D2 = 128 * 128
COSTS = {
    "attention": (4 * D2, 0, 2 * 128 * 128, 0, 4 * 128 * 129 // 2),
    "efla": (4 * D2 + 8 * 128 + 4 * 384, 8 + 16, 2048, 3 * 384, 6 * 2048),
    "deltaproduct": (6 * D2 + 16 * 128 + 4 * 640, 16 + 16, 2048, 3 * 640, 10 * 2048),
    "gated_deltanet": (4 * D2 + 2 * 8 * 128 + 4 * 384, 8 + 16 + 16, 2048, 3 * 384, 7 * 2048),
    "gla": (5 * D2 + 2 * 16 * 128 + 4 * 384, 128 + 16, 2048, 3 * 384, 5 * 2048),
    "identity": (0, 0, 0, 0, 0),
    "linear_attention": (4 * D2 + 4 * 384, 16, 2048, 3 * 384, 4 * 2048),
    "mamba": (3 * D2 + 40 * 128 + 8 * 128 + 4 * 128, 128 + 2048 + 128 + 128, 2048, 3 * 128, 5 * 2048),
    "mamba2": (128 * 296 + D2 + 4 * 160, 160 + 128 + 3 * 8, 2048, 3 * 160, 5 * 2048),
    "rwkv7": (4 * D2 + 2 * 128 * (32 + 32 + 64), 128 * (2 + 6 + 3 + 2), 2048, 128, 9 * 2048),
}
LOW_RANK = 2 * 16 * 128
COSTS["kda"] = (4 * D2 + 8 * 128 + LOW_RANK + 4 * 384, 8 + 16 + 8 + 128, 2048, 3 * 384, 7 * 2048)
COSTS["gdn2"] = (6 * D2 + LOW_RANK + 4 * 384, 16 + 8 + 128, 2048, 3 * 384, 7 * 2048)
COSTS["mamba3"] = (128 * (288 + 28) + D2, 2 * 16 + 2 * 128 + 16, 2048 + 16 + 128, 0, 5 * 2048)
COSTS["retnet"] = (5 * D2 + 4 * 384, 16, 2048, 3 * 384, 5 * 2048)
COSTS["mlstm"] = (5 * D2 + 2 * 8 * 128 + 4 * 384, 16 + 16, 2048 + 128, 3 * 384, 5 * (2048 + 128))
COSTS["mesa"] = (
    4 * D2 + 2 * 16 * 128 + 4 * 384,
    16 + 32 + 128 + 8,
    2048,
    3 * 384,
    3 * 2048 + 2 * 1024 + 16 * (8**3 // 3 + 2 * 64),
)
COSTS["comba"] = (4 * D2 + 16 * 128 + 4 * 384, 8 + 16 + 16 + 16, 2048, 3 * 384, 7 * 2048)
MOMENT = 2 * 8 * 128  # of preconditioned rules: two maps to 8 heads
COSTS["pgdn"] = (4 * D2 + 16 * 128 + MOMENT + 4 * 384, 64, 2048 + 128, 3 * 384, 7 * 2048)
COSTS["pkda"] = (4 * D2 + 8 * 128 + LOW_RANK + MOMENT + 4 * 384, 8 + 16 + 8 + 128 + 24, 2048 + 128, 3 * 384, 7 * 2048)
COSTS |= dict.fromkeys(("delta", "deltanet", "longhorn"), COSTS["efla"])
COSTS |= dict.fromkeys(ONE_HEAD, (3 * D2 + 128, 1, D2, 0, 6 * D2))
COSTS["gated_efla"] = COSTS["gated_deltanet"]
# Hyena's filter (17 x 64, twice 64 x 64, 64 x 128; sines and biases) is made once for a batch.
FILTER = 17 * 64 + 2 * 64 * 64 + 64 * 128


@pytest.mark.parametrize("name", NAMES)
def test_what_a_layer_costs_is_what_a_hand_computes(name):
    found = model.mixer_size(plugins.mixer(name).Config(name=name), 128, 128)
    if name == "hyena":
        used, bare = 4 * D2 + 3 * 384, 6 * 64 + 384 + 128
        transforms = 2 * (5 * 128 * 8) + 6 * 129  # 2.5 n log2 n at n = 256, twice; the product
        expected = (used + FILTER + bare, 128 * 128, 2 * 384, 2 * used + transforms)
    else:
        used, other, state, window, mixing = COSTS[name]
        expected = (used + other, state, window, 2 * used + mixing)
    assert found == expected


def test_costs_follow_the_sequence_where_the_state_does():
    size = {L: model.mixer_size(plugins.mixer("attention").Config(window=16), 64, L) for L in (8, 512)}
    assert (size[8].state, size[512].state) == (2 * 64 * 8, 2 * 64 * 15)
    attended = (16 * 17 // 2 + 496 * 16) / 512  # by the mean token
    assert size[512].flops == 2 * 4 * 64 * 64 + int(4 * 64 * attended)


def test_the_table_of_costs_is_printed_at_a_width_and_a_length():
    text = call("list", "mixers", "--at", "width=64", "--at", "seq_len=32").stdout
    row = next(line for line in text.splitlines() if "attention" in line)
    numbers = row.replace(",", "").split()[1:]
    size = model.mixer_size(plugins.mixer("attention").Config(), 64, 32)
    bytes_ = 4 * (size.state + size.window)
    assert list(map(int, numbers)) == [size.parameters, size.state, size.window, bytes_, size.flops]
    for at, message in (("depth=2", "unknown"), ("width=0", "at least 1"), ("width", "FIELD=VALUE")):
        assert message in call("list", "mixers", "--at", at, code=2).stderr
    assert "is for mixers" in call("list", "tasks", "--at", "width=2", code=2).stderr
