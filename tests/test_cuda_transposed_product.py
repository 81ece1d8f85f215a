"""On a GPU: x W^T from packed weights, the product behind gradients of x, at every tile it has."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from layers import bits as bits_of
from problems import Problem, build
from test_cuda_runtime import fill_free_memory_with_nan

from jax_marlin.ops.transposed_product import kernel_block_size, transposed_product

pytestmark = pytest.mark.cuda

FLOAT32 = np.dtype(np.float32)
BLOCKS = {1: 8, 12: 16, 20: 32, 50: 64, 100: 64}  # slots, by rows an expert


def rows_of(case, per_expert: int, dtype: str, seed: int = 0):
    """Cotangents and shuffled ids: experts of more and fewer rows, one of none, rows of nobody."""
    rng = np.random.default_rng(seed)
    shares = np.array([1.6, 0.0, 0.3, 2.1]) * per_expert
    ids = np.repeat(np.arange(4), np.maximum(shares, 1).astype(int) * (shares > 0))
    ids = np.concatenate([ids, [-1, 4, 2**31 - 1, -(2**31)]]).astype(np.int32)
    rng.shuffle(ids)
    g = rng.standard_normal((len(ids), case.weights.shape[2])).astype(dtype)
    g[(ids < 0) | (ids > 3)] = np.nan
    return g, ids


def check(out, g, ids, weights, dtype):
    """Against float64; the kernel rounds weights to `dtype`, as it does in the forward pass."""
    exact, budget = np.zeros((2, len(ids), weights.shape[1]))
    for row, expert in enumerate(ids):
        if 0 <= expert < len(weights):
            one, weight = g[row].astype(np.float64), weights[expert].T
            exact[row] = one @ weight
            budget[row] = oracle.matmul_budget(one, weight, dtype)
    oracle.assert_within(out, exact, budget)


@pytest.mark.parametrize("per_expert", list(BLOCKS))
@pytest.mark.parametrize("zeros", ["symmetric", "v1"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_format_and_tile_in_poisoned_memory(dtype, bits, zeros, per_expert):
    """K and N off the tile, groups of 32; twice, bit for bit, results and scratch full of NaN."""
    problem = Problem(
        f"transposed_{per_expert}", k=352, n=712, group_size=32, num_experts=4, zeros=zeros,
        bits=bits, dtype=dtype,
    )  # fmt: skip
    case = build(problem)
    g, ids = rows_of(case, per_expert, dtype)
    assert kernel_block_size(len(ids), 4) == BLOCKS[per_expert]
    product = jax.jit(lambda g, ids, w: transposed_product(g, ids, w, out_dtype=FLOAT32))
    operands = jnp.asarray(g), jnp.asarray(ids), case.stack()
    first = np.asarray(product(*operands))
    fill_free_memory_with_nan()
    out = product(*operands)
    assert (bits_of(out) == bits_of(first)).all()
    check(out, g, ids, case.weights, dtype)


@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("per_expert", [1, 50])
def test_groups_of(group_size, per_expert):
    """A warp's columns in one group, in two, and the last one short."""
    problem = Problem(
        "transposed_groups", k=448, n=200, group_size=group_size, num_experts=4, zeros="v2",
        dtype="bfloat16",
    )  # fmt: skip
    case = build(problem)
    g, ids = rows_of(case, per_expert, "bfloat16")
    out = transposed_product(jnp.asarray(g), jnp.asarray(ids), case.stack(), out_dtype=FLOAT32)
    check(out, g, ids, case.weights, "bfloat16")


@pytest.mark.parametrize("rows", [1, 9, 33, 130])
@pytest.mark.parametrize(("n", "k"), [(4096, 128), (11008, 320), (1088, 4160)])
def test_long_sums_in_parts(n, k, rows):
    """Blocks share a long sum, in a cluster where there are any; the last part may be empty."""
    problem = Problem("transposed_long", k=k, n=n, group_size=64, num_experts=1, dtype="bfloat16")
    case = build(problem)
    g = np.random.default_rng(3).standard_normal((rows, n)).astype("bfloat16")
    ids = np.zeros(rows, np.int32)
    operands = jnp.asarray(g), jnp.asarray(ids), case.stack()
    fill_free_memory_with_nan()
    for one_expert in (False, True):
        out = transposed_product(*operands, out_dtype=np.dtype("bfloat16"), one_expert=one_expert)
        check(out, g, ids, case.weights, "bfloat16")


@pytest.mark.parametrize("g_idx", ["shared", "per_expert"])
def test_act_order(g_idx):
    problem = Problem(
        "transposed_act_order", k=192, n=136, num_experts=4, group_size=32, g_idx=g_idx, zeros="v1"
    )
    case = build(problem)
    g, ids = rows_of(case, 12, "float16")
    out = transposed_product(jnp.asarray(g), jnp.asarray(ids), case.stack(), out_dtype=FLOAT32)
    check(out, g, ids, case.weights, "float16")


@pytest.mark.parametrize("first", [0, 64, 192])
def test_columns_of_a_view(first):
    """The sum starts at a column tile of the stack and ends inside another."""
    problem = Problem("transposed_view", k=160, n=328, num_experts=4, group_size=32)
    case = build(problem)
    g, ids = rows_of(case, 6, "float16")
    g = g[:, first : first + 104]
    out = transposed_product(
        jnp.asarray(g), jnp.asarray(ids), case.stack(), out_dtype=FLOAT32, first_column=first
    )
    check(out, g, ids, case.weights[:, :, first : first + 104], "float16")


def test_float32_cotangents_are_rounded_to_the_compute_dtype():
    case = build(Problem("transposed_wide", k=128, n=192, num_experts=4, dtype="bfloat16"))
    g, ids = rows_of(case, 6, "float32")
    narrow = jnp.asarray(g).astype(jnp.bfloat16)
    wide, same = (
        transposed_product(rows, jnp.asarray(ids), case.stack(), out_dtype=FLOAT32)
        for rows in (jnp.asarray(g), narrow)
    )
    assert (bits_of(wide) == bits_of(same)).all()
    check(wide, np.asarray(narrow), ids, case.weights, "bfloat16")
