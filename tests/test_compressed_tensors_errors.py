"""compressed-tensors configs and tensors that would change the result: each refused by name."""

import numpy as np
import pytest
from compressed_tensors import group, packed_config, packed_tensors, scheme
from synthetic_checkpoints import write

from jax_marlin.checkpoints import open_checkpoint

MODULE = "model.layers.0.mlp.gate_proj"
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "int-quantized"}, "format is 'int-quantized', and of compressed"),
        ({"format": "mxfp8-quantized"}, "format is 'mxfp8-quantized'.*W4A16 or W8A16"),
        (group(format="naive-quantized"), "type is 'int', expected 'float' with format 'naive-q"),
        ({"transform_config": {"config_groups": {"u": 1}}}, "transform_config is {'config_groups'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is {'format'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is {'num_bits': 8}"),
        (group(format="int-quantized"), "config_groups: group_0: format is 'int-quantized'"),
        (group(format="float-quantized"), "type is 'int', expected 'float' with format 'float-q"),
        (group(input_activations=STATIC), "input_activations: dynamic is False.*static"),
        (group(output_activations=STATIC), "output_activations: dynamic is False"),
        (group(input_activations={"dynamic": "local"}), "dynamic is 'local'"),
        ({"weights": None}, "weights is None, expected an object"),
        (scheme(type="float"), "weights: type is 'float', expected None or 'int'"),
        (scheme(num_bits=3), "weights: bits is 3, expected 4 or 8"),
        (scheme(strategy="tensor"), "strategy is 'tensor', expected 'group' or 'channel'"),
        (scheme(strategy="block"), "strategy is 'block'"),
        (scheme(strategy=None, group_size=None), "strategy is None"),
        (scheme(actorder="best"), "actorder is 'best', expected null"),
        (scheme(dynamic=True), "weights: dynamic is True"),
        (scheme(block_structure=[128, 128]), r"block_structure is \[128, 128\], expected None"),
    ],
)
def test_scheme_that_does_not_load(tmp_path, changes, message):
    with pytest.raises(NotImplementedError, match=rf"config\.json: .*{message}"):
        open_with(tmp_path, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoothing": 1}, "unknown key 'smoothing'"),
        ({"config_groups": {}}, "config_groups is {}, expected name -> group"),
        ({"config_groups": {"W4A16": ["Linear"]}}, r"W4A16 is \['Linear'\], expected an object"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head', expected a list"),
        ({"ignore": ["re:("]}, r"ignore: 're:\(' is not a regular expression"),
        (group(["re:["]), r"targets: 're:\[' is not a regular expression"),
        (group([]), "config_groups has no targets"),
        (group(zap=1), "group_0: unknown key 'zap'"),
        (scheme(zap=1), "weights: unknown key 'zap'"),
        (scheme(num_bits=None), "bits is not given"),
        (scheme(group_size=None), "group_size is not given"),
        (scheme(group_size=-1), "group_size is -1, expected at least 1"),
        (scheme(strategy="channel"), "group_size is 32, expected null"),
        (scheme(symmetric="no"), "sym is 'no', expected true or false"),
    ],
)
def test_config_that_makes_no_sense(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        open_with(tmp_path, changes)


def open_with(tmp_path, changes):
    """A checkpoint whose config, or the one group in it, or that group's weights, is changed."""
    if "num_bits" in changes:
        config = packed_config(group(weights=changes))
    elif "targets" in changes or "weights" in changes:
        config = packed_config(group() | changes)
    else:
        config = packed_config(**changes)
    parts = packed_tensors(1, 64, 40)
    assert open_checkpoint(write(tmp_path / "good", {MODULE: parts}, packed_config())).has(MODULE)
    return open_checkpoint(write(tmp_path / "bad", {MODULE: parts}, config))


def test_dense_sparsity_config_changes_nothing(tmp_path):
    full = {"format": "dense", "ignore": [], "sparsity_structure": "unstructured"}
    assert open_with(tmp_path, {"sparsity_config": full}).has(MODULE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": None}, "has a weight_packed but no weight_scale; is a shard missing"),
        ({"weight_shape": None}, "has a weight_packed but no weight_shape; is a shard missing"),
        ({"weight_shape": np.array([64, 40])}, r"weight_shape holds \[64, 40\], expected .* N=40"),
        ({"weight_shape": np.array([40, 0])}, r"weight_shape holds \[40, 0\]"),
        ({"weight_shape": np.array([40, 72])}, r"weight_packed has shape \(40, 8\), expected"),
        ({"weight_shape": np.array([40, 64, 1])}, r"weight_shape is I64 of shape \(3,\), expected"),
        ({"weight_scale": np.ones((40, 1), np.float16)}, r"weight_scale has shape \(40, 1\)"),
        ({"weight_scale": np.ones((40, 2), np.int8)}, "weight_scale is I8, expected F16"),
        ({"weight_packed": np.ones((40, 32), np.uint8)}, "weight_packed is U8, expected I32"),
        ({"weight_packed": np.ones(320, np.int32)}, r"weight_packed has shape \(320,\), expected"),
        ({"weight_zero_point": np.ones((40, 2), np.int8)}, "weight_zero_point is I8, expected I32"),
        (
            {"weight_zero_point": np.ones((40, 2), np.int32)},
            r"weight_zero_point .* expected \(5, 2\)",
        ),
        ({"weight_g_idx": np.zeros(40, np.int32)}, r"weight_g_idx has shape \(40,\), expected"),
        ({"input_scale": np.ones(1, np.float32)}, "unknown tensor .*input_scale"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, changes, message):
    parts = packed_tensors(1, 64, 40) | changes
    parts = {part: array for part, array in parts.items() if array is not None}
    with pytest.raises(ValueError, match=rf"module {MODULE}:? ?{message}"):
        open_checkpoint(write(tmp_path, {MODULE: parts}, packed_config()))


def test_tensors_that_the_config_promises(tmp_path):
    parts = packed_tensors(1, 64, 40)
    for changes, message in [
        ({"symmetric": False}, "symmetric is false but there is no weight_zero_point"),
        ({"actorder": "group"}, "actorder is 'group' but there is no weight_g_idx"),
    ]:
        config = packed_config(group(weights=scheme(**changes)))
        with pytest.raises(ValueError, match=rf"module {MODULE}: {message}"):
            open_checkpoint(write(tmp_path, {MODULE: parts}, config))
    del parts["weight_packed"]
    with pytest.raises(NotImplementedError, match=r"weight_s.* or a shard is missing"):
        open_checkpoint(write(tmp_path, {MODULE: parts}, packed_config()))


def test_values_that_are_refused(tmp_path):
    parts = packed_tensors(1, 64, 40)
    parts["weight_scale"][3, 1] = np.inf
    with pytest.raises(ValueError, match=rf"{MODULE}: scales has 1 values that are not finite"):
        open_checkpoint(write(tmp_path, {MODULE: parts}, packed_config())).load_linear(MODULE)
    parts = packed_tensors(1, 64, 40, act_order=True)
    parts["weight_g_idx"][5] = 2
    with pytest.raises(ValueError, match=rf"{MODULE}: g_idx"):
        open_checkpoint(write(tmp_path, {MODULE: parts}, packed_config())).load_linear(MODULE)
