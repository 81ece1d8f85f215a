"""MXFP4, NVFP4 and FP8 checkpoints that are damaged, contradict their config, or are not read."""

import numpy as np
import pytest
from float_tensors import (
    E4M3,
    fp8_parts,
    fused_mxfp4_parts,
    modelopt_parts,
    mxfp4_parts,
    nvfp4_parts,
)  # fmt: skip
from synthetic_checkpoints import write
from test_float_formats import FP8, FP8_BLOCKS, ct

from jax_marlin.checkpoints import open_checkpoint

MODULE = "model.layers.0.mlp.gate_proj"
MXFP4 = ct("mxfp4-pack-quantized", "group")
NVFP4 = ct("nvfp4-pack-quantized", "tensor_group")
CHANNEL = ct(FP8, "channel", 8)
MX_PARTS, NV_PARTS = mxfp4_parts(1, 64, 40), nvfp4_parts(2, 64, 40)
FP8_PARTS = fp8_parts(3, 64, 40, (40, 1))


def without(parts, name):
    return {part: array for part, array in parts.items() if part != name}


@pytest.mark.parametrize(
    ("config", "parts", "message"),
    [
        (MXFP4, without(MX_PARTS, "weight_scale"), "has a weight_packed but no weight_scale"),
        (MXFP4, MX_PARTS | {"weight_scale": np.ones((40, 3), np.uint8)},
         r"weight_scale has shape \(40, 3\), expected \(40, 2\) for K=64, N=40"),
        (MXFP4, MX_PARTS | {"weight_scale": np.ones((40, 2), np.float32)},
         "weight_scale is F32, expected U8 or F8_E8M0"),
        (MXFP4, MX_PARTS | {"weight_packed": np.ones((40, 8), np.int32)},
         "weight_packed is I32, expected U8"),
        (MXFP4, MX_PARTS | {"weight_shape": np.ones(2, np.int64)},
         r"unknown tensor .*weight_shape beside a weight_packed"),
        (NVFP4, without(NV_PARTS, "weight_global_scale"),
         "has a weight_packed but no weight_global_scale; is a shard missing"),
        (NVFP4, NV_PARTS | {"weight_global_scale": np.ones(2, np.float32)},
         r"weight_global_scale has shape \(2,\), expected \(1,\)"),
        (NVFP4, NV_PARTS | {"weight_scale": np.ones((40, 4), np.float16)},
         "weight_scale is F16, expected F8_E4M3"),
        (NVFP4, FP8_PARTS, "has weight, weight_scale but no weight_packed|not load"),
        (CHANNEL, without(FP8_PARTS, "weight_scale"), "has a weight but no weight_scale"),
        (CHANNEL, FP8_PARTS | {"weight_scale": np.ones((39, 1), np.float32)},
         r"weight_scale has shape \(39, 1\), expected \(40, 1\)"),
        (CHANNEL, FP8_PARTS | {"weight_scale_inv": np.ones((40, 1), np.float32)},
         "has weight_scale_inv and weight_scale, expected one of them"),
        (CHANNEL, FP8_PARTS | {"weight": np.ones((40, 64), np.int8)}, "weight is I8, expected F8"),
        (FP8_BLOCKS, FP8_PARTS, r"weight_scale has shape \(40, 1\), expected \(3, 2\)"),
        (FP8_BLOCKS, FP8_PARTS | {"weight": FP8_PARTS["weight"][0]}, r"expected \(N, K\)"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_the_config(tmp_path, config, parts, message):
    with pytest.raises((ValueError, NotImplementedError), match=rf"{MODULE}.*({message})"):
        open_checkpoint(write(tmp_path, {MODULE: parts}, config))


def test_fused_blocks_of_another_width(tmp_path):
    parts = fused_mxfp4_parts(1, 3, 64, 24)
    for name, array, message in [
        ("blocks", parts["blocks"].reshape(3, 24, 32), r"blocks has shape \(3, 24, 32\), expected"),
        ("blocks", parts["blocks"].reshape(3, 24, 4, 8), r"expected \(E, N, K / 32, 16\)"),
        ("scales", parts["scales"][:2], r"scales has shape \(2, 24, 2\), expected \(3, 24, 2\)"),
        ("bias", parts["bias"][:, :5], r"bias has shape \(3, 5\), expected \(3, 24\)"),
    ]:
        stored = {f"up_{part}": a for part, a in (parts | {name: array}).items()}
        write(tmp_path, {"experts": stored}, {"quant_method": "mxfp4"})
        with pytest.raises(ValueError, match=rf"module experts\.up.*{message}"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (MXFP4, MX_PARTS | {"weight_scale": np.full((40, 2), 255, np.uint8)}),  # NaN
        (MXFP4, MX_PARTS | {"weight_packed": np.full((40, 32), 0x77, np.uint8),
                            "weight_scale": np.full((40, 2), 254, np.uint8)}),  # 6 * 2**127
        (NVFP4, NV_PARTS | {"weight_global_scale": np.zeros(1, np.float32)}),
        (NVFP4, NV_PARTS | {"weight_scale": np.full((40, 4), 127, np.uint8).view(E4M3)}),
        (CHANNEL, FP8_PARTS | {"weight": np.full((40, 64), 255, np.uint8).view(E4M3)}),
        (CHANNEL, FP8_PARTS | {"weight_scale": np.full((40, 1), np.inf, np.float32)}),
    ],
)  # fmt: skip
def test_values_that_are_not_finite_name_the_module(tmp_path, config, parts):
    with open_checkpoint(write(tmp_path, {MODULE: parts}, config)) as checkpoint:
        with pytest.raises(ValueError, match=rf"module {MODULE}: .*not finite once scaled"):
            checkpoint.load_linear(MODULE, "float32")


def test_bias_that_is_not_finite(tmp_path):
    parts = MX_PARTS | {"bias": np.full(40, np.nan, np.float16)}
    fused = fused_mxfp4_parts(1, 3, 64, 24)
    fused["bias"][1, 5] = np.inf
    with open_checkpoint(write(tmp_path / "single", {MODULE: parts}, MXFP4)) as checkpoint:
        with pytest.raises(ValueError, match=rf"module {MODULE}: bias has values that are not fin"):
            checkpoint.load_expert_stack([MODULE])
    stored = {"experts": {f"up_{part}": array for part, array in fused.items()}}
    path = write(tmp_path / "fused", stored, {"quant_method": "mxfp4"})
    with open_checkpoint(path) as checkpoint:
        with pytest.raises(ValueError, match=r"module experts\.up: bias has values that are not"):
            checkpoint.load_fused_stack("experts.up")


def test_weights_past_float16(tmp_path):
    parts = MX_PARTS | {"weight_scale": np.full((40, 2), 150, np.uint8)}
    with open_checkpoint(write(tmp_path, {MODULE: parts}, MXFP4)) as checkpoint:
        with pytest.raises(ValueError, match=rf"{MODULE}\.weight .*overflows float16; load with"):
            checkpoint.load_linear(MODULE, "float16")
        assert checkpoint.load_linear(MODULE).shape == (64, 40)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"quant_method": "mxfp4", "block": 16}, ValueError, "unknown key 'block'"),
        ({"quant_method": "fp8", "zap": 1}, ValueError, "unknown key 'zap'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, NotImplementedError, "fmt is 'e5m2'"),
        (FP8_BLOCKS | {"weight_block_size": [128]}, ValueError, r"weight_block_size is \[128\]"),
        (FP8_BLOCKS | {"weight_block_size": [0, 128]}, ValueError, r"is \[0, 128\], expected two"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, NotImplementedError,
         "quant_algo is 'W4A8_AWQ', expected NVFP4, FP8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32},
         NotImplementedError, "group_size is 32, expected 16 for NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "pre_quant_scale": True},
         NotImplementedError, "pre_quant_scale is true"),
        (ct("mxfp4-pack-quantized", "group", group_size=64), NotImplementedError,
         "group_size is 64, expected 32 with format 'mxfp4-pack-quantized'"),
        (ct("nvfp4-pack-quantized", "group"), NotImplementedError,
         "strategy is 'group', expected 'tensor_group'"),
        (ct("mxfp4-pack-quantized", "group", bits=8), NotImplementedError, "num_bits is 8"),
        (ct(FP8, "token", 8), NotImplementedError, "strategy is 'token', expected 'channel'"),
        (ct(FP8, "block", 8), ValueError, "block_structure is None, expected two sizes"),
        (ct(FP8, "group", 8, group_size=0), ValueError, "group_size is 0, expected at least 1"),
        (ct(FP8, "channel", 8, symmetric=False), NotImplementedError, "symmetric is False"),
        (ct(FP8, "channel", 8, activations=8), NotImplementedError,
         "input_activations: dynamic is 8, expected true"),
    ],
)  # fmt: skip
def test_configs_refused(tmp_path, config, error, message):
    path = write(tmp_path, {MODULE: FP8_PARTS}, config)
    with pytest.raises(error, match=rf"config\.json: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("parts", [MX_PARTS, FP8_PARTS, modelopt_parts(4, 64, 40)])
def test_tensors_without_a_config(tmp_path, parts):
    with pytest.raises(NotImplementedError, match=rf"tensor {MODULE}.* is of a format that"):
        open_checkpoint(write(tmp_path, {MODULE: parts}))


def test_experts_that_differ(tmp_path):
    names = ["experts.0.up", "experts.1.up"]
    modules = {names[0]: MX_PARTS, names[1]: mxfp4_parts(2, 96, 40)}
    with open_checkpoint(write(tmp_path, modules, MXFP4)) as checkpoint:
        with pytest.raises(ValueError, match=r"expert 1 are experts\.1\.up of shapes \[\(96, 40\)"):
            checkpoint.load_expert_stack(names)
        with pytest.raises(ValueError, match=r"shapes \[\(64, 40\), \(96, 40\)\], expected one K"):
            checkpoint.load_expert_stack([names])
        with pytest.raises(ValueError, match=r"missing experts \[1\] of 2"):
            checkpoint.load_expert_stack([names[0], "experts.2.up"])
        with pytest.raises(ValueError, match=r"has shape \(64, 40\), expected \(E, K, N\)"):
            checkpoint.load_fused_stack(names[0])
        assert not checkpoint.can_fuse([names])


def test_a_file_cut_after_it_was_opened(tmp_path):
    path = write(tmp_path, {MODULE: FP8_PARTS}, CHANNEL) / "model.safetensors"
    checkpoint = open_checkpoint(tmp_path)
    whole = path.read_bytes()
    for length in (len(whole) - 600, 400, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tensor .*the file was changed, open"):
            checkpoint.load_linear(MODULE)
