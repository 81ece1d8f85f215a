"""What is lowered for CUDA: targets, attributes, operands and fallbacks, without a GPU.

Uses the real `_jax_marlin` where it is installed and a stand-in elsewhere: lowering asks the module
only for its versions and for scratch sizes.
"""

import re
from typing import Any

import extension_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import Mesh, PartitionSpec

import jax_marlin as jm
from jax_marlin.ops import ffi_targets
from jax_marlin.ops.matmul import matmul
from jax_marlin.ops.moe_align_block_size import moe_align_block_size
from jax_marlin.ops.moe_ffn import moe_ffn
from jax_marlin.ops.moe_matmul import Routing, routed_matmul


@pytest.fixture
def extension(monkeypatch):
    if ffi_targets.cuda_unavailable_reason() is not None:
        extension_stand_in.install(monkeypatch, extension_stand_in.stand_in())


def lowered(function, *arguments, platforms=("cuda",)) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()


def custom_call(text: str, target: str) -> tuple[dict[str, int], list[str], list[str]]:
    """(attributes, operand types, result types) of the only call of `target`."""
    (line,) = [line for line in text.splitlines() if f"@{target}(" in line]
    attributes = re.search(r"mhlo.backend_config = \{(.*?)\}", line)
    signature = re.search(r"\} : \((.*)\) -> (.*)$", line)
    assert attributes and signature
    types_of = lambda part: re.findall(r"tensor<([^>]*)>", part)  # noqa: E731
    pairs = re.findall(r"(\w+) = (-?\d+) : i64", attributes[1])
    return {k: int(v) for k, v in pairs}, types_of(signature[1]), types_of(signature[2])


def linear(**changes):
    problem = problems.Problem("lowered", m=7, k=96, n=200, group_size=32, **changes)
    case = problems.build(problem)
    return jnp.asarray(case.x), case.stack()


def test_matmul(extension):
    x, stack = linear(zeros="v1", bias=True, g_idx="per_expert")
    text = lowered(lambda x, stack: matmul(x, stack[1][:, 128:]), x, stack)
    attributes, operands, results = custom_call(text, "jax_marlin_matmul_v1")
    assert attributes == {"bits": 4, "k": 96, "group_size": 32, "first_tile": 2}
    assert operands == [
        "7x96xf16", "3x4x2x512xui32", "3x4x3x64xf16", "3x4x3x64xf16", "3x200xf16", "i32"
    ]  # fmt: skip
    assert results[0] == "7x72xf16" and results[1].endswith("xui8") and len(results) == 2


def test_matmul_without_optional_operands(extension):
    x, stack = linear(dtype="bfloat16", bits=8)
    text = lowered(lambda x, w: matmul(x, w, preferred_element_type=jnp.float32), x, stack[0])
    attributes, operands, results = custom_call(text, "jax_marlin_matmul_v1")
    assert attributes == {"bits": 8, "k": 96, "group_size": 32, "first_tile": 0}
    assert operands[1:] == ["3x4x2x1024xui32", "3x4x3x64xbf16", "0xbf16", "0xbf16", "i32"]
    assert results[0] == "7x200xf32"


def test_rows_of_x_are_aligned(extension):
    case = problems.build(problems.Problem("odd", m=7, k=100, n=64, group_size=-1, bits=8))
    text = lowered(matmul, jnp.asarray(case.x), case.stack()[0])
    attributes, operands, _ = custom_call(text, "jax_marlin_matmul_v1")
    assert operands[0] == "7x104xf16" and attributes["k"] == 100


def test_own_bias_has_rank_one(extension):
    x, stack = linear(bias=True)
    w = stack.make_expert_linear(200 + 64, 64, jnp.zeros(64, jnp.float16))
    _, operands, _ = custom_call(lowered(matmul, x, w), "jax_marlin_matmul_v1")
    assert operands[4] == "64xf16"


def routed(x, stack, topk_ids, **options):
    routing = moe_align_block_size(topk_ids, 8, 3)
    return routed_matmul(x, stack, Routing(*routing), moe_block_size=8, top_k=2, **options)


IDS = np.zeros((7, 2), np.int32)
WEIGHTS = np.ones((7, 2), np.float32)


def test_moe_matmul(extension):
    x, stack = linear(zeros="v2", bias=True, g_idx="per_expert")

    def layer(x, stack, ids, weights):
        return routed(
            x, stack, ids, topk_weights=weights, weights_before_bias=True, zero_output=False,
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    text = lowered(layer, x, stack, jnp.asarray(IDS), WEIGHTS)
    attributes, operands, results = custom_call(text, "jax_marlin_moe_matmul_v1")
    assert attributes == {
        "bits": 4, "k": 96, "group_size": 32, "moe_block_size": 8, "top_k": 2,
        "weights_before_bias": 1, "zero_output": 0,
    }  # fmt: skip
    slots, blocks = operands[6], operands[7]
    assert operands == [
        "7x96xf16", "3x4x2x512xui32", "3x4x3x64xf16", "3x4x3x64xf16", "3x96xi32", "3x200xf16",
        slots, blocks, "1xi32", "14xf32",
    ]  # fmt: skip
    assert results[0] == "14x200xf32" and results[1].endswith("xui8")
    assert results[2] == "14x96xf16"  # room to gather each routed row by its expert's order
    custom_call(text, "jax_marlin_moe_align_block_size_v1")


def layer_stacks(intermediate=96, k=96, **changes):
    """gate_up [3, K, 2I] and down [3, I, 200]."""
    size: dict[str, Any] = {"m": 7, "group_size": 32} | changes
    gate_up = problems.build(problems.Problem("gate_up", k=k, n=2 * intermediate, **size))
    down = problems.build(problems.Problem("down", k=intermediate, n=200, **size))
    return jnp.asarray(gate_up.x), gate_up.stack(), down.stack()


def run_layer(x, gate_up, down, **options):
    return moe_ffn(x, jnp.asarray(IDS[: len(x)]), jnp.asarray(WEIGHTS[: len(x)]), gate_up, down)


def test_moe_ffn_is_one_call(extension):
    text = lowered(run_layer, *layer_stacks(zeros="v1", bias=True, g_idx="per_expert"))
    attributes, operands, results = custom_call(text, "jax_marlin_moe_ffn_v1")
    assert text.count("stablehlo.custom_call") == 1
    assert attributes == {
        "gate_up_bits": 4, "gate_up_group_size": 32, "down_bits": 4, "down_group_size": 32,
        "k": 96, "intermediate": 96, "moe_block_size": 8, "activation": 1, "weights_on_input": 0,
    }  # fmt: skip
    assert operands[:3] == ["7x96xf16", "7x2xi32", "7x2xf32"]
    assert operands[3:8] == [
        "3x3x2x512xui32", "3x3x3x64xf16", "3x3x3x64xf16", "3x96xi32", "3x192xf16"
    ]  # fmt: skip
    assert results[:5] == ["7x200xf16", "14x96xf16", "14x200xf32", "14x96xf16", "14x96xf16"]
    assert results[7] == "1xi32" and results[8].endswith("xui8") and len(results) == 9


@pytest.mark.parametrize(
    ("dtype", "m", "block", "hidden", "rows"),
    [
        ("bfloat16", 43, 32, "86x96xbf16", "86x200xf32"),
        ("bfloat16", 44, 64, "88x96xbf16", "88x200xbf16"),
        # A row may be larger than float16 holds while the sum is not.
        ("float16", 44, 64, "88x96xf16", "88x200xf32"),
        ("bfloat16", 768, 144, "1536x96xbf16", "1536x200xbf16"),
    ],
)
def test_rows_of_a_layer_of_many_tokens(dtype, m, block, hidden, rows, extension):
    """Narrow before their sum, and by route where blocks are not of 256."""

    def layer(x, *stacks):
        ids = jnp.zeros((m, 2), jnp.int32)
        return moe_ffn(x, ids, ids.astype(jnp.float32), *stacks)

    attributes, _, results = custom_call(
        lowered(layer, *layer_stacks(m=m, dtype=dtype)), "jax_marlin_moe_ffn_v1"
    )
    assert attributes["moe_block_size"] == block and results[1:3] == [hidden, rows]


def test_layers_of_many_columns_come_in_the_order_of_slots(extension):
    """Blocks of 256: beside 1,536 routes 255 slots of padding for each of 3 experts."""

    def layer(x, *stacks):
        ids = jnp.zeros((768, 2), jnp.int32)
        return moe_ffn(x, ids, ids.astype(jnp.float32), *stacks)

    stacks = layer_stacks(m=768, dtype="bfloat16", intermediate=2048, k=512)
    attributes, _, results = custom_call(lowered(layer, *stacks), "jax_marlin_moe_ffn_v1")
    # x takes 2,301 slots of 512, in place of which rows of 200 come before their sum.
    assert attributes["moe_block_size"] == 256
    assert results[1:3] == ["2301x2048xbf16", "5891x200xbf16"]


def test_layers_that_one_call_cannot_take_are_composed(extension):
    x, gate_up, down = layer_stacks()
    odd = layer_stacks(intermediate=72, group_size=-1)
    pair = [s.dequantize()[:, :, :96] for s in (gate_up, gate_up)]
    gate, up = (jm.quantize(np.asarray(w), group_size=32, dtype=jnp.float16) for w in pair)
    for arguments in (odd, (x, (gate, up), down)):
        text = lowered(run_layer, *arguments)
        assert "jax_marlin_moe_ffn_v1" not in text and "jax_marlin_moe_matmul_v1" in text


def test_shared_permutation_needs_no_gathered_rows(extension):
    x, stack = linear(g_idx="shared")
    text = lowered(routed, x, stack, jnp.asarray(IDS))
    attributes, operands, results = custom_call(text, "jax_marlin_moe_matmul_v1")
    assert attributes["zero_output"] == 1 and attributes["weights_before_bias"] == 0
    assert operands[3:6] == ["0xf16", "0xi32", "0xf16"] and operands[9] == "0xf32"
    assert results[2] == "0xf16"


def test_no_packed_leaf_is_copied_on_the_way(extension):
    """Views, scans over experts and vmap hand the whole leaf to the call."""
    x, stack = linear()
    whole = "3x4x2x512xui32"
    programs = [
        (lambda x, s, e: matmul(x, s[e][:, 64:128]), x, stack, jnp.int32(1)),
        (lambda x, s: jax.vmap(lambda w: matmul(x, w))(s), x, stack),
        (lambda x, s: jax.lax.map(lambda e: matmul(x, s[e]), jnp.arange(3)), x, stack),
    ]
    for function, *arguments in programs:
        text = lowered(function, *arguments)
        assert custom_call(text, "jax_marlin_matmul_v1")[1][1] == whole
        moved = r"stablehlo\.(slice|dynamic_slice|gather|transpose|concatenate)\b.*xui32>"
        assert not re.search(moved, text)


def test_float32_xla_and_empty_calls_take_the_default(extension):
    x, stack = linear()
    texts = [
        lowered(matmul, x.astype(jnp.float32), stack[0].astype(jnp.float32)),
        lowered(lambda x, w: matmul(x, w, implementation="xla"), x, stack[0]),
        lowered(matmul, x[:0], stack[0]),
        lowered(routed, x[:0], stack, jnp.asarray(IDS[:0])),
    ]
    for text in texts:
        assert not re.search(r"@jax_marlin_(moe_)?matmul_v1", text)


def test_lowering_for_another_platform_takes_the_default(extension):
    x, stack = linear()
    for platform in ("cpu", "tpu", "rocm"):
        assert "jax_marlin_matmul_v1" not in lowered(matmul, x, stack[0], platforms=(platform,))


def test_cuda_by_name_on_another_platform_is_refused(extension):
    x, stack = linear()
    with pytest.raises(NotImplementedError, match=r"'cuda' was asked for, .* lowered for cpu"):
        lowered(lambda x: matmul(x, stack[0], implementation="cuda"), x, platforms=("cpu",))
    with pytest.raises(NotImplementedError, match=r"'cuda' was asked for, .* lowered for cpu"):
        lowered(lambda x: routed(x, stack, IDS, implementation="cuda"), x, platforms=("cpu",))
    text = lowered(lambda x: matmul(x, stack[0], implementation="cuda"), x)
    assert "jax_marlin_matmul_v1" in text


def test_shard_map(extension):
    x, stack = linear()
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    rows, whole = PartitionSpec("rows"), PartitionSpec()
    function = jax.shard_map(
        lambda x, s, ids: (matmul(x, s[0]), routed(x, s, ids)),
        mesh=mesh, in_specs=(rows, whole, rows), out_specs=rows,
    )  # fmt: skip
    text = lowered(function, x, stack, jnp.asarray(IDS))
    for name in ("matmul", "moe_matmul", "moe_align_block_size"):
        custom_call(text, f"jax_marlin_{name}_v1")


def test_symbolic_rows_export_for_both_platforms(extension):
    x, stack = linear()
    (rows,) = jax.export.symbolic_shape("rows")
    exported = jax.export.export(
        jax.jit(lambda x, ids: (matmul(x, stack[2]), routed(x, stack, ids))),
        platforms=["cpu", "cuda"],
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call(f"jax_marlin_{name}_v1")
            for name in ("matmul", "moe_matmul", "moe_align_block_size")
        ],
    )(
        jax.ShapeDtypeStruct((rows, 96), jnp.float16),
        jax.ShapeDtypeStruct((rows, 2), jnp.int32),
    )
    assert "jax_marlin_matmul_v1" in exported.mlir_module()
    y, z = exported.call(x[:3], jnp.asarray(IDS[:3]))
    np.testing.assert_array_equal(y, matmul(x[:3], stack[2]))
    np.testing.assert_array_equal(z, routed(x[:3], stack, IDS[:3]))


def test_without_the_extension_the_default_is_lowered(monkeypatch):
    extension_stand_in.install(monkeypatch, None)
    x, stack = linear()
    text = lowered(lambda x: (matmul(x, stack[0]), routed(x, stack, jnp.asarray(IDS))), x)
    assert "jax_marlin_" not in re.sub(r"loc\(.*", "", text)
