"""Products of experts whose rows of x stay in shared memory, at every tile that can hold them.

A test without a GPU pins which shape takes which tile; the tests with one then compare just these
shapes with the oracle.
"""

import jax.numpy as jnp
import oracle
import problems
import pytest
from moe_layers import build_layer, expected
from test_moe_matmul import row_budgets

import jax_marlin as jm
from jax_marlin.ops.moe_align_block_size import aligned_sizes, select_moe_block_size
from jax_marlin.ops.moe_matmul import Routing, routed_matmul

H100 = {"sm_count": 132, "has_wgmma": True}
# Row of the tile table to (m, top_k, num_experts, n, moe_block_size).
PRODUCTS = {
    0: (9, 2, 5, 136, 8),
    1: (700, 1, 3, 136, 8),
    2: (520, 2, 3, 136, 8),
    4: (21, 2, 5, 136, 16),
    5: (60, 2, 9, 264, 16),
}
# The same to (m, top_k, num_experts, intermediate); a single token needs no routing tables. Many
# blocks of 16 rows are wgmma's.
LAYERS = {
    "0_without_tables": (1, 3, 3, 64),
    "0": (2, 2, 9, 192),
    "1_without_tables": (1, 3, 3, 2048),
    "1": (9, 2, 9, 1024),
    "2": (9, 2, 9, 2048),
    "4": (9, 3, 3, 64),
    "5": (9, 3, 3, 512),
}
# K that ends inside a tile, in a group of half a tile; one group of all K; groups of two tiles, the
# last of them short, and long K, which is split where columns are few.
WEIGHTS = {
    "group_32": {"k": 96, "group_size": 32, "dtype": "float16"},
    "8bit_channelwise": {
        "k": 200, "group_size": -1, "dtype": "bfloat16", "bits": 8, "zeros": "v1",
    },
    "group_128": {"k": 1344, "group_size": 128, "dtype": "bfloat16", "zeros": "v2"},
}  # fmt: skip

PRODUCT_CASES = [
    pytest.param(tile, weights, id=f"{tile}-{kind}")
    for tile in PRODUCTS
    for kind, weights in WEIGHTS.items()
]

# Eight bits leave down's blocks room beside narrower ones.
LAYER_CASES = [
    pytest.param(name, weights, id=f"{name}-{kind}")
    for name in LAYERS
    for kind, weights in WEIGHTS.items()
    if (name, kind) != ("1_without_tables", "8bit_channelwise")
]


def group_size(weights):
    return weights["k"] if weights["group_size"] < 0 else weights["group_size"]


def bits(weights):
    return weights.get("bits", 4)


@pytest.mark.parametrize(("tile", "weights"), PRODUCT_CASES)
def test_products_take_the_tile_and_stay(tile, weights):
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    m, top_k, num_experts, n, block = PRODUCTS[tile]
    slots, _ = aligned_sizes((m, top_k), block, num_experts)
    sizes = (slots, block, weights["k"], n)
    choice = extension.select_tile(
        *sizes, bits(weights), routes=m * top_k, num_experts=num_experts, **H100
    )
    assert choice["kernel"] == "mma" and choice["tile"] == tile
    stays = extension.select_residence(
        tile, *sizes, group_size=group_size(weights), bits=bits(weights)
    )
    assert stays["rows"] == block


@pytest.mark.parametrize(("name", "weights"), LAYER_CASES)
def test_layers_take_the_tile_and_stay(name, weights):
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    m, top_k, num_experts, intermediate = LAYERS[name]
    block = select_moe_block_size(m, top_k, num_experts)
    slots, _ = aligned_sizes((m, top_k), block, num_experts)
    choice = extension.select_layer(
        m, top_k=top_k, num_experts=num_experts, hidden=weights["k"], intermediate=intermediate,
        columns=136, bits=bits(weights), slots=slots, moe_block_size=block, **H100,
    )  # fmt: skip
    assert choice["tables"] == ("without" not in name)
    assert choice["gate_up"]["kernel"] == "mma" and choice["gate_up"]["tile"] == int(name[0])
    rows, block = (slots, block) if choice["tables"] else (m * top_k, 1)
    stays = extension.select_residence(
        int(name[0]), rows, block, weights["k"], 2 * intermediate,
        group_size=group_size(weights), bits=bits(weights), gated=True,
    )  # fmt: skip
    assert stays["rows"] == block


def test_a_ring_serves_x_longer_than_shared_memory():
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    (p,) = (p for p in problems.PROBLEMS if p.name == "x_longer_than_shared_memory")
    slots, _ = aligned_sizes((p.m, p.top_k), p.moe_block_size, p.num_experts)
    sizes = (slots, p.moe_block_size, p.k, p.n)
    choice = extension.select_tile(
        *sizes, p.bits, routes=p.m * p.top_k, num_experts=p.num_experts, **H100
    )
    assert extension.tile_table()[choice["tile"]]["tile_m"] == 8
    assert extension.select_residence(choice["tile"], *sizes)["rows"] == 0


@pytest.mark.cuda
@pytest.mark.parametrize(("tile", "weights"), PRODUCT_CASES)
def test_products(tile, weights):
    m, top_k, num_experts, n, block = PRODUCTS[tile]
    problem = problems.Problem(
        f"resident_{tile}", m=m, n=n, top_k=top_k, num_experts=num_experts, routing="skips",
        moe_block_size=block, bias=True, **weights,
    )  # fmt: skip
    case = problems.build(problem)
    routing = problems.align(case.topk_ids, block, num_experts)
    out = routed_matmul(
        jnp.asarray(case.x), problems.poison(case.stack(), case.topk_ids),
        Routing(*map(jnp.asarray, routing)), moe_block_size=block, top_k=top_k,
        implementation="cuda",
    )  # fmt: skip
    result = oracle.routed_rows(case.x, case.weights, case.topk_ids, case.bias)
    oracle.assert_within(out, result, row_budgets(problem, case), problem.name)


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "weights"), LAYER_CASES)
def test_layers(name, weights):
    m, top_k, num_experts, intermediate = LAYERS[name]
    layer = build_layer(
        f"resident_{name}", m=m, top_k=top_k, num_experts=num_experts, intermediate=intermediate,
        bias=True, **weights,
    )  # fmt: skip
    out = jm.moe_ffn(layer.x, *layer.routes, *layer.stacks(), implementation="cuda")
    oracle.assert_within(out, *expected(layer))


# Two warpgroups that start some stages apart, over K of many stages: (m, k, n) of dense products.
STAGGERED = {2: (128, 2048, 4352), 7: (300, 2048, 4352)}


@pytest.mark.parametrize("tile", STAGGERED)
def test_staggered_products_take_the_tile(tile):
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    m, k, n = STAGGERED[tile]
    choice = extension.select_tile(m, 0, k, n, 4, 132, True)
    assert choice["kernel"] == "wgmma" and choice["tile"] == tile


@pytest.mark.cuda
@pytest.mark.parametrize("group_size", [128, 256])  # a stage of two K tiles, or of four
@pytest.mark.parametrize("shape", STAGGERED.values(), ids=map(str, STAGGERED))
def test_staggered_products(shape, group_size):
    m, k, n = shape
    problem = problems.Problem(
        "staggered", m=m, k=k, n=n, group_size=group_size, num_experts=1, top_k=1, dtype="bfloat16"
    )
    case = problems.build(problem)
    out = jm.matmul(jnp.asarray(case.x), case.stack()[0], implementation="cuda")
    x = case.x.astype(float)
    budget = oracle.matmul_budget(x, case.weights[0], "bfloat16")
    oracle.assert_within(out, oracle.matmul(x, case.weights[0]), budget)
