"""Qwen2-MoE from a synthetic checkpoint: shared expert, biases, dense layers, keys, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic_checkpoints import quantization, write
from synthetic_models import CONFIG, HIDDEN, IDS, Modules

from jax_marlin import models
from jax_marlin.models.decoder_layer import DenseMlp
from jax_marlin.models.loading import read_config
from jax_marlin.models.qwen2_moe import SharedExpertMlp

INNER, SHARED, WIDE, EXPERTS = 96, 128, 160, 3
KEYS = CONFIG | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "mlp_only_layers": [0],
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INNER,
    "shared_expert_intermediate_size": SHARED, "intermediate_size": WIDE, "sliding_window": 4096,
    "use_sliding_window": False, "norm_topk_prob": False,
}  # fmt: skip


def config(**changes):
    """KEYS with keys changed; ... removes one."""
    return {key: value for key, value in (KEYS | changes).items() if value is not ...}


def modules():
    """All modules of the model; layer 0 is dense, layer 1 sparse."""
    made = Modules(seed=3, qkv_bias=True)
    mlps = {"model.layers.0.mlp": WIDE, "model.layers.1.mlp.shared_expert": SHARED}
    mlps |= {f"model.layers.1.mlp.experts.{e}": INNER for e in range(EXPERTS)}
    for prefix, width in mlps.items():
        made.packed(f"{prefix}.gate_proj", HIDDEN, width)
        made.packed(f"{prefix}.up_proj", HIDDEN, width)
        made.packed(f"{prefix}.down_proj", width, HIDDEN)
    made.dense("model.layers.1.mlp.gate", HIDDEN, EXPERTS)
    made.dense("model.layers.1.mlp.shared_expert_gate", HIDDEN, 1)
    return made


def saved(directory, edit=lambda parts: None, **changes):
    """A checkpoint of those modules after `edit(parts)`, and of that config."""
    parts = modules().parts
    edit(parts)
    return write(directory, parts, quantization(sym=False), config=config(**changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.load(saved(tmp_path_factory.mktemp("qwen2_moe")))


def mlp_in_float64(x, weights, prefix):
    gate, up, down = (weights[f"{prefix}.{name}_proj"] for name in ("gate", "up", "down"))
    return (x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down


@pytest.mark.parametrize("renormalize", [False, True])
def test_sparse_layer_adds_the_gated_shared_expert(tmp_path, renormalize):
    mlp = models.load(saved(tmp_path, norm_topk_prob=renormalize)).layers[1].mlp
    assert isinstance(mlp, SharedExpertMlp)
    weights, prefix = modules().weights, "model.layers.1.mlp"
    x = np.random.default_rng(4).normal(size=(2, 7, HIDDEN))
    gate = x @ weights[f"{prefix}.shared_expert_gate"]
    expected = mlp_in_float64(x, weights, f"{prefix}.shared_expert") / (1 + np.exp(-gate))
    scores = np.exp(x @ weights[f"{prefix}.gate"])
    scores /= scores.sum(axis=-1, keepdims=True)
    chosen = np.where(scores > scores.min(axis=-1, keepdims=True), scores, 0.0)  # 2 of 3
    if renormalize:
        chosen /= chosen.sum(axis=-1, keepdims=True)
    for e in range(EXPERTS):
        expected += chosen[..., e : e + 1] * mlp_in_float64(x, weights, f"{prefix}.experts.{e}")
    got = mlp(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_dense_layer_and_biases_beside_packed_weights(model):
    assert isinstance(model.layers[0].mlp, DenseMlp)
    made = modules()
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    bias = np.concatenate([made.parts[name]["bias"] for name in names])
    got = model.layers[1].self_attn.qkv_proj(jnp.zeros((2, HIDDEN), jnp.float32))
    np.testing.assert_array_equal(got, np.tile(bias.astype(np.float32), (2, 1)))


def test_generate_is_greedy_without_a_cache(model):
    tokens = np.asarray(models.generate(model, IDS, 4))
    logits = np.asarray(model(np.concatenate([IDS, tokens], axis=1)))[:, IDS.shape[1] - 1 : -1]
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_old_and_new_config_keys_mean_the_same():
    assert read_config(config(rope_parameters=..., rope_theta=1e4)) == read_config(config())
    assert read_config(config(num_experts=..., num_local_experts=3)) == read_config(config())
    assert read_config(config(qkv_bias=True, norm_topk_prob=...)) == read_config(config())


def test_which_layers_are_sparse():
    _, got = read_config(config(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert got.sparse_layers == (False, True, False, False, False, True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_sliding_window": True}, NotImplementedError, "a sliding window"),
        ({"layer_types": ["sliding_attention"]}, NotImplementedError, "sliding_attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, NotImplementedError, "dynamic"),
        ({"hidden_act": "relu"}, NotImplementedError, "hidden_act 'relu'"),
        ({"shared_expert_intermediate_size": ...}, ValueError, "shared_expert_intermediate_size"),
    ],
)
def test_config_refused(changes, error, message):
    with pytest.raises(error, match=f"^models.load: config.json .*{message}"):
        read_config(config(**changes))


def narrow(parts):
    parts["model.layers.1.mlp.shared_expert_gate"]["weight"] = np.ones((2, HIDDEN), np.float16)


@pytest.mark.parametrize(
    ("edit", "changes", "message"),
    [
        (lambda p: p.pop("model.layers.1.mlp.shared_expert.up_proj"), {}, "shared_expert.up_proj"),
        (lambda p: p.pop("model.layers.1.mlp.shared_expert_gate"), {}, "shared_expert_gate"),
        (narrow, {}, r"shared_expert_gate has shape \(64, 2\), expected \(64, 1\)"),
        (lambda p: p["model.layers.1.self_attn.k_proj"].pop("bias"), {}, "k_proj has no bias"),
        (lambda p: None, {"shared_expert_intermediate_size": 96}, r"expected \(64, 96\)"),
        (lambda p: None, {"mlp_only_layers": [0, 1]}, r"mlp.gate_proj"),
    ],
)
def test_checkpoint_that_contradicts_its_config(tmp_path, edit, changes, message):
    with pytest.raises(ValueError, match=message):
        models.load(saved(tmp_path, edit, **changes))
