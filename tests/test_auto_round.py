"""AutoRound checkpoints: its own config over GPTQ and AWQ tensors, and what it must not hold."""

import jax.numpy as jnp
import numpy as np
import pytest
from awq_tensors import awq_tensors, awq_weight
from synthetic_checkpoints import gptq_tensors, write

from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.weights import MarlinLinear

MODULE = "model.layers.0.mlp.gate_proj"


def auto_round(**changes):
    """AutoRound's config as version 0.15 writes it."""
    return {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4,
        "group_size": 32, "sym": True, "data_type": "int", "iters": 200, "low_gpu_mem_usage": True,
        "autoround_version": "0.15.1", "block_name_to_quantize": "model.layers",
    } | changes  # fmt: skip


def native(seed, k, n, **options):
    """GPTQ tensors without g_idx, as AutoRound's own packing leaves it out; and the weight."""
    parts, weight = gptq_tensors(seed, k, n, **options)
    del parts["g_idx"]
    return parts, weight


def load(path, module=MODULE):
    with open_checkpoint(path) as checkpoint:
        w = checkpoint.load_linear(module, jnp.float32)
    assert isinstance(w, MarlinLinear)
    return w


def assert_loads(path, weight, module=MODULE):
    w = np.asarray(load(path, module).dequantize())
    np.testing.assert_array_equal(w, weight.astype(np.float32))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_auto_gptq_packing_stores_zeros_minus_one(tmp_path, symmetric, bits):
    parts, weight = native(1, 64, 72, symmetric=symmetric, bits=bits)
    assert (parts["scales"] < 0).any() and (parts["scales"] > 0).any()
    path = write(tmp_path, {MODULE: parts}, auto_round(sym=symmetric, bits=bits))
    assert open_checkpoint(path).format == "gptq"
    assert_loads(path, weight)


@pytest.mark.parametrize("zeros", ["random", "eight"])
def test_auto_awq_packing(tmp_path, zeros):
    parts = awq_tensors(2, 64, 72, zeros=zeros)
    assert (parts["scales"] < 0).any()
    config = auto_round(packing_format="auto_round:auto_awq", sym=zeros == "eight")
    path = write(tmp_path, {MODULE: parts}, config)
    assert open_checkpoint(path).format == "awq"
    assert_loads(path, awq_weight(parts, 32))


def test_scales_that_are_all_negative(tmp_path):
    parts, weight = native(3, 64, 72)
    flipped = np.where(parts["scales"] > 0, -1.0, 1.0).astype(np.float16)
    parts["scales"] *= flipped
    weight = weight * np.repeat(flipped.astype(np.float64), 32, axis=0)
    assert (parts["scales"] <= 0).all()
    assert_loads(write(tmp_path, {MODULE: parts}, auto_round()), weight)


def test_extra_config_exact_names_before_regexes(tmp_path):
    extra = {
        r".*\.gate.*": {"bits": 16, "data_type": "float"},  # too broad: hits gate_proj too
        r"layers\.1\.": {"group_size": 64, "bits": None},  # searched for, not anchored
        r"^layers": {"bits": 8},  # matches nothing
        "model.layers.1.mlp.up_proj": {"bits": 8, "sym": False, "group_size": 32, "act_bits": 16},
        "model.layers.1.mlp.up": {"bits": 8},  # a name, not the beginning of one
        "lm_head": {"bits": 16},
    }
    modules = {
        MODULE: native(1, 64, 72),
        "model.layers.1.mlp.up_proj": native(2, 64, 72, bits=8, symmetric=False),
        "model.layers.1.mlp.up_projection": native(3, 128, 72, group_size=64),
    }
    tensors = {name: parts for name, (parts, _) in modules.items()}
    tensors["lm_head"] = {"weight": np.ones((5, 64), np.float16)}
    path = write(tmp_path, tensors, auto_round(extra_config=extra))
    for name, (_, weight) in modules.items():
        assert_loads(path, weight, name)
    assert open_checkpoint(path).modules["lm_head"].kind == "dense"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, NotImplementedError, "packing_format is"),
        ({"packing_format": None}, NotImplementedError, "packing_format is None, expected one of"),
        ({"packing_format": ["x"]}, NotImplementedError, r"packing_format is \['x'\]"),
        ({"bits": 2}, NotImplementedError, "bits is 2, expected 4 or 8"),
        ({"bits": None}, ValueError, "bits is not given"),
        ({"data_type": "mx_fp"}, NotImplementedError, "data_type is 'mx_fp'"),
        ({"act_bits": 8}, NotImplementedError, "act_bits is 8"),
        ({"super_bits": 6}, NotImplementedError, "super_bits is 6, expected None"),
        ({"desc_order": 1}, ValueError, "unknown key 'desc_order'"),
        ({"extra_config": ["a"]}, ValueError, r"extra_config is \['a'\], expected name"),
        ({"extra_config": {"a": 4}}, ValueError, "extra_config 'a': overrides are 4, expected"),
        ({"extra_config": {"a(": {}}}, ValueError, r"extra_config 'a\(' is not a regular expr"),
        ({"extra_config": {"a": {"bits": 3}}}, NotImplementedError, "extra_config 'a': bits is 3"),
        ({"extra_config": {"a": {"z": 3}}}, ValueError, "extra_config 'a': unknown key 'z'"),
    ],
)
def test_config_that_is_refused(tmp_path, changes, error, message):
    parts, _ = native(1, 64, 96)
    assert load(write(tmp_path / "good", {MODULE: parts}, auto_round())).shape == (64, 96)
    with pytest.raises(error, match=rf"open_checkpoint: .*config\.json: {message}"):
        open_checkpoint(write(tmp_path / "bad", {MODULE: parts}, auto_round(**changes)))


def test_awq_packing_has_four_bits_alone(tmp_path):
    config = auto_round(packing_format="auto_round:auto_awq", extra_config={"a": {"bits": 8}})
    with pytest.raises(NotImplementedError, match="bits is 8, expected 4 for AWQ"):
        open_checkpoint(write(tmp_path, {MODULE: awq_tensors(1, 64, 72)}, config))
