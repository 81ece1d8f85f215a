"""Loading: config.json in both generations of its keys, odd but valid checkpoints, refusals."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jax_marlin import DenseExpertStack, MarlinExpertStack, MarlinLinear, models
from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.data import bundled_checkpoint
from jax_marlin.models import layers
from jax_marlin.models.config import DecoderConfig
from jax_marlin.models.decoder_layer import DenseMlp, SparseMlp
from jax_marlin.models.loading import read_config
from jax_marlin.models.rope import Rope

CONFIG = json.loads((bundled_checkpoint() / "config.json").read_text())


def config(**changes) -> DecoderConfig:
    """The bundled config with keys changed; None removes one."""
    changed = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    return read_config(changed)[1]


def test_old_and_new_config_keys_mean_the_same():
    old = {"num_experts": 8, "num_local_experts": None, "rope_parameters": None}
    assert config(**old, rope_theta=10000.0, rope_scaling=None) == config()
    assert config(**old, rope_theta=1e6).rope == Rope(1e6)
    assert config(rope_scaling={"rope_type": "default"}).rope == Rope(10000.0)
    assert config(num_experts=8) == config()


def test_sliding_window_that_is_switched_off_is_accepted():
    assert config(sliding_window=4096, use_sliding_window=False) == config()
    assert config(layer_types=["full_attention"] * 2) == config()


def test_which_layers_are_sparse():
    assert config(num_hidden_layers=5, mlp_only_layers=[1, 4]).sparse_layers == (1, 0, 1, 1, 0)
    assert config(num_hidden_layers=5, decoder_sparse_step=2).sparse_layers == (0, 1, 0, 1, 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "mixtral"}, NotImplementedError, "model_type 'mixtral'"),
        ({"architectures": ["Qwen3MoeForX"]}, NotImplementedError, "Qwen3MoeForX"),
        ({"use_sliding_window": True, "sliding_window": 16}, NotImplementedError, "sliding window"),
        ({"layer_types": ["sliding_attention"]}, NotImplementedError, "sliding_attention"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, NotImplementedError, "'linear'"),
        ({"rope_scaling": {"factor": 2}}, NotImplementedError, "'factor': 2.*only the keys"),
        ({"rope_parameters": {"rope_type": "yarn"}}, ValueError, "factor None .*'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, ValueError, "factor None .*'llama3'"),
        ({"partial_rotary_factor": 0.5}, NotImplementedError, "partial_rotary_factor 0.5"),
        ({"hidden_act": "relu2"}, NotImplementedError, "hidden_act 'relu2'"),
        ({"rope_theta": 5.0}, ValueError, "rope_theta 5.0"),
        ({"num_experts": 4}, ValueError, "num_local_experts"),
        ({"num_local_experts": [8]}, ValueError, r"num_local_experts \[8\]"),
        ({"decoder_sparse_step": 0}, ValueError, "decoder_sparse_step 0"),
        ({"num_experts_per_tok": 9}, ValueError, "num_experts_per_tok 9"),
        ({"num_key_value_heads": 3}, ValueError, "num_key_value_heads 3"),
        ({"hidden_size": "256"}, ValueError, "hidden_size '256'"),
        ({"vocab_size": None}, ValueError, "vocab_size None"),
    ],
)
def test_config_refused(changes, error, message):
    with pytest.raises(error, match=f"^models.load: config.json .*{message}"):
        config(**changes)


def variant(directory: Path, changes: dict, edit) -> Path:
    """A copy of the bundled checkpoint with config keys changed and its dict of tensors edited."""
    copy = directory / "checkpoint"
    copy.mkdir()
    shutil.copy(bundled_checkpoint() / "quantize_config.json", copy)
    changed = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (copy / "config.json").write_text(json.dumps(changed))
    tensors = safetensors.numpy.load_file(bundled_checkpoint() / "model.safetensors")
    edit(tensors)
    safetensors.numpy.save_file(tensors, copy / "model.safetensors")
    return copy


IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_unquantized_experts_and_packed_ones_give_the_same(tmp_path):
    def dequantize(tensors):
        with open_checkpoint(bundled_checkpoint()) as checkpoint:
            for name, info in checkpoint.modules.items():
                if not info.is_packed or (not whole and ".experts." not in name):
                    continue
                weight = checkpoint.load_linear(name, "float32")
                assert isinstance(weight, MarlinLinear)
                for part in info.tensors:
                    del tensors[f"{name}.{part}"]
                tensors[f"{name}.weight"] = np.ascontiguousarray(weight.dequantize().T)

    expected = models.load(bundled_checkpoint(), "float32")(IDS)
    for whole, changes in [(False, {}), (True, {"quantization_config": None})]:
        path = variant(tmp_path, changes, dequantize)
        if whole:
            (path / "quantize_config.json").unlink()
        model = models.load(path, "float32")
        mlp = model.layers[1].mlp
        assert isinstance(mlp, SparseMlp) and isinstance(mlp.gate_up, DenseExpertStack)
        np.testing.assert_allclose(model(IDS), expected, atol=1e-5)
        shutil.rmtree(path)


def test_tied_embeddings(tmp_path):
    def repeat_embedding(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    untied = models.load(variant(tmp_path, {}, repeat_embedding), "float32")
    shutil.rmtree(tmp_path / "checkpoint")
    path = variant(tmp_path, {"tie_word_embeddings": True}, lambda t: t.pop("lm_head.weight"))
    tied = models.load(path, "float32")
    assert tied.lm_head is None
    # Logits have a standard deviation of 40 here.
    np.testing.assert_allclose(tied(IDS), untied(IDS), atol=1e-3)


def test_attention_bias_of_dense_and_packed_linears(tmp_path):
    def add_biases(tensors):
        for layer in range(2):
            prefix = f"model.layers.{layer}.self_attn"
            for name, n in [("q_proj", 256), ("k_proj", 128), ("v_proj", 128), ("o_proj", 256)]:
                tensors[f"{prefix}.{name}.bias"] = np.full(n, 0.25, np.float16)
        dense_v = np.zeros((128, 256), ml_dtypes.bfloat16)  # v is then its bias alone
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"model.layers.0.self_attn.v_proj.{part}"]
        tensors["model.layers.0.self_attn.v_proj.weight"] = dense_v

    model = models.load(variant(tmp_path, {"attention_bias": True}, add_biases), "float32")
    attention = model.layers[0].self_attn
    q_proj, _, v_proj = attention.qkv_proj  # apart: they are not packed alike
    assert isinstance(v_proj, layers.DenseLinear)
    assert isinstance(model.layers[1].self_attn.qkv_proj, MarlinLinear)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, 256)), jnp.float32)
    np.testing.assert_array_equal(v_proj(x), jnp.full((2, 3, 128), 0.25))
    out, _ = attention(x, None, None)
    constant = jnp.full((2, 3, 256), 0.25)
    np.testing.assert_allclose(out, attention.o_proj(constant), atol=1e-5)
    packed_q = q_proj(jnp.zeros_like(x))
    np.testing.assert_array_equal(packed_q, jnp.full((2, 3, 256), 0.25))


def test_dense_layer_beside_sparse_ones(tmp_path):
    rng = np.random.default_rng(6)

    def make_layer_1_dense(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.1.mlp.")]:
            del tensors[name]
        for name, shape in [("gate", (384, 256)), ("up", (384, 256)), ("down", (256, 384))]:
            weight = rng.normal(size=shape) / 16
            tensors[f"model.layers.1.mlp.{name}_proj.weight"] = weight.astype(np.float16)

    path = variant(tmp_path, {"mlp_only_layers": [1]}, make_layer_1_dense)
    model = models.load(path, "float32")
    assert isinstance(model.layers[1].mlp, DenseMlp)
    assert bool(jnp.isfinite(model(IDS)).all())


def cut_routers(tensors):
    """Routers of 7 experts, beside the tensors of 8."""
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        tensors[name] = tensors[name][:7].copy()


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({}, lambda t: t.pop("model.layers.1.self_attn.k_norm.weight"), "1.self_attn.k_norm"),
        ({}, lambda t: t.pop("lm_head.weight"), "lm_head"),
        ({"num_local_experts": 9}, lambda t: None, r"experts.8"),
        ({"num_local_experts": 7}, cut_routers, "24 tensors have no place in qwen3_moe"),
        ({"num_hidden_layers": 1}, lambda t: None, "tensors have no place in qwen3_moe.*layers.1"),
        ({"attention_bias": True}, lambda t: None, "q_proj has no bias"),
        ({"vocab_size": 500}, lambda t: None, r"embed_tokens has shape \(512, 256\), expected \(5"),
        ({"head_dim": 32}, lambda t: None, r"q_proj has shape \(256, 256\), expected \(256, 128\)"),
        ({"moe_intermediate_size": 64}, lambda t: None, r"gate and up has shape \(8, 256, 256\)"),
        ({"dtype": "float8"}, lambda t: None, "config.json's dtype is 'float8'"),
        ({"dtype": None}, lambda t: None, "config.json's dtype is None, .*pass dtype="),
    ],
)  # fmt: skip
def test_checkpoint_that_contradicts_its_config(tmp_path, changes, edit, message):
    path = variant(tmp_path, changes, edit)
    with pytest.raises(ValueError, match=message):
        models.load(path)


def test_rotary_frequencies_in_the_file_are_ignored(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = variant(tmp_path, {}, lambda t: t.update({name: np.ones(32, np.float32)}))
    assert models.load(path).dtype == jnp.bfloat16


def test_gate_and_up_permuted_differently_stay_a_pair(tmp_path):
    shuffled = np.random.default_rng(7).permutation(np.arange(256, dtype=np.int32) // 128)
    name = "model.layers.0.mlp.experts.2.up_proj.g_idx"
    model = models.load(variant(tmp_path, {}, lambda t: t.update({name: shuffled})), "float32")
    mlp = model.layers[0].mlp
    assert isinstance(mlp, SparseMlp) and isinstance(mlp.gate_up, tuple)
    assert isinstance(mlp.gate, layers.DenseLinear)
    gate, up = (np.asarray(half.dequantize(), np.float64) for half in mlp.gate_up)
    down, router = np.asarray(mlp.down.dequantize(), np.float64), np.asarray(mlp.gate.weight)
    perms = [half.perm for half in mlp.gate_up if isinstance(half, MarlinExpertStack)]
    assert [perm is None for perm in perms] == [True, False]
    x = np.random.default_rng(8).normal(size=(24, 256))
    expected = np.zeros_like(x)
    for row, out, logits in zip(x, expected, x @ router.T, strict=True):
        chosen = np.argsort(-logits)[:2]
        shares = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for e, share in zip(chosen, shares, strict=True):
            g = row @ gate[e]
            out += share * (g / (1 + np.exp(-g)) * (row @ up[e])) @ down[e]
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, atol=1e-4)


def test_dtype_defaults_to_the_checkpoints():
    assert models.load(bundled_checkpoint()).dtype == jnp.bfloat16
