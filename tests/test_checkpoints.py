"""Checkpoints that are whole: every way of writing one loads to the weights that were written."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from synthetic_checkpoints import flat, gptq_tensors, quantization, write, write_json

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.weights import MarlinLinear

QWEN = "qwen3moe-gptq-sym-g128"
DYNAMIC = "qwen3moe-gptq-sym-desc-dynamic-lmhead"
GPTQ_CHECKPOINTS = [
    QWEN,
    DYNAMIC,
    "qwen3moe-gptqv2-asym-g64",
    "qwen3moe-gptq-sym-channel",
    "mixtral-gptq-sym-g128-classic-sharded",
    "mixtral-gptq-asym-desc-g64",
    "qwen2moe-gptq-asym-g64-bias-shared",
    "deepseekv3-gptq-sym-g32",
    "qwen3moe-autoround-gptq-asym-g64",
]


def load_weight(checkpoint, module):
    """The dequantized weight [K, N] of a quantized module, float32."""
    w = checkpoint.load_linear(module, jnp.float32)
    assert isinstance(w, MarlinLinear)
    return np.asarray(w.dequantize())


@pytest.mark.parametrize("name", GPTQ_CHECKPOINTS)
def test_real_checkpoint_dequantizes_to_the_oracle(name, find_checkpoint):
    with open_checkpoint(find_checkpoint(name)) as checkpoint:
        quantized = [info for info in checkpoint.modules.values() if info.kind == "gptq"]
        assert len(quantized) >= 20
        # one module of each last name: q_proj, gate_proj, w2, lm_head, ...
        for info in {info.name.rpartition(".")[2]: info for info in quantized}.values():
            parts = {part: checkpoint.tensor(f"{info.name}.{part}") for part in info.tensors}
            expected = oracle.gptq_weight(
                parts["qweight"], parts["scales"], parts["qzeros"], parts["g_idx"],
                bits=info.bits, group_size=info.group_size, checkpoint_format=checkpoint.format,
            )  # fmt: skip
            w = load_weight(checkpoint, info.name)
            assert w.shape == info.shape
            np.testing.assert_array_equal(w, expected.astype(np.float32))


def test_dynamic_rules_of_a_real_checkpoint(find_checkpoint):
    with open_checkpoint(find_checkpoint(DYNAMIC)) as checkpoint:
        modules = checkpoint.modules
        assert (modules["lm_head"].bits, modules["lm_head"].group_size) == (8, 32)
        q_proj = modules["model.layers.0.self_attn.q_proj"]
        assert (q_proj.bits, q_proj.group_size) == (8, 64)
        assert modules["model.layers.0.self_attn.o_proj"].bits == 4
        assert modules["model.layers.1.self_attn.q_proj"].kind == "dense"
        assert checkpoint.load_linear("lm_head").shape == (256, 512)


def test_sharded_equals_unsharded(tmp_path):
    tensors, weight = gptq_tensors(1, 64, 96)
    norm = {"weight": np.arange(5, dtype=np.float32)}
    modules = {"model.layers.0.proj": tensors, "model.norm": norm}
    for shards in (1, 3):
        path = write(tmp_path / str(shards), modules, quantization(), shards=shards)
        with open_checkpoint(path) as checkpoint:
            assert len(checkpoint.shards.paths) == shards
            assert sorted(checkpoint.names()) == sorted(flat(modules))
            w = load_weight(checkpoint, "model.layers.0.proj")
            np.testing.assert_array_equal(w, weight.astype(np.float32))
            stored = checkpoint.dense("model.norm.weight")
            np.testing.assert_array_equal(stored, norm["weight"])


def test_shards_without_an_index(tmp_path):
    path = write(tmp_path, {"a": gptq_tensors(1, 64, 96)[0]}, quantization(), shards=2)
    (path / "model.safetensors.index.json").unlink()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.modules["a"].shape == (64, 96)


def test_old_file_name_and_config_without_new_keys(tmp_path):
    # AutoGPTQ: a flat quantize_config.json, weights named after the settings
    tensors, weight = gptq_tensors(2, 64, 72, symmetric=False)
    path = write(tmp_path, {"a": tensors})
    config = {"bits": 4, "group_size": 32, "damp_percent": 0.1, "desc_act": False, "sym": False}
    write_json(path / "quantize_config.json", config)
    (path / "model.safetensors").rename(path / "gptq_model-4bit-32g.safetensors")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "gptq"
        w = load_weight(checkpoint, "a")
    np.testing.assert_array_equal(w, weight.astype(np.float32))


def test_two_config_files_that_agree_are_accepted(tmp_path):
    path = write(tmp_path, {"a": gptq_tensors(2, 64, 72)[0]}, quantization())
    same = quantization(format="gptq", meta={"quantizer": ["another:1.0"]})
    del same["sym"]  # it does not say, so it does not contradict
    write_json(path / "quantize_config.json", same)
    config = open_checkpoint(path).quantization
    assert config is not None
    assert config.base.symmetric is True


def test_symmetric_v1_accepts_stored_eight(tmp_path):
    # official files exist that declare v1 and store 8 unchanged
    tensors, weight = gptq_tensors(3, 64, 72, checkpoint_format="gptq_v2")
    with open_checkpoint(write(tmp_path, {"a": tensors}, quantization())) as checkpoint:
        w = load_weight(checkpoint, "a")
    np.testing.assert_array_equal(w, weight.astype(np.float32))


def test_dynamic_rules_first_match_wins_and_are_anchored_left(tmp_path):
    dynamic = {
        r"-:.*\.mlp\.gate": {},  # too broad: hits gate_proj, which is quantized all the same
        r"+:model\.layers\.0\.": {"bits": 8, "damp_percent": 0.1},
        r"model\.layers\.\d+\.": {"group_size": 64},
        "layers": {"bits": 8},  # matches nothing: the names do not begin with it
    }
    modules = {
        "model.layers.0.mlp.gate_proj": gptq_tensors(1, 64, 72, bits=8)[0],
        "model.layers.10.mlp.up_proj": gptq_tensors(2, 128, 72, group_size=64)[0],
        "model.layers.2.mlp.gate": {"weight": np.ones((3, 64), np.float16)},
        "lm_head": gptq_tensors(3, 64, 96)[0],
    }
    checkpoint = open_checkpoint(write(tmp_path, modules, quantization(dynamic=dynamic)))
    assert [(m.name, m.kind, m.bits, m.group_size) for m in checkpoint.modules.values()] == [
        ("lm_head", "gptq", 4, 32),
        ("model.layers.0.mlp.gate_proj", "gptq", 8, 32),
        ("model.layers.2.mlp.gate", "dense", None, None),
        ("model.layers.10.mlp.up_proj", "gptq", 4, 64),
    ]


def test_unquantized_checkpoint_is_dense(tmp_path):
    weight = np.arange(12, dtype=np.float32).reshape(4, 3).astype(ml_dtypes.bfloat16)
    modules = {
        "proj": {"weight": weight, "bias": np.arange(4, dtype=np.float16)},
        "norm": {"weight": np.ones(5, np.float16)},
        "attention": {"sinks": np.ones(6, np.float16)},
    }
    with open_checkpoint(write(tmp_path, modules)) as checkpoint:
        assert (checkpoint.format, checkpoint.quantization) == ("dense", None)
        assert [checkpoint.has(m) for m in ("proj", "norm", "attention", "other")] == [
            True, True, False, False,
        ]  # fmt: skip
        stored = checkpoint.tensor("proj.weight")
        assert stored.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(stored, weight)
        np.testing.assert_array_equal(checkpoint.linear("proj"), weight.T)
        w = checkpoint.load_linear("proj")
        assert (w.shape, w.dtype) == ((3, 4), jnp.bfloat16)
        np.testing.assert_array_equal(checkpoint.bias("proj", jnp.float32), np.arange(4))
        assert checkpoint.bias("norm") is None
        assert checkpoint.dense("norm.weight", jnp.bfloat16).dtype == jnp.bfloat16
        assert checkpoint.nbytes == checkpoint.nbytes_dense == 24 + 8 + 10 + 12


@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtype_none_keeps_that_of_the_scales(tmp_path, scale_dtype):
    tensors, weight = gptq_tensors(4, 64, 72, scale_dtype=scale_dtype, bias=True)
    with open_checkpoint(write(tmp_path, {"a": tensors}, quantization())) as checkpoint:
        w = checkpoint.load_linear("a")
        assert w.dtype == scale_dtype
        canonical = checkpoint.linear("a")
        assert isinstance(canonical, CanonicalLinear)
        assert canonical.codes.shape == weight.shape
        assert checkpoint.bias("a") is None  # it is part of w


def test_reading_after_close_opens_the_file_again(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, {"a": gptq_tensors(1, 64, 96)[0]}, quantization()))
    name = "a.scales"
    first = checkpoint.tensor(name)
    checkpoint.close()
    np.testing.assert_array_equal(checkpoint.tensor(name), first)


def test_repr_and_module_bytes(find_checkpoint):
    path = find_checkpoint(QWEN)
    with open_checkpoint(str(path)) as checkpoint:
        assert repr(checkpoint) == f"Checkpoint({str(path)!r}, format='gptq', modules=69)"
        info = checkpoint.modules["model.layers.0.mlp.experts.0.down_proj"]  # K 128, N 256, G 1
        assert info.nbytes == 16 * 256 * 4 + 32 * 4 + 256 * 2 + 128 * 4
        assert info.nbytes_dense == 128 * 256 * 2
        assert checkpoint.nbytes == sum(m.nbytes for m in checkpoint.modules.values())
        assert checkpoint.path == path


def test_config_json_may_be_absent(tmp_path):
    path = write(tmp_path, {"a": gptq_tensors(1, 64, 96)[0]}, quantization())
    (path / "config.json").unlink()
    write_json(path / "quantize_config.json", quantization())
    assert open_checkpoint(path).config == {}
