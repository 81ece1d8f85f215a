"""MXFP4, NVFP4 and FP8 checkpoints: each weight against a float64 decoder, stacks, inspect."""

import contextlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from compressed_tensors import group, packed_config, packed_tensors
from float_tensors import (
    E4M3,
    fp8_parts,
    fp8_weight,
    fused_mxfp4_parts,
    modelopt_parts,
    mxfp4_parts,
    mxfp4_weight,
    nvfp4_parts,
    nvfp4_weight,
)  # fmt: skip
from synthetic_checkpoints import write, write_json

from jax_marlin import DenseExpertStack, MarlinLinear
from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.checkpoints.low_precision import decode_e2m1, decode_e8m0, scaled
from jax_marlin.inspect import describe

MODULE = "model.layers.0.mlp.gate_proj"
K, N = 96, 40


def float_weights(strategy, bits=4, **changes):
    """The `weights` of a config group of floats."""
    sizes = {"tensor_group": 16, "group": 32}
    return {
        "num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy,
        "group_size": sizes.get(strategy), "block_structure": None, "dynamic": False,
        "actorder": None, "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": None,
    } | changes  # fmt: skip


def ct(name, strategy, bits=4, activations=None, **changes):
    """A compressed-tensors config of that format."""
    one = group(weights=float_weights(strategy, bits, **changes), format=name,
                input_activations=activations)  # fmt: skip
    return packed_config(one, format=name)


FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}
FP8 = "float-quantized"
MODELOPT = {"quant_method": "modelopt"}
# name -> (config, parts, its weight in float64)
CASES = {}


def case(name, config, parts, weight):
    CASES[name] = (config, parts, weight)


parts = mxfp4_parts(1, K, N, bias=True)
case("mxfp4_compressed_tensors", ct("mxfp4-pack-quantized", "group"), parts,
     mxfp4_weight(parts["weight_packed"], parts["weight_scale"]))  # fmt: skip
parts = mxfp4_parts(2, 80, N)  # the last group of K is short
case("mxfp4_short_group", ct("mxfp4-pack-quantized", "group"), parts,
     mxfp4_weight(parts["weight_packed"], parts["weight_scale"]))  # fmt: skip
parts = nvfp4_parts(3, K, N, bias=True)
case("nvfp4_global_scale_divides", ct("nvfp4-pack-quantized", "tensor_group"), parts,
     nvfp4_weight(parts["weight_packed"], parts["weight_scale"],
                  1 / float(parts["weight_global_scale"][0])))  # fmt: skip
parts = modelopt_parts(4, K, N)
case("nvfp4_second_scale_multiplies", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, parts,
     nvfp4_weight(parts["weight"], parts["weight_scale"],
                  float(parts["weight_scale_2"])))  # fmt: skip
for name, shape, bn, bk, config in [
    ("fp8_channel", (N, 1), 1, K, ct(FP8, "channel", 8)),
    ("fp8_channel_of_one_axis", (N,), 1, K, ct(FP8, "channel", 8)),
    ("fp8_tensor", (1,), N, K, ct(FP8, "tensor", 8)),
    ("fp8_group", (N, 3), 1, 32, ct(FP8, "group", 8)),
    ("fp8_naive_quantized", (N, 1), 1, K, ct("naive-quantized", "channel", 8)),
    ("fp8_block", (1, 1), 128, 128, ct(FP8, "block", 8, block_structure=[128, 128])),
    ("fp8_block_off_both_edges", (3, 2), 16, 64, ct(FP8, "block", 8, block_structure="16x64")),
    ("fp8_autofp8", (), N, K, {"quant_method": "fp8"}),
    ("fp8_modelopt", (), N, K, MODELOPT | {"quant_algo": "FP8"}),
    ("fp8_modelopt_channel", (N,), 1, K, MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
    ("fp8_modelopt_block", (1, 1, 1, 1), 128, 128, MODELOPT | {"quant_algo": "fp8_pb_wo"}),
]:
    parts = fp8_parts(5, K, N, shape, bias=name == "fp8_channel")
    case(name, config, parts, fp8_weight(parts["weight"], parts["weight_scale"], bn, bk))
parts = fp8_parts(6, K, N, (3, 3), name="weight_scale_inv", dtype=ml_dtypes.bfloat16)
case("fp8_scale_inv_multiplies", FP8_BLOCKS, parts,
     fp8_weight(parts["weight"], parts["weight_scale_inv"], 16, 32))  # fmt: skip


def opened(path, config):
    """An open checkpoint; ModelOpt's configs warn that activations stay as they are."""
    expects_warning = config.get("quant_algo") not in (None, "fp8_pb_wo")
    with (
        pytest.warns(UserWarning, match="quantizes weights alone")
        if expects_warning
        else (contextlib.nullcontext())
    ):
        return open_checkpoint(path)


@pytest.mark.parametrize("name", CASES)
def test_every_weight(tmp_path, name):
    config, parts, weight = CASES[name]
    with opened(write(tmp_path, {MODULE: parts}, config), config) as checkpoint:
        info = checkpoint.modules[MODULE]
        assert info.is_dequantized and not info.is_packed
        assert info.shape == weight.shape and info.kind == name.partition("_")[0]
        for dtype in ("float32", "bfloat16", "float16"):
            got = checkpoint.load_linear(MODULE, dtype)
            assert got.dtype == dtype and not isinstance(got, MarlinLinear)
            # Scale and product are rounded to float32, the result to dtype.
            eps = oracle.epsilon(got.dtype) + 2 * oracle.epsilon(np.float32)
            tiny = float(jnp.finfo(got.dtype).smallest_subnormal)
            oracle.assert_within(got, weight, eps * np.abs(weight) + tiny, f"{name} {dtype}")
        assert checkpoint.load_linear(MODULE).dtype == jnp.bfloat16
        on_host = checkpoint.linear(MODULE)
        assert isinstance(on_host, np.ndarray) and on_host.dtype == np.float32
        bias = checkpoint.bias(MODULE, "float32")
        assert (bias is None) == ("bias" not in parts)
        if bias is not None:
            np.testing.assert_array_equal(bias, parts["bias"].astype(np.float32))


def test_every_number_of_four_bits():
    """All 16 codes under exponents whose powers of two are exact: no rounding anywhere."""
    codes = np.arange(16, dtype=np.uint8)
    packed = np.tile(codes[0::2] | codes[1::2] << 4, 2)[None]  # [1, 16]: each code twice
    for exponent in (0, 1, 64, 127, 200, 250):
        weight = mxfp4_weight(packed, np.array([[exponent]], np.uint8))
        scales = decode_e8m0(np.array([[exponent]], np.uint8))
        got = scaled(decode_e2m1(packed), scales, (1, 32), "test")
        np.testing.assert_array_equal(got, weight.astype(np.float32))


def test_native_block_size_of_deepseek(tmp_path):
    """128 x 128 with both sizes off the block, as in a kv_a_proj of 576 columns."""
    parts = fp8_parts(7, 200, 136, (2, 2), name="weight_scale_inv")
    config = FP8_BLOCKS | {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    path = write(tmp_path, {MODULE: parts}, config)
    with pytest.warns(UserWarning, match=r"activation_scheme 'dynamic'"):
        checkpoint = open_checkpoint(path)
    got = checkpoint.load_linear(MODULE, "float32")
    expected = fp8_weight(parts["weight"], parts["weight_scale_inv"], 128, 128)
    assert not isinstance(got, MarlinLinear)
    np.testing.assert_allclose(got, expected, rtol=3e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_and_up_of_different_global_scales_in_one_stack(tmp_path, dtype):
    names = [(f"experts.{e}.gate_proj", f"experts.{e}.up_proj") for e in range(3)]
    modules, weights = {}, []
    for e, pair in enumerate(names):
        pair_parts = [nvfp4_parts(10 + e, 64, 24, bias=e == 1), nvfp4_parts(20 + e, 64, 40)]
        modules |= dict(zip(pair, pair_parts, strict=True))
        weights.append(np.concatenate([
            nvfp4_weight(p["weight_packed"], p["weight_scale"], 1 / p["weight_global_scale"][0])
            for p in pair_parts
        ], axis=1))  # fmt: skip
    config = ct("nvfp4-pack-quantized", "tensor_group")
    with open_checkpoint(write(tmp_path, modules, config)) as checkpoint:
        assert checkpoint.can_fuse(names)
        stack = checkpoint.load_expert_stack(names, dtype)
        downs = checkpoint.load_expert_stacks(names, dtype)
    assert isinstance(stack, DenseExpertStack) and stack.shape == (3, 64, 64)
    assert [part.shape for part in downs] == [(3, 64, 24), (3, 64, 40)]
    weights = np.stack(weights)
    eps = oracle.epsilon(stack.dtype) + 2 * oracle.epsilon(np.float32)
    oracle.assert_within(stack.weight, weights, eps * np.abs(weights) + 1e-9)
    assert stack.bias is not None
    bias = np.asarray(stack.bias.astype(jnp.float32))
    stored = modules["experts.1.gate_proj"]["bias"].astype(stack.dtype).astype(np.float32)
    np.testing.assert_array_equal(bias[1, :24], stored)
    assert not bias[[0, 2]].any() and not bias[1, 24:].any()


def test_fused_experts(tmp_path):
    parts = fused_mxfp4_parts(8, 3, 64, 24)
    stored = {f"gate_up_proj_{part}": array for part, array in parts.items()}
    modules = {
        "model.layers.0.mlp.experts": stored,
        "model.layers.0.mlp": {"e_bias": np.ones(3, np.float16)},  # no fused module's
    }
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    order = np.r_[0:24:2, 1:24:2]
    with open_checkpoint(write(tmp_path, modules, config)) as checkpoint:
        assert checkpoint.modules[name].shape == (3, 64, 24)
        assert "e_bias" in checkpoint.modules["model.layers.0.mlp"].tensors
        stack = checkpoint.load_fused_stack(name, "float32")
        ordered = checkpoint.load_fused_stack(name, columns=order)
        with pytest.raises(ValueError, match=r"holds experts of shape \(3, 64, 24\).*fused_stack"):
            checkpoint.load_linear(name)
    for e in range(3):
        weight = mxfp4_weight(parts["blocks"][e].reshape(24, 32), parts["scales"][e])
        np.testing.assert_array_equal(stack.weight[e], weight.astype(np.float32))
    assert ordered.dtype == jnp.bfloat16  # which holds these products exactly
    np.testing.assert_array_equal(ordered.weight.astype(jnp.float32), stack.weight[..., order])
    np.testing.assert_array_equal(stack.bias, parts["bias"].astype(np.float32))
    text = describe(tmp_path)
    assert "format      mxfp4, 4 bit, group size 32, dequantized at load" in text
    assert "experts     3 in 1 layer" in text


def test_formats_side_by_side(tmp_path):
    """One config with a group for each: packed, NVFP4 and FP8 modules, and one left alone."""
    nvfp4, fp8 = nvfp4_parts(1, 64, 40), fp8_parts(2, 64, 40, (40, 1))
    modules = {
        "a.attn.proj": fp8, "a.mlp.proj": nvfp4, "b.mlp.proj": packed_tensors(3, 64, 40),
        "lm_head": {"weight": np.ones((4, 64), np.float16)},
    }  # fmt: skip
    config = packed_config(
        group(["re:.*attn"], weights=float_weights("channel", 8), format=FP8),
        group(["re:a.mlp"], weights=float_weights("tensor_group"), format="nvfp4-pack-quantized"),
        group(["re:b"]),
        format="mixed-precision",
    )
    path = write(tmp_path, modules, config)
    with open_checkpoint(path) as checkpoint:
        kinds = {name: info.kind for name, info in checkpoint.modules.items()}
        with pytest.raises(NotImplementedError, match=r"1 of 2 modules are not packed"):
            checkpoint.load_expert_stack(["a.mlp.proj", "b.mlp.proj"])
        assert not checkpoint.can_fuse([("a.mlp.proj", "b.mlp.proj")])
    assert kinds == {
        "a.attn.proj": "fp8", "a.mlp.proj": "nvfp4", "b.mlp.proj": "compressed-tensors",
        "lm_head": "dense",
    }  # fmt: skip
    assert "at load     2 modules are dequantized, to 10.00 KiB in bfloat16" in describe(path)


def test_unquantized_experts(tmp_path):
    names = [f"experts.{e}.up" for e in range(3)]
    rng = np.random.default_rng(1)
    modules = {name: {"weight": rng.standard_normal((24, 40)).astype(np.float16)} for name in names}
    with open_checkpoint(write(tmp_path, modules)) as checkpoint:
        stack = checkpoint.load_expert_stack(names)
        assert isinstance(stack, DenseExpertStack) and stack.dtype == jnp.float16
    expected = np.stack([modules[name]["weight"].T for name in names])
    np.testing.assert_array_equal(stack.weight, expected)


def test_modelopts_own_file(tmp_path):
    parts = modelopt_parts(4, K, N) | {"k_scale": np.ones((), np.float32)}
    write(tmp_path, {MODULE: parts})
    write_json(tmp_path / "hf_quant_config.json", {
        "producer": {"name": "modelopt", "version": "0.39"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8",
                         "exclude_modules": ["lm_head"]},
    })  # fmt: skip
    with pytest.warns(UserWarning, match=r"hf_quant_config\.json: quantization: activations are"):
        assert open_checkpoint(tmp_path).modules[MODULE].kind == "nvfp4"
    # Newer exports say the same in config.json.
    inner = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    write_json(tmp_path / "config.json", {"quantization_config": inner})
    with pytest.warns(UserWarning, match=r"config\.json: (quantization: )?activations are"):
        assert open_checkpoint(tmp_path).modules[MODULE].kind == "nvfp4"
    write_json(tmp_path / "config.json", {"quantization_config": inner | {"quant_algo": "FP8"}})
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"bits is 8 in config\.json but 4"),
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dynamic", [True, "local", False])
def test_scales_of_activations_are_not_used(tmp_path, dynamic):
    activations = {"num_bits": 4, "type": "float", "dynamic": dynamic, "strategy": "tensor_group"}
    config = ct("nvfp4-pack-quantized", "tensor_group", activations=activations)
    path = write(tmp_path, {MODULE: nvfp4_parts(1, K, N)}, config)
    with pytest.warns(
        UserWarning, match=r"quantized \(group_0: input_activations\).*weights alone"
    ):
        open_checkpoint(path)


def test_e4m3_holds_every_value():
    """The decoder here and ml_dtypes, which the loader uses, agree on all 256 codes."""
    stored = np.arange(256, dtype=np.uint8)
    got = fp8_weight(stored.view(E4M3)[None], np.ones((1, 1)), 1, 256)[:, 0]
    np.testing.assert_array_equal(got, stored.view(E4M3).astype(np.float64))
