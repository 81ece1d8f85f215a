"""Peak memory of the default lowering: one dequantized expert, whatever the number of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.gptq import load_gptq_stacked
from jax_marlin.ops.matmul import matmul
from jax_marlin.ops.moe_align_block_size import moe_align_block_size
from jax_marlin.ops.moe_matmul import moe_matmul
from jax_marlin.quantize import quantize

E, K, N, TOP_K = 16, 512, 768, 2
ONE_EXPERT = K * N * 4  # float32
ALLOWED = 1.25 * ONE_EXPERT


@functools.cache
def stack(dtype="float32"):
    """Asymmetric and act-order: every leaf that the lowering reads is there."""
    rng = np.random.default_rng(0)
    return load_gptq_stacked(
        rng.integers(0, 2**31, (E, K // 8, N), np.int32),
        np.full((E, K // 128, N), 0.01, np.float32),
        rng.integers(0, 2**31, (E, K // 128, N // 8), np.int32),
        np.stack([rng.permutation(K) // 128 for _ in range(E)]),
        bits=4,
        group_size=128,
        dtype=jnp.dtype(dtype),
    )


def temp_bytes(function, *arguments) -> int:
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 32, 2048])
def test_moe_matmul_holds_one_expert(tokens, dtype):
    def layer(x, experts, topk_ids):
        routing = moe_align_block_size(topk_ids, 16, E)
        return moe_matmul(x, experts, *routing, moe_block_size=16, top_k=TOP_K)

    x = jax.ShapeDtypeStruct((tokens, K), jnp.dtype(dtype))
    ids = jax.ShapeDtypeStruct((tokens, TOP_K), jnp.int32)
    used = temp_bytes(layer, x, stack(dtype), ids)
    routing = 64 * tokens * TOP_K  # the tables of moe_align_block_size, and its sort
    block = 4 * (16 * (K + N) + 2 * K // 128 * N)  # rows and scales of one block in float32
    out = 0 if dtype == "float32" else 2 * tokens * TOP_K * N  # collected as 16-bit words
    assert used <= ALLOWED + routing + block + out, f"{used / ONE_EXPERT:.2f} experts"


@pytest.mark.parametrize("symmetric", [True, False])
def test_small_groups_of_many_experts_are_not_widened_together(symmetric):
    """bfloat16 scales of 64 experts, in float32 two (with zero points four) dequantized ones."""

    def layer(x, experts, topk_ids):
        routing = moe_align_block_size(topk_ids, 16, 64)
        return moe_matmul(x, experts, *routing, moe_block_size=16, top_k=TOP_K)

    w = np.zeros((64, K, N), np.float32)
    experts = quantize(w, group_size=32, symmetric=symmetric, dtype=jnp.bfloat16)
    used = temp_bytes(layer, jnp.ones((4, K), jnp.bfloat16), experts, jnp.zeros((4, 2), jnp.int32))
    assert used <= ALLOWED, f"{used / ONE_EXPERT:.2f} experts"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 2048])
def test_matmul_holds_one_expert(tokens, dtype):
    x = jax.ShapeDtypeStruct((tokens, K), jnp.dtype(dtype))
    e = jax.ShapeDtypeStruct((), jnp.int32)
    used = temp_bytes(lambda x, experts, e: matmul(x, experts[e]), x, stack(dtype), e)
    gathered_x = 2 * x.dtype.itemsize * tokens * K  # act-order, and the loop's own copy
    rows = 4 * min(tokens, 256) * (K + N)  # in float32, a few at once
    assert used <= ALLOWED + gathered_x + rows, f"{used / ONE_EXPERT:.2f} experts"


def test_mapped_experts_are_dequantized_one_at_a_time():
    x = jax.ShapeDtypeStruct((3, K), jnp.float32)
    used = temp_bytes(lambda x, experts: jax.vmap(lambda w: matmul(x, w))(experts), x, stack())
    assert used <= ALLOWED, f"{used / ONE_EXPERT:.2f} experts"
