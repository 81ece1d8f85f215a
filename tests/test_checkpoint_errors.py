"""Modules and experts that do not fit together, or are not there: errors that name them."""

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic_checkpoints import MODULE, gptq_tensors, linear, quantization, write

from jax_marlin.checkpoints import open_checkpoint


def open_with(tmp_path, *, config=None, **changes):
    """A checkpoint of one linear whose parts are changed."""
    return open_checkpoint(write(tmp_path, {MODULE: linear(**changes)}, config or quantization()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, "has a qweight but no scales; is a shard missing"),
        ({"qweight": None}, "has scales and qzeros and g_idx but no qweight; is a shard missing"),
        (
            {"scales": np.ones((3, 96), np.float16)},
            r"scales has shape \(3, 96\), expected \(2, 96\)",
        ),
        ({"scales": np.ones((2, 96), np.int32)}, "scales is I32, expected F16 or BF16 or F32"),
        ({"qzeros": np.ones((2, 96), np.int32)}, r"qzeros has shape \(2, 96\), expected \(2, 12\)"),
        ({"g_idx": np.arange(65, dtype=np.int32)}, r"g_idx has shape \(65,\), expected \(64,\)"),
        ({"qweight": np.ones((8, 96), np.int16)}, "qweight is I16, expected I32 or U32"),
        ({"qweight": np.ones(768, np.int32)}, r"qweight has shape \(768,\), expected \(K \* bits"),
        (
            {"qweight": np.ones((0, 96), np.int32)},
            r"qweight has shape \(0, 96\), expected no empty axis",
        ),
        ({"bias": np.ones(95, np.float16)}, r"bias has shape \(95,\), expected \(96,\)"),
        ({"g_scale": np.ones(3, np.float16)}, r"unknown tensor .*\.g_scale beside a qweight"),
    ],
)
def test_module_whose_tensors_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"open_checkpoint: module {MODULE}:? ?{message}"):
        open_with(tmp_path, **changes)


@pytest.mark.parametrize("shape", [(1,), (95,), (96, 1), ()])
def test_bias_that_does_not_fit_a_dense_weight(tmp_path, shape):
    weight = np.ones((96, 64), np.float16)
    good = {"a": {"weight": weight, "bias": np.ones(96, np.float16)}}
    bias = open_checkpoint(write(tmp_path / "good", good)).bias("a")
    assert bias is not None and bias.shape == (96,)
    bad = {"a": {"weight": weight, "bias": np.ones(shape, np.float16)}}
    with pytest.raises(ValueError, match=r"^open_checkpoint: module a: bias has shape .*\(96,\)"):
        open_checkpoint(write(tmp_path / "bad", bad))


def test_config_of_another_export(tmp_path):
    with pytest.raises(
        ValueError, match="are bits and group_size of the quantization config right"
    ):
        open_with(tmp_path, config=quantization(group_size=64))
    with pytest.raises(
        ValueError, match="are bits and group_size of the quantization config right"
    ):
        open_with(tmp_path, config=quantization(bits=8))


def test_desc_act_needs_g_idx(tmp_path):
    with pytest.raises(
        ValueError, match=f"module {MODULE}: desc_act is true but there is no g_idx"
    ):
        open_with(tmp_path, config=quantization(desc_act=True), g_idx=None)
    # with one group for all of K the order is of no consequence
    parts, _ = gptq_tensors(1, 64, 96, group_size=-1)
    del parts["g_idx"]
    config = quantization(desc_act=True, group_size=-1)
    assert open_checkpoint(write(tmp_path, {MODULE: parts}, config)).has(MODULE)


def test_quantized_tensors_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=f"module {MODULE} has a qweight, but there is no quant"):
        open_checkpoint(write(tmp_path, {MODULE: linear()}))
    packed = {"weight_packed": np.ones((4, 8), np.int32)}
    with pytest.raises(
        NotImplementedError, match=r"a\.weight_packed is of a format that jax_marlin"
    ):
        open_checkpoint(write(tmp_path, {"a": packed}))


def test_names_that_are_not_there(tmp_path):
    checkpoint = open_with(tmp_path)
    with pytest.raises(ValueError, match=r"Checkpoint\.load_linear: .*no module model\.proj"):
        checkpoint.load_linear("model.proj")
    with pytest.raises(ValueError, match=r"Checkpoint\.tensor: .* has no tensor x"):
        checkpoint.tensor("x")
    with pytest.raises(ValueError, match=r"Checkpoint\.dense: .* has no tensor x"):
        checkpoint.dense("x")
    with pytest.raises(
        ValueError, match=r"Checkpoint\.dense: tensor .*qweight is I32, expected F16"
    ):
        checkpoint.dense(f"{MODULE}.qweight")


def experts(tmp_path, *linears, config=None):
    modules = {f"experts.{e}.proj": parts for e, parts in enumerate(linears) if parts}
    return open_checkpoint(write(tmp_path, modules, config or quantization())), [
        f"experts.{e}.proj" for e in range(len(linears))
    ]


def test_missing_experts_are_named(tmp_path):
    checkpoint, names = experts(tmp_path, linear(), None, linear(), None)
    with pytest.raises(
        ValueError, match=r"missing experts \[1, 3\] of 4, the first lacks experts\.1"
    ):
        checkpoint.load_expert_stack(names)
    with pytest.raises(ValueError, match=r"can_fuse: missing experts \[1, 3\] of 4"):
        checkpoint.can_fuse([(name,) for name in names])
    with pytest.raises(ValueError, match="expected at least one module for each expert"):
        checkpoint.load_expert_stack([])


def test_experts_that_differ(tmp_path):
    other = gptq_tensors(1, 64, 72)[0]
    checkpoint, names = experts(tmp_path, linear(), other)
    with pytest.raises(ValueError, match=r"experts\.1\.proj has K=64.*N=72, expected .*N=96"):
        checkpoint.load_expert_stack(names)
    with pytest.raises(ValueError, match="expert 1 has 1 modules, expected 2 as expert 0"):
        checkpoint.load_expert_stack([(names[0], names[0]), (names[0],)])
    wider = gptq_tensors(1, 64, 96, bits=8)[0]
    config = quantization(dynamic={"experts.1": {"bits": 8}})
    checkpoint, names = experts(tmp_path, linear(), wider, config=config)
    with pytest.raises(
        ValueError, match=r"bits=8, group_size=32, expected .*bits=4.*load_expert_stacks"
    ):
        checkpoint.load_expert_stack([names])


def test_scales_of_two_dtypes_need_a_choice(tmp_path):
    single = linear(scales=np.ones((2, 96), np.float32))
    checkpoint, names = experts(tmp_path, linear(), single)
    with pytest.raises(
        ValueError, match=r"experts\.1\.proj\.scales is F32, expected F16.*pass dtype="
    ):
        checkpoint.load_expert_stack(names)
    assert checkpoint.load_expert_stack(names, jnp.float32).dtype == jnp.float32


def test_experts_of_which_some_are_not_quantized(tmp_path):
    plain = {"weight": np.ones((96, 64), np.float16)}
    checkpoint, names = experts(tmp_path, linear(), plain)
    with pytest.raises(
        NotImplementedError, match=r"1 of 2 modules are not packed, .*experts\.1\.proj \(dense\)"
    ):
        checkpoint.load_expert_stack(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": np.full((2, 96), np.nan, np.float16)}, "scales"),
        ({"scales": np.full((2, 96), np.inf, np.float16)}, "scales"),
        ({"bias": np.full(96, np.inf, np.float16)}, "bias"),
        ({"g_idx": np.zeros(64, np.int32)}, "g_idx"),
        ({"g_idx": np.full(64, 2, np.int32)}, "g_idx"),
        ({"qzeros": np.full((2, 12), 0x12345678, np.int32)}, "symmetric|sym"),
    ],
)
def test_damaged_values_name_the_module(tmp_path, changes, message):
    with open_with(tmp_path, **changes) as checkpoint:
        with pytest.raises(ValueError, match=rf"module {MODULE}.*({message})"):
            checkpoint.load_linear(MODULE)


def test_weights_that_overflow_float16(tmp_path):
    plain = {"weight": np.array([[1.0, 1e6]], np.float32)}
    checkpoint = open_checkpoint(write(tmp_path, {"proj": plain}))
    with pytest.raises(ValueError, match=r"tensor proj\.weight \(float32\) overflows float16"):
        checkpoint.load_linear("proj", jnp.float16)
    assert checkpoint.load_linear("proj", jnp.bfloat16).shape == (2, 1)
