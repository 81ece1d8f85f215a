"""compressed-tensors checkpoints: each way of packing loads exactly; what changes it is refused."""

import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compressed_tensors import group, packed_config, packed_tensors, packed_weight, scheme
from synthetic_checkpoints import write

from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.inspect import describe
from jax_marlin.weights import MarlinLinear

MODULE = "model.layers.0.mlp.gate_proj"


def load(path, module=MODULE):
    with open_checkpoint(path) as checkpoint:
        w = checkpoint.load_linear(module, jnp.float32)
    assert isinstance(w, MarlinLinear)
    return w


def write_one(path, parts, **weights):
    return write(path, {MODULE: parts}, packed_config(group(weights=scheme(**weights))))


def assert_exact(w, parts, bits=4, group_size=32):
    expected = packed_weight(parts, bits, group_size).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(w.dequantize()), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k", "n", "group_size"), [(64, 96, 32), (77, 51, 64), (33, 70, -1)])
def test_weight_equals_the_slow_decoder(tmp_path, bits, symmetric, k, n, group_size):
    sizes = {"bits": bits, "group_size": group_size}
    parts = packed_tensors(k, k, n, symmetric=symmetric, **sizes)
    written = {"group_size": group_size}
    if group_size == -1:
        written = {"strategy": "channel", "group_size": None}
    w = load(write_one(tmp_path, parts, num_bits=bits, symmetric=symmetric, **written))
    assert w.shape == (k, n)
    assert (w.stack.zero_points is None) == symmetric
    assert_exact(w, parts, **sizes)


@pytest.mark.parametrize("actorder", [None, "weight", "static"])
def test_actorder_that_stores_no_order(tmp_path, actorder):
    parts = packed_tensors(1, 96, 40)
    w = load(write_one(tmp_path, parts, actorder=actorder))
    assert w.stack.perm is None
    assert_exact(w, parts)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("actorder", ["group", "dynamic"])
def test_actorder_group_gathers_by_g_idx(tmp_path, bits, actorder):
    parts = packed_tensors(2, 96, 40, bits=bits, symmetric=False, act_order=True)
    w = load(write_one(tmp_path, parts, num_bits=bits, symmetric=False, actorder=actorder))
    assert w.stack.perm is not None
    assert_exact(w, parts, bits)


def test_g_idx_of_minus_one_means_none(tmp_path):
    parts = packed_tensors(3, 96, 40) | {"weight_g_idx": np.full(96, -1, np.int32)}
    path = write_one(tmp_path, parts)
    assert load(path).stack.perm is None
    assert_exact(load(path), parts)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.can_fuse([(MODULE, MODULE)])


def test_symmetric_with_zero_points_stored(tmp_path):
    parts = packed_tensors(4, 64, 40)
    middle = np.full((5, 2), 0x88888888, np.uint32).view(np.int32)
    w = load(write_one(tmp_path / "middle", parts | {"weight_zero_point": middle}))
    assert w.stack.zero_points is None
    # a 7 is what GPTQ would write; here it means a zero point of -1
    below = np.full((5, 2), 0x77777777, np.uint32).view(np.int32)
    path = write_one(tmp_path / "below", parts | {"weight_zero_point": below})
    with pytest.raises(ValueError, match=rf"{MODULE}: weight_zero_point holds other values than 0"):
        load(path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_bias_and_dtype_of_the_scales(tmp_path, dtype):
    parts = packed_tensors(5, 64, 72, bias=True, dtype=dtype)
    with open_checkpoint(write_one(tmp_path, parts)) as checkpoint:
        w = checkpoint.load_linear(MODULE)
    assert isinstance(w, MarlinLinear)
    assert w.dtype == dtype
    bias = np.asarray(w(jnp.zeros((3, 64), w.dtype)), np.float32)[1]
    np.testing.assert_array_equal(bias, parts["bias"].astype(np.float32))


def test_groups_by_exact_name_then_regex_then_class(tmp_path):
    wide = scheme(num_bits=8, group_size=None, strategy="channel")
    zeros = scheme(symmetric=False, group_size=64)
    groups = [group(), group(["re:.*down"], weights=zeros), group(["a.down_proj"], weights=wide)]
    modules = {
        "a.down_proj": packed_tensors(1, 64, 40, bits=8, group_size=-1),
        "b.down_proj": packed_tensors(2, 128, 40, group_size=64, symmetric=False),
        "b.up_proj": packed_tensors(3, 64, 40),
        "b.mlp.gate": {"weight": np.ones((3, 64), np.float16)},
    }
    config = packed_config(*groups, format="mixed-precision")
    path = write(tmp_path, modules, config)
    sizes = {"a.down_proj": (8, -1), "b.down_proj": (4, 64), "b.up_proj": (4, 32)}
    for module, size in sizes.items():
        assert_exact(load(path, module), modules[module], *size)
    assert open_checkpoint(path).modules["b.mlp.gate"].kind == "dense"
    assert "zero points" in describe(path)


def test_targets_that_miss_or_contradict(tmp_path):
    parts = {MODULE: packed_tensors(1, 64, 40)}
    # re.match is anchored on the left: this one misses
    path = write(tmp_path / "miss", parts, packed_config(group(["re:mlp"])))
    with pytest.raises(ValueError, match=rf"module {MODULE} is packed, and 0 schemes"):
        open_checkpoint(path)
    twice = [group(["re:.*mlp"]), group(["re:.*gate"], weights=scheme(symmetric=False))]
    path = write(tmp_path / "two", parts, packed_config(*twice))
    with pytest.raises(ValueError, match=rf"module {MODULE} is packed, and 2 schemes"):
        open_checkpoint(path)
    same = [group(["re:.*mlp"]), group(["re:.*gate"])]
    assert load(write(tmp_path / "same", parts, packed_config(*same))).shape == (64, 40)


def test_experts_of_one_stack(tmp_path):
    names = [f"experts.{e}.w1" for e in range(3)]
    linears = [packed_tensors(e, 64, 72, symmetric=e != 1, act_order=e == 2) for e in range(3)]
    weights = scheme(symmetric=False)
    config = packed_config(group(weights=scheme()), group(["experts.1.w1"], weights=weights))
    path = write(tmp_path, dict(zip(names, linears, strict=True)), config)
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint.can_fuse([names])  # expert 2 gathers in an order of its own
        assert checkpoint.can_fuse([names[:2]])
        stack = checkpoint.load_expert_stack(names, jnp.float32)
    expected = np.stack([packed_weight(parts, 4, 32) for parts in linears]).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(stack.dequantize()), expected)


def test_dynamic_activations_warn_once_and_count_as_weight_only(tmp_path):
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    modules = {f"{name}.proj": packed_tensors(1, 64, 40) for name in "ab"}
    path = write(tmp_path, modules, packed_config(group(input_activations=activations)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        w = load(path, "b.proj")
    assert len(caught) == 1
    assert "activations are to be quantized (group_0: input_activations)" in str(caught[0].message)
    assert_exact(w, modules["b.proj"])


@pytest.mark.parametrize(
    ("name", "bits", "size"),
    [("qwen3moe-ct-w4a16-sym-g128", 4, 128), ("qwen3moe-ct-w8a16-channel", 8, 128)],
)
def test_real_checkpoint_dequantizes_to_the_slow_decoder(find_checkpoint, name, bits, size):
    module = "model.layers.1.self_attn.k_proj"
    path = find_checkpoint(name)
    with open_checkpoint(path) as checkpoint:
        info = checkpoint.modules[module]
        parts = {part: checkpoint.tensor(f"{module}.{part}") for part in info.tensors}
    assert_exact(load(path, module), parts, bits, size)
