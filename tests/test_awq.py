"""AWQ checkpoints: every way of writing one loads exactly; what cannot be read is refused."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from awq_tensors import awq_tensors, awq_weight
from synthetic_checkpoints import write, write_json

from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.inspect import describe
from jax_marlin.weights import MarlinLinear

REAL = "qwen3moe-awq-asym-g64"
MODULE = "model.layers.0.mlp.gate_proj"


def awq_config(**changes):
    """AutoAWQ's config in config.json, as transformers writes it."""
    config = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["gate"], "backend": "autoawq", "do_fuse": False,
    }  # fmt: skip
    return {key: value for key, value in (config | changes).items() if value is not None}


def load(path, module=MODULE):
    with open_checkpoint(path) as checkpoint:
        w = checkpoint.load_linear(module, jnp.float32)
    assert isinstance(w, MarlinLinear)
    return w


def write_one(path, parts, config=None):
    return write(path, {MODULE: parts}, awq_config() if config is None else config)


@pytest.mark.parametrize(
    ("k", "n", "group_size"),
    [(64, 96, 32), (80, 72, 32), (96, 8, -1), (33, 40, -1), (160, 24, 128)],
)
def test_weight_equals_the_slow_decoder(tmp_path, k, n, group_size):
    # modules_to_not_convert names "gate", of which this gate_proj is no case: it has a qweight
    parts = awq_tensors(k, k, n, group_size=group_size)
    w = load(write_one(tmp_path, parts, awq_config(group_size=group_size)))
    assert w.shape == (k, n)
    expected = awq_weight(parts, group_size).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(w.dequantize()), expected)


@pytest.mark.parametrize("zeros", ["eight", None])
def test_zero_point_false_with_and_without_qzeros(tmp_path, zeros):
    parts = awq_tensors(1, 64, 96, zeros=zeros)
    w = load(write_one(tmp_path, parts, awq_config(zero_point=False)))
    assert w.stack.zero_points is None
    expected = awq_weight(parts, 32).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(w.dequantize()), expected)


@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_bias_and_dtype_of_the_scales(tmp_path, scale_dtype):
    parts = awq_tensors(2, 64, 72, bias=True, dtype=scale_dtype)
    with open_checkpoint(write_one(tmp_path, parts)) as checkpoint:
        w = checkpoint.load_linear(MODULE)
        assert checkpoint.bias(MODULE) is None  # it is part of w
    assert isinstance(w, MarlinLinear)
    assert w.dtype == scale_dtype
    bias = np.asarray(w(jnp.zeros((3, 64), w.dtype)), np.float32)[1]
    np.testing.assert_array_equal(bias, parts["bias"].astype(np.float32))


def test_config_as_each_writer_names_it(tmp_path):
    parts = awq_tensors(3, 64, 72)
    gptqmodel = {
        "quant_method": "awq", "method": "awq", "format": "gemm", "checkpoint_format": "gemm",
        "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "pack_dtype": "int32",
        "dynamic": {"-:lm_head": {}}, "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }  # fmt: skip
    auto_round = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "sym": False, "zero_point": True,
        "version": "gemm", "data_type": "int", "provider": "auto-round", "iters": 20,
        "modules_to_not_convert": ["model.layers.0.mlp.gate", "lm_head"],
    }  # fmt: skip
    expected = awq_weight(parts, 32).astype(np.float32)
    for name, config in [("gptqmodel", gptqmodel), ("auto_round", auto_round)]:
        w = load(write_one(tmp_path / name, parts, config))
        np.testing.assert_array_equal(np.asarray(w.dequantize()), expected)
    # AutoAWQ's own file beside a config.json that says nothing
    path = write(tmp_path / "autoawq", {MODULE: parts})
    own = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    write_json(path / "quant_config.json", own)
    np.testing.assert_array_equal(np.asarray(load(path).dequantize()), expected)
    # both files, in agreement and not
    both = write_one(tmp_path / "both", parts)
    write_json(both / "quant_config.json", own)
    assert open_checkpoint(both).format == "awq"
    write_json(both / "quant_config.json", own | {"q_group_size": 64})
    with pytest.raises(ValueError, match=r"group_size is 32 in .* but 64 in quant_config"):
        open_checkpoint(both)


def test_dynamic_group_size_of_one_module(tmp_path):
    modules = {"a.proj": awq_tensors(4, 128, 24), "b.proj": awq_tensors(5, 128, 24, group_size=64)}
    config = awq_config(dynamic={"b": {"group_size": 64}, "-:a": {}})
    path = write(tmp_path, modules, config)
    for (name, parts), group_size in zip(modules.items(), (32, 64), strict=True):
        expected = awq_weight(parts, group_size).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(load(path, name).dequantize()), expected)


def test_experts_with_and_without_zero_points_share_a_stack(tmp_path):
    linears = [
        awq_tensors(e, 64, 40, zeros=zeros) for e, zeros in enumerate(["random", None, "eight"])
    ]
    names = [f"experts.{e}.up_proj" for e in range(3)]
    config = awq_config(zero_point=None)  # not said: zero points are taken as stored
    path = write(tmp_path, dict(zip(names, linears, strict=True)), config)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.can_fuse([names])
        stack = checkpoint.load_expert_stack(names, jnp.float32)
    expected = np.stack([awq_weight(parts, 32) for parts in linears]).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(stack.dequantize()), expected)


def test_real_checkpoint_dequantizes_to_the_slow_decoder(find_checkpoint):
    path = find_checkpoint(REAL)
    for name in ("layers.0.self_attn.k_proj", "layers.1.mlp.experts.7.down_proj"):
        module = f"model.{name}"
        with open_checkpoint(path) as checkpoint:
            info = checkpoint.modules[module]
            parts = {part: checkpoint.tensor(f"{module}.{part}") for part in info.tensors}
            assert checkpoint.modules["model.layers.0.mlp.gate"].kind == "dense"
        expected = awq_weight(parts, 64).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(load(path, module).dequantize()), expected)
    assert "awq, 4 bit, group size 64, asymmetric" in describe(path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": "gemv"}, NotImplementedError, "version is 'gemv', and of AWQ .* only 'gemm'"),
        ({"format": "marlin"}, NotImplementedError, "format is 'marlin'"),
        ({"bits": 8}, NotImplementedError, "bits is 8, expected 4 for AWQ; export"),
        ({"bits": 3}, NotImplementedError, "bits is 3"),
        ({"bits": None}, ValueError, "bits is not given"),
        ({"group_size": 0}, ValueError, "group_size is 0, expected -1 or at least 1"),
        ({"w_bit": 8}, ValueError, "w_bit is 8 but bits is 4; remove the wrong one"),
        ({"zero_point": 1}, ValueError, "zero_point is 1, expected true or false"),
        ({"sym": True}, ValueError, "sym and zero_point are both True, expected opposites"),
        ({"sym": 0}, ValueError, "sym is 0, expected true or false"),
        ({"desc_act": True}, NotImplementedError, "desc_act is true, expected false"),
        ({"method": "gptq"}, ValueError, r"disagree, \['awq', 'gptq'\]; remove one"),
        ({"smoothing": 2}, ValueError, "unknown key 'smoothing'"),
        ({"dynamic": {"a": {"bits": 8}}}, NotImplementedError, "dynamic rule 'a': bits is 8"),
    ],
)
def test_config_that_is_refused(tmp_path, changes, error, message):
    parts = awq_tensors(1, 64, 96)
    assert load(write_one(tmp_path / "good", parts)).shape == (64, 96)
    with pytest.raises(error, match=rf"open_checkpoint: .*config\.json: .*{message}"):
        open_checkpoint(write_one(tmp_path / "bad", parts, awq_config(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, "has a qweight but no scales; is a shard missing"),
        ({"qzeros": None}, "zero_point is true but there are no qzeros; is a shard missing"),
        ({"qweight": None}, "has scales and qzeros but no qweight"),
        (
            {"scales": np.ones((2, 97), np.float16)},
            r"scales has shape \(2, 97\), expected \(2, 96\)",
        ),
        (
            {"scales": np.ones((1, 96), np.float16)},
            r"expected \(2, 96\) for K=64.* group_size of the quant",
        ),
        ({"qzeros": np.ones((2, 96), np.int32)}, r"qzeros has shape \(2, 96\), expected \(2, 12\)"),
        ({"qweight": np.ones((64, 12), np.int16)}, "qweight is I16, expected I32 or U32"),
        ({"qweight": np.ones(64, np.int32)}, r"qweight has shape \(64,\), expected \(K, N / 8\)"),
        ({"g_idx": np.zeros(64, np.int32)}, "unknown tensor .*g_idx beside a qweight"),
        ({"bias": np.ones(95, np.float16)}, r"bias has shape \(95,\), expected \(96,\)"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, changes, message):
    parts = {k: a for k, a in (awq_tensors(1, 64, 96) | changes).items() if a is not None}
    with pytest.raises(ValueError, match=rf"open_checkpoint: module {MODULE}:? ?.*{message}"):
        open_checkpoint(write_one(tmp_path, parts))


def test_values_that_are_refused(tmp_path):
    parts = awq_tensors(1, 64, 96)
    with pytest.raises(ValueError, match=rf"{MODULE}: qzeros stores .* expected 8 everywhere"):
        load(write_one(tmp_path / "zeros", parts, awq_config(zero_point=False)))
    parts["scales"][1, 5] = np.nan
    with pytest.raises(ValueError, match=rf"{MODULE}: scales has 1 values that are not finite"):
        load(write_one(tmp_path / "nan", parts))
    path = write_one(
        tmp_path / "group", awq_tensors(1, 96, 8, group_size=48), awq_config(group_size=48)
    )
    with pytest.raises(
        ValueError, match=rf"{MODULE}: group_size is 48, expected .* multiple of 32"
    ):
        load(path)
