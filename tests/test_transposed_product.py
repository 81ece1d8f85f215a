"""The product behind every gradient of x: values, memory, and what it becomes on CUDA."""

import re
from typing import Any

import extension_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import Problem, build
from test_memory import ALLOWED, ONE_EXPERT, TOP_K, E, K, N, stack, temp_bytes

import jax_marlin as jm
from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.ops import ffi_targets
from jax_marlin.ops.transposed_product import (
    kernel_block_size,
    rows_at_once,
    transposed_product,
)

FLOAT32 = np.dtype(np.float32)


@pytest.mark.parametrize("g_idx", ["none", "shared", "per_expert"])
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
def test_rows_of_mixed_experts(g_idx, dense):
    problem = Problem("transposed", k=96, n=136, group_size=32, num_experts=4, zeros="v1",
                      dtype="float32", g_idx=g_idx)  # fmt: skip
    case = build(problem)
    experts = case.stack()
    if dense:
        experts = DenseExpertStack(experts.dequantize())
    ids = np.array([3, 0, -1, 3, 2, 0, 4, 3, 2**31 - 1, 0, -(2**31)], np.int32)
    g = np.random.default_rng(0).standard_normal((len(ids), 136)).astype(np.float32)
    exact, budget = np.zeros((2, len(ids), 96))
    for row, e in enumerate(ids):
        if 0 <= e < 4:
            exact[row] = case.weights[e] @ g[row].astype(np.float64)
            budget[row] = oracle.matmul_budget(np.abs(g[row]), case.weights[e].T, "float32")
    out = transposed_product(jnp.asarray(g), jnp.asarray(ids), experts, out_dtype=FLOAT32)
    oracle.assert_within(out, exact, budget)


def test_rows_at_once():
    """As the forward pass where experts have few rows; whole tiles of tensor cores where many."""
    assert [rows_at_once(m, 8) for m in (0, 8, 100, 512, 4096, 16384, 10**6)] == [
        8, 8, 16, 128, 256, 512, 512
    ]  # fmt: skip


def test_blocks_of_the_kernel():
    """Experts share rows unevenly, and one alone has what it has; tiles end at 64."""
    assert [kernel_block_size(m, 1) for m in (1, 8, 9, 32, 33, 64, 4096)] == [
        8, 8, 16, 32, 64, 64, 64
    ]  # fmt: skip
    assert [kernel_block_size(m, 8) for m in (8, 100, 4096)] == [4, 16, 64]


def gradient_bytes(function, tokens, dtype, *arguments) -> int:
    """Temporary bytes of a jitted pull-back alone."""
    x = jax.ShapeDtypeStruct((tokens, K), jnp.dtype(dtype))
    g = jax.eval_shape(function, x, *arguments)
    backward = lambda g, x, *rest: jax.vjp(lambda x: function(x, *rest), x)[1](g)[0]  # noqa: E731
    return temp_bytes(backward, g, x, *arguments)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 32, 2048])
def test_gradient_of_moe_matmul_holds_one_expert(tokens, dtype):
    def layer(x, experts, topk_ids, weights):
        routing = jm.moe_align_block_size(topk_ids, 16, E)
        return jm.moe_matmul(
            x, experts, *routing, moe_block_size=16, top_k=TOP_K, topk_weights=weights
        )

    ids = jax.ShapeDtypeStruct((tokens, TOP_K), jnp.int32)
    weights = jax.ShapeDtypeStruct((tokens, TOP_K), jnp.float32)
    used = gradient_bytes(layer, tokens, dtype, stack(dtype), ids, weights)
    rows = tokens * TOP_K
    size = rows_at_once(rows, E)
    block = 4 * (2 * size * (K + N) + 2 * K // 128 * N)
    allowed = ALLOWED + 4 * rows * K + 2 * rows * N + 128 * rows + block + 4 * tokens * K
    assert used <= allowed, f"{used / ONE_EXPERT:.2f} experts, {allowed / ONE_EXPERT:.2f} allowed"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 2048])
def test_gradient_of_matmul_holds_one_expert(tokens, dtype):
    e = jax.ShapeDtypeStruct((), jnp.int32)
    used = gradient_bytes(lambda x, w, e: jm.matmul(x, w[e]), tokens, dtype, stack(dtype), e)
    out = 8 * tokens * K  # the result, and what its rows are gathered from
    allowed = ALLOWED + out + 2 * tokens * N + 128 * tokens + 8 * 512 * (K + N)
    assert used <= allowed, f"{used / ONE_EXPERT:.2f} experts, {allowed / ONE_EXPERT:.2f} allowed"


def test_more_experts_take_no_more_memory():
    """The memory of one expert, whether there are 4 or 16."""
    ids = jnp.zeros((64,), jnp.int32)
    used = [
        temp_bytes(
            lambda g, experts: transposed_product(g, ids, experts, out_dtype=FLOAT32),
            jax.ShapeDtypeStruct((64, N), jnp.float32),
            stack()[:experts],
        )
        for experts in (4, 16)
    ]
    assert used[1] <= used[0]  # blocks of fewer rows


@pytest.fixture
def extension(monkeypatch):
    if ffi_targets.cuda_unavailable_reason() is not None:
        extension_stand_in.install(monkeypatch, extension_stand_in.stand_in())


def lowered_for_cuda(dtype, implementation=None, dense=False) -> str:
    g = jax.ShapeDtypeStruct((2048, N), jnp.dtype(dtype))
    ids = jax.ShapeDtypeStruct((2048,), jnp.int32)
    function = lambda g, ids, experts: transposed_product(  # noqa: E731
        g, ids, experts, out_dtype=FLOAT32, implementation=implementation
    )
    experts: Any = stack(dtype)
    if dense:
        weight: Any = jax.ShapeDtypeStruct((E, K, N), jnp.dtype(dtype))
        experts = DenseExpertStack(weight)
    traced = jax.jit(function).trace(g, ids, experts)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_call_on_cuda(dtype, extension):
    """The packed stack is an operand as it is, whatever it is dequantized to is in registers."""
    text = lowered_for_cuda(dtype)
    assert text.count("@jax_marlin_transposed_product_v1") == 1
    assert text.count("@jax_marlin_moe_align_block_size_v1") == 1
    assert "dot_general" not in text and "while" not in text
    assert not re.search(rf"tensor<{K}x{N}x|tensor<{E}x{K}x{N}x", text)


@pytest.mark.parametrize(("dtype", "short"), [("float16", "f16"), ("bfloat16", "bf16")])
def test_dense_experts_take_tensor_cores_on_cuda(dtype, short, extension):
    """16-bit operands and float32 sums, one expert after the other."""
    text = lowered_for_cuda(dtype, dense=True)
    (product,) = re.findall(r"dot_general.*: \((.*)\) -> tensor<(.*)>", text)
    rows = rows_at_once(2048, E)
    assert product == (f"tensor<{rows}x{N}x{short}>, tensor<{K}x{N}x{short}>", f"{rows}x{K}xf32")
    assert "jax_marlin_moe_align_block_size_v1" in text


def test_float32_products_on_cuda_when_asked_or_alone(extension):
    for text in (lowered_for_cuda("bfloat16", "xla"), lowered_for_cuda("float32")):
        (line,) = re.findall(r"dot_general.*", text)
        assert "HIGHEST" in line and "f16" not in line
