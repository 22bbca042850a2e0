"""Other projects' layers by their names: each passes the check, trains, and its memory is measured."""

import pytest
import torch

from mad_efla import contract, plugins
from mad_efla.config import ConfigError
from mad_efla.plan import expand
from mad_efla.runs.folder import RunFolder
from mad_efla.tasks import IGNORE
from mad_efla.training import data, fits, model
from mad_efla.training.loop import train
from tests.peer.beside import peer, unwrap
from tests.peer.test_transformers import CONVOLUTIONS, DELTA_RULES, bare_unit_length
from tests.tiny import tiny

pytestmark = pytest.mark.peer

WIDTH = 32
MODELS = "transformers.models"
DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
KIMI = f"{MODELS}.kimi_linear.modeling_kimi_linear"
QWEN = f"{MODELS}.qwen3_next.modeling_qwen3_next:Qwen3NextGatedDeltaNet"
GUESTS = {
    QWEN: (DELTA, 4 * 8 * 8 + 3 * 32 * 4, (*DELTA_RULES, *CONVOLUTIONS)),
    f"{MODELS}.olmo_hybrid.modeling_olmo_hybrid:OlmoHybridGatedDeltaNet": (
        DELTA,
        4 * 8 * 8 + 3 * 32 * 4,
        (*DELTA_RULES, *CONVOLUTIONS),
    ),
    "tests.peer.kimi:Kimi": (
        {"linear_num_heads": 4, "linear_head_dim": 8},
        4 * 8 * 8 + 3 * 32 * 4,
        ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", *CONVOLUTIONS),
    ),
    f"{MODELS}.mamba2.modeling_mamba2:Mamba2Mixer": (
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
        8 * 8 * 8 + (64 + 2 * 8) * 4,
        ("mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan", *CONVOLUTIONS),
    ),
    "torch.nn:LSTM": ({}, 2 * WIDTH, ()),
    "torch.nn:GRU": ({}, WIDTH, ()),
    "tests.peer.layers:BaseConv": ({}, None, ()),
    "tests.peer.layers:Attention": ({"num_heads": 4, "dropout": 0.1}, None, ()),
}


def in_torch(monkeypatch, name, operators):
    """Take a layer's torch forms, which run anywhere, where a faster package's are installed."""
    if operators:
        module = KIMI if name == "tests.peer.kimi:Kimi" else name.partition(":")[0]
        unwrap(monkeypatch, peer(module), *operators)


@pytest.mark.parametrize("name", GUESTS)
def test_a_layer_of_another_project_passes_the_check_and_trains(name, monkeypatch, tmp_path):
    fields, state, operators = GUESTS[name]
    in_torch(monkeypatch, name, operators)
    _, found = contract.check(name, [f"{k}={v}" for k, v in fields.items()], WIDTH)
    assert not [f for f in found if f.broken], found
    assert len(found) == len(contract.LAYER_PROMISES)
    run = tiny(mixers=[{"name": name, **fields}], model__width=WIDTH, train__steps=10)
    assert model.mixer_size(run.mixers[0], WIDTH, 1_000).state == state
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    folder.create(run)
    result = train(folder.run(), folder)
    assert result.status == "finished"
    assert result.state_size == state


def test_equal_weights_in_their_layer_and_ours_give_equal_accuracy(monkeypatch, tmp_path):
    in_torch(monkeypatch, QWEN, (*DELTA_RULES, *CONVOLUTIONS))
    module = peer(QWEN.partition(":")[0])
    bare_unit_length(monkeypatch, module)
    own = {"name": "gated_deltanet", "heads": 4, "output_gate": True}
    run = tiny(mixers=[own], model__width=WIDTH, train__steps=60)
    folder = RunFolder(tmp_path / "runs", run.fingerprint)
    folder.create(run)
    train(folder.run(), folder)
    ours = model.build(run)
    ours.load_state_dict(folder.load_model())
    mixer = ours.mixers[0]
    mixer.norm.eps = 1e-6 * mixer.Dk  # they multiply q by Dk^-1/2
    torch.nn.init.zeros_(mixer.beta.bias)  # which theirs has none of
    theirs = model.build(tiny(mixers=[{"name": QWEN, **DELTA}], model__width=WIDTH))
    weights = {k: v for k, v in ours.state_dict().items() if not k.startswith("stack.layers.0.")}
    weights |= {f"stack.layers.0.layer.{k}": v for k, v in translated(mixer).items()}
    theirs.load_state_dict(weights)
    examples = data.make(run.task, 0, run.data).test
    inputs, targets = torch.from_numpy(examples.inputs), torch.from_numpy(examples.targets).long()
    with torch.no_grad():
        found, expected = theirs.eval()(inputs), ours.eval()(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    scored = targets != IGNORE
    right = [(logits.argmax(-1) == targets)[scored].float().mean() for logits in (found, expected)]
    assert right[0] == right[1] > 0.2


def translated(mixer):
    """Give Qwen3-Next's weights from ours."""
    w = dict(mixer.state_dict())

    def by_head(*weights):
        return torch.cat([x.unflatten(0, (4, -1)) for x in weights], dim=1).flatten(0, 1)

    return {
        "in_proj_qkvz.weight": by_head(*w["qkv.weight"].split(mixer.widths), w["gate.weight"]),
        "in_proj_ba.weight": by_head(w["beta.weight"], w["decay.weight"]),
        "conv1d.weight": w["conv.weight"][:, None],
        "A_log": w["a_log"],
        "dt_bias": w["dt_bias"],
        "norm.weight": w["norm.weight"],
        "out_proj.weight": w["out.weight"],
    }


def test_their_kernels_are_refused_on_a_cpu_in_a_sentence(files):
    peer("fla")  # with it, transformers takes its kernels for its torch forms
    mixers = f"mixers=[{{name: '{QWEN}', linear_num_key_heads: 4, linear_num_value_heads: 4}}]"
    with pytest.raises(ConfigError, match=r"it needs a CUDA device \(RuntimeError: 0 active drivers"):
        fits.check(expand.expand("task.yaml", "plan.yaml", [mixers], "float32"))


def test_a_layer_whose_weights_its_model_sets_is_refused_with_the_cure(monkeypatch):
    unwrap(monkeypatch, peer(KIMI), *GUESTS["tests.peer.kimi:Kimi"][2])
    fields = ["linear_num_heads=4", "linear_head_dim=8"]
    _, found = contract.check(f"{KIMI}:KimiLinearDeltaAttention", fields, WIDTH)
    assert len(found) == 1
    assert "dt_bias holds numbers that nobody set" in found[0].broken


def test_a_field_that_their_configuration_does_not_know_is_refused():
    plugins.mixer(QWEN)
    with pytest.raises(ConfigError, match="did you mean 'linear_num_key_heads'"):
        tiny(mixers=[{"name": QWEN, "linear_num_key_head": 4}])
