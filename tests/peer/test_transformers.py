"""Layers of transformers on our weights, and its torch forms of operators on our tensors."""

import pytest
import torch
from torch.nn.functional import normalize

import mad_kernels as mk
from tests.mixer import D
from tests.peer.beside import assert_same, assert_same_layer, in_float64, mixer, normal, peer, rows, unwrap

pytestmark = pytest.mark.peer

CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")
DELTA_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def build(layer, config):
    with in_float64():
        return layer(config, layer_idx=0)


@pytest.mark.parametrize("fields", [{}, {"expand": 2, "state_dim": 4, "dt_rank": 3, "conv": 3}])
def test_mamba(fields, monkeypatch):
    module = peer("transformers.models.mamba.modeling_mamba")
    unwrap(monkeypatch, module, "mamba_inner_fn", "mamba_selective_scan", "causal_conv1d_fn")
    ours = mixer("mamba", **fields)
    config = peer("transformers").MambaConfig(
        hidden_size=D,
        num_hidden_layers=1,
        expand=ours.config.expand,
        state_size=ours.config.state_dim,
        time_step_rank=ours.dt.in_features,
        conv_kernel=ours.config.conv,
    )

    def translate(w):
        return {
            "in_proj.weight": w["inp.weight"],
            "conv1d.weight": w["conv.weight"][:, None],
            "conv1d.bias": w["conv.bias"],
            "x_proj.weight": w["select.weight"],
            "dt_proj.weight": w["dt.weight"],
            "dt_proj.bias": w["dt.bias"],
            "A_log": w["a_log"].view(ours.inner, -1),
            "D": w["skip"],
            "out_proj.weight": w["out.weight"],
        }

    assert_same_layer(ours, build(module.MambaMixer, config), translate, rows())


@pytest.mark.parametrize("fields", [{}, {"expand": 2, "state_dim": 4, "heads": 4, "conv": 3}])
def test_mamba2(fields, monkeypatch):
    module = peer("transformers.models.mamba2.modeling_mamba2")
    unwrap(monkeypatch, module, "mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan")
    unwrap(monkeypatch, module, *CONVOLUTIONS)
    ours = mixer("mamba2", **fields)
    config = peer("transformers").Mamba2Config(
        hidden_size=D,
        num_hidden_layers=1,
        expand=ours.config.expand,
        state_size=ours.config.state_dim,
        num_heads=ours.config.heads,
        head_dim=ours.inner // ours.config.heads,
        n_groups=1,
        conv_kernel=ours.config.conv,
        chunk_size=16,
        layer_norm_epsilon=ours.norm.eps,
    )

    def translate(w):
        return {
            "in_proj.weight": w["inp.weight"],
            "conv1d.weight": w["conv.weight"][:, None],
            "conv1d.bias": w["conv.bias"],
            "A_log": w["a_log"],
            "D": w["d"],
            "dt_bias": w["dt_bias"],
            "norm.weight": w["norm.weight"],
            "out_proj.weight": w["out.weight"],
        }

    assert_same_layer(ours, build(module.Mamba2Mixer, config), translate, rows())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_state_space_of_grouped_heads(groups):
    scan = peer("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan.__wrapped__
    B, L, H, P, N = 2, 37, 4, 6, 5
    tensors = {
        "x": normal(B, L, H, P, seed=1),
        "dt": normal(B, L, H, seed=2).exp(),
        "a": -normal(H, seed=3).exp(),
        "b": normal(B, L, groups, N, seed=4),
        "c": normal(B, L, groups, N, seed=5),
        "state": normal(B, H, N, P, seed=6),
    }

    def ours(x, dt, a, b, c, state):
        return mk.ssd(x, dt, a, b, c, initial_state=state, output_final_state=True)

    def theirs(x, dt, a, b, c, state):
        state, options = state.mT, {"chunk_size": 16, "return_final_states": True}
        y, final = scan(x, dt, a, b, c, initial_states=state, **options)
        return y, final.mT

    assert_same(ours, theirs, tensors)


def bare_unit_length(monkeypatch, module):
    """Take out what the peer adds to the square of a length, 1e-6; ours adds nothing."""
    l2norm = module.l2norm
    monkeypatch.setattr(module, "l2norm", lambda x, dim, eps: l2norm(x, dim, 0.0))


def gated_deltanet(eps, beta="sigmoid"):
    """Ours as the peers have it: a gate, and no bias on beta.

    They multiply q by Dk^-1/2, which their output norm undoes all but its eps.
    """
    ours = mixer("gated_deltanet", heads=4, key_dim=6, value_dim=10, output_gate=True, beta=beta)
    ours.norm.eps = eps * ours.Dk
    torch.nn.init.zeros_(ours.beta.bias)
    return ours


SIZES = {
    "hidden_size": D,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
}


@pytest.mark.parametrize("beta", ["sigmoid", "2sigmoid"])
def test_gated_deltanet_of_olmo_hybrid(beta, monkeypatch):
    module = peer("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    unwrap(monkeypatch, module, *DELTA_RULES, *CONVOLUTIONS)
    bare_unit_length(monkeypatch, module)
    config = peer("transformers").OlmoHybridConfig(**SIZES, linear_allow_neg_eigval=beta == "2sigmoid")
    layer = build(module.OlmoHybridGatedDeltaNet, config)
    ours = gated_deltanet(layer.o_norm.variance_epsilon, beta)

    def translate(w):
        q, k, v = w["qkv.weight"].split(ours.widths)
        return {
            "q_proj.weight": q,
            "k_proj.weight": k,
            "v_proj.weight": v,
            "a_proj.weight": w["decay.weight"],
            "b_proj.weight": w["beta.weight"],
            "g_proj.weight": w["gate.weight"],
            "conv1d.weight": w["conv.weight"][:, None],
            "A_log": w["a_log"],
            "dt_bias": w["dt_bias"],
            "o_norm.weight": w["norm.weight"],
            "o_proj.weight": w["out.weight"],
        }

    assert_same_layer(ours, layer, translate, rows(), fixed=["beta.bias"])


def test_gated_deltanet_of_qwen3_next(monkeypatch):
    module = peer("transformers.models.qwen3_next.modeling_qwen3_next")
    unwrap(monkeypatch, module, *DELTA_RULES, *CONVOLUTIONS)
    bare_unit_length(monkeypatch, module)
    config = peer("transformers").Qwen3NextConfig(**SIZES, rms_norm_eps=1e-5)
    layer = build(module.Qwen3NextGatedDeltaNet, config)
    ours = gated_deltanet(1e-5)

    def by_head(*weights):
        return torch.cat([w.unflatten(0, (4, -1)) for w in weights], dim=1).flatten(0, 1)

    def translate(w):
        return {
            "in_proj_qkvz.weight": by_head(*w["qkv.weight"].split(ours.widths), w["gate.weight"]),
            "in_proj_ba.weight": by_head(w["beta.weight"], w["decay.weight"]),
            "conv1d.weight": w["conv.weight"][:, None],
            "A_log": w["a_log"],
            "dt_bias": w["dt_bias"],
            "norm.weight": w["norm.weight"],
            "out_proj.weight": w["out.weight"],
        }

    assert_same_layer(ours, layer, translate, rows(), fixed=["beta.bias"])


def test_kimi_delta_attention(monkeypatch):
    module = peer("transformers.models.kimi_linear.modeling_kimi_linear")
    names = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", *CONVOLUTIONS)
    unwrap(monkeypatch, module, *names)
    bare_unit_length(monkeypatch, module)
    config = peer("transformers").KimiLinearConfig(
        hidden_size=D,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=4,
        linear_head_dim=6,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
    )
    layer = build(module.KimiLinearDeltaAttention, config)
    ours = mixer("kda", heads=4, key_dim=6, value_dim=6, output_gate="low_rank")
    ours.norm.eps = 1e-5 * ours.Dk  # they multiply q by Dk^-1/2
    torch.nn.init.zeros_(ours.beta.bias)

    def translate(w):
        q, k, v = w["qkv.weight"].split(ours.widths)
        return {
            "q_proj.weight": q,
            "k_proj.weight": k,
            "v_proj.weight": v,
            "conv1d.weight": w["conv.weight"][:, None],
            "forget_gate.A_log": w["a_log"].view_as(layer.forget_gate.A_log),
            "forget_gate.dt_bias": w["dt_bias"],
            "forget_gate.f_a_proj.weight": w["decay.0.weight"],
            "forget_gate.f_b_proj.weight": w["decay.1.weight"],
            "b_proj.weight": w["beta.weight"],
            "g_a_proj.weight": w["gate.0.weight"],
            "g_b_proj.weight": w["gate.1.weight"],
            "o_norm.weight": w["norm.weight"],
            "o_proj.weight": w["out.weight"],
        }

    assert_same_layer(ours, layer, translate, rows(), fixed=["beta.bias"])


def test_mlstm_of_xlstm():
    module = peer("transformers.models.xlstm.modeling_xlstm")
    config = peer("transformers").xLSTMConfig(hidden_size=D, num_heads=4, num_hidden_layers=1, eps=0.0, chunk_size=16)
    layer = build(lambda config, layer_idx: module.xLSTMLayer(config), config)
    ours = mixer("mlstm", heads=4, key_dim=4, value_dim=8, conv=0)

    def translate(w):
        q, k, v = w["qkv.weight"].split(ours.widths)
        return {
            "q.weight": q,
            "k.weight": k,
            "v.weight": v,
            "ogate_preact.weight": w["gate.weight"],
            "igate_preact.weight": w["input.weight"],
            "igate_preact.bias": w["input.bias"],
            "fgate_preact.weight": w["forget.weight"],
            "fgate_preact.bias": w["forget.bias"],
            "multihead_norm.weight": w["norm.weight"].repeat(4),
            "out_proj.weight": w["out.weight"],
        }

    assert_same_layer(ours, layer, translate, rows(), run=lambda layer, x: layer(x)[0])


def memory(seed=0, B=2, L=37, H=3, Dk=6, Dv=5):
    """Draw what a delta rule takes, on unit keys."""
    return {
        "q": normal(B, L, H, Dk, seed=seed),
        "k": normalize(normal(B, L, H, Dk, seed=seed + 1), dim=-1),
        "v": normal(B, L, H, Dv, seed=seed + 2),
        "beta": normal(B, L, H, seed=seed + 3).sigmoid() * 2,
        "state": normal(B, H, Dk, Dv, seed=seed + 4),
    }


@pytest.mark.parametrize(
    ("form", "options"),
    [("torch_chunk_gated_delta_rule", {"chunk_size": 16}), ("torch_recurrent_gated_delta_rule", {})],
)
def test_gated_delta_rule(form, options):
    module = peer("transformers.models.qwen3_next.modeling_qwen3_next")
    rule = getattr(module, form).__wrapped__
    tensors = memory() | {"log_decay": -normal(2, 37, 3, seed=9).exp()}

    def ours(q, k, v, beta, state, log_decay):
        options = {"initial_state": state, "output_final_state": True}
        return mk.gated_delta_rule(q * 6**-0.5, k, v, beta, log_decay, **options)

    def theirs(q, k, v, beta, state, log_decay):
        more = {"initial_state": state, "output_final_state": True, **options}
        return rule(q, k, v, g=log_decay, beta=beta, **more)

    assert_same(ours, theirs, tensors)


@pytest.mark.parametrize(
    ("form", "options"), [("chunk_kimi_delta_attention", {"chunk_size": 16}), ("recurrent_kimi_delta_attention", {})]
)
def test_delta_rule_with_a_decay_per_channel(form, options):
    module = peer("transformers.models.kimi_linear.modeling_kimi_linear")
    rule = getattr(module, form).__wrapped__
    tensors = memory() | {"log_decay": -normal(2, 37, 3, 6, seed=9).exp()}

    def ours(q, k, v, beta, state, log_decay):
        write, options = beta[..., None] * k, {"initial_state": state, "output_final_state": True}
        read = log_decay.exp() * k  # what the decayed state holds under k
        return mk.dplr(q * 6**-0.5, write, v, log_decay, -write, read, **options)

    def theirs(q, k, v, beta, state, log_decay):
        more = {"initial_state": state, "output_final_state": True, **options}
        return rule(q, k, v, g=log_decay, beta=beta, **more)

    assert_same(ours, theirs, tensors)


@pytest.mark.parametrize("window", [None, 9])
def test_rotary_attention_of_llama(window):
    module = peer("transformers.models.llama.modeling_llama")
    ours = mixer("attention", heads=4, window=window, rotary_base=500.0)
    config = peer("transformers").LlamaConfig(
        hidden_size=D,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    layer, x = build(module.LlamaAttention, config), rows()
    L = x.shape[1]
    seen = torch.ones(L, L, dtype=torch.bool).tril().triu(1 - (window or L))
    mask = torch.zeros(L, L, dtype=torch.float64).masked_fill(~seen, -torch.inf)

    def translate(w):
        q, k, v = w["qkv.weight"].chunk(3)
        return {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": w["out.weight"]}

    def run(layer, x):
        turns = module.LlamaRotaryEmbedding(config)(x, torch.arange(L)[None])
        return layer(x, position_embeddings=turns, attention_mask=mask)[0]

    assert_same_layer(ours, layer, translate, x, run=run)
