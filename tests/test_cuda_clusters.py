"""Products whose K is split over the blocks of a cluster, at every tile that takes part in one.

A test without a GPU pins which shape takes which tile, parts and residence; the tests with one then
compare just these shapes with the oracle. Sums come out in float32, whose budget no lost or doubled
part stays within: tiles of 16 rows or fewer multiply codes exactly.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from moe_layers import build_layer, expected

import jax_marlin as jm
from jax_marlin.ops.moe_align_block_size import aligned_sizes, select_moe_block_size
from jax_marlin.ops.moe_matmul import Routing, routed_matmul

H100 = {"sm_count": 132, "has_wgmma": True}
# Parts of K begin inside groups of 128, and groups of 32 change within a packed tile.
FORMATS = {
    "bfloat16_v1_zeros": {"dtype": "bfloat16", "group_size": 128, "zeros": "v1"},
    "float16_8bit": {"dtype": "float16", "group_size": 32, "bits": 8},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A product, and what it is here for. Experts: dense products, which are not routed, have 0."""

    m: int
    k: int
    n: int
    tile: int
    parts: int
    last_part: int  # packed tiles of K in it
    experts: int = 0
    top_k: int = 1
    block: int = 0
    resident: bool = False
    formats: tuple[str, ...] = tuple(FORMATS)


LARGE = ("bfloat16_v1_zeros",)  # formats of large weights
# What the skinny kernel leaves: K that ends inside a packed tile, or a long one of few columns.
DENSE = {
    "0_in_8_parts": Case(1, 4160, 72, 0, 8, 2),
    "0_in_4_parts": Case(4, 2144, 1024, 0, 4, 7),
    "0_in_2_parts_more_blocks_than_multiprocessors": Case(3, 4128, 6152, 0, 2, 32, formats=LARGE),
    "4_in_2_parts": Case(12, 2144, 1544, 4, 2, 17),
    "4_in_4_parts": Case(13, 4128, 136, 4, 4, 14),
    "4_in_8_parts": Case(16, 8224, 72, 4, 8, 10),
}  # fmt: skip
ROUTED = {
    "0_single_routes": Case(3, 2112, 72, 0, 4, 6, 3, 2, 1, True),
    "0_in_2_parts": Case(9, 2112, 200, 0, 2, 16, 3, 2, 8, True),
    "0_in_2_parts_with_a_ring": Case(128, 11840, 200, 0, 2, 92, 1, 1, 4, formats=LARGE),
    "4_in_4_parts": Case(5, 4160, 40, 4, 4, 14, 3, 1, 12, True),
    "4_in_8_parts": Case(8, 8256, 40, 4, 8, 10, 1, 1, 16, True),
    "6_in_2_parts": Case(1, 8000, 4232, 6, 2, 62, 1, 1, 16, True, formats=LARGE),
}
CASES = {f"{kind}_{name}": c for kind, cases in (("dense", DENSE), ("routed", ROUTED))
         for name, c in cases.items()}  # fmt: skip
PRODUCTS = [
    pytest.param(case, kind, id=f"{name}-{kind}")
    for name, case in CASES.items()
    for kind in case.formats
]
# The down projection of a layer, which starts before its x is there: (m, top_k, experts,
# intermediate, columns, block of tables or none) in so many parts.
LAYERS = {
    "without_tables": (1, 9, 11, 2112, 136, None, 2),
    "blocks_of_4": (4, 3, 16, 2112, 72, 4, 2),
    "blocks_of_8": (8, 2, 3, 2112, 72, 8, 4),
    "blocks_of_16": (9, 3, 3, 2112, 72, 16, 2),
}


def choose(m, k, n, bits, experts=0, top_k=1, block=0):
    """(What an H100 takes, rows that it is asked for: slots where routed)."""
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    if not block:
        return extension.select_tile(m, 0, k, n, bits, **H100), m
    rows, _ = aligned_sizes((m, top_k), block, experts)
    choice = extension.select_tile(
        rows, block, k, n, bits, routes=m * top_k, num_experts=experts, **H100
    )
    return choice, rows


@pytest.mark.parametrize(("case", "kind"), PRODUCTS)
def test_products_take_the_tile_in_a_cluster(case, kind):
    bits, group_size = FORMATS[kind].get("bits", 4), FORMATS[kind]["group_size"]
    choice, rows = choose(case.m, case.k, case.n, bits, case.experts, case.top_k, case.block)
    assert choice["in_cluster"] and choice["kernel"] == "mma"
    assert (choice["tile"], choice["split_k"]) == (case.tile, case.parts)
    assert choice["scratch_bytes"] == 0
    tiles = -(-case.k // 64)
    assert max(tiles - (case.parts - 1) * -(-tiles // case.parts), 0) == case.last_part
    if case.block:
        extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
        # It is asked about symmetric codes. Zero points take as much room as scales: what stays
        # beside twice the groups, and two more, stays beside them.
        k = case.k
        if case.resident and "zeros" in FORMATS[kind]:
            k, group_size = k + 4 * 64, group_size // 2
        stays = extension.select_residence(
            case.tile, rows, case.block, k, case.n, group_size=group_size, bits=bits
        )
        assert stays["rows"] == (case.block if case.resident else 0)


def test_cases_have_every_tile_that_is_ever_in_a_cluster():
    rows, ks = (1, 4, 8, 9, 16), (512, 1344, 2112, 2144, 4160, 7744, 8256, 11840, 14336)
    ns = (40, 200, 1024, 1544, 4232, 6152, 7688)
    dense = [choose(m, k, n, bits)[0] for m, k, n, bits in itertools.product(rows, ks, ns, (4, 8))]
    routed = [
        choose(m, k, n, bits, experts, 1, block)[0]
        for m, k, n, bits, experts, block in itertools.product(
            (1, 16, 128, 256), ks, ns, (4, 8), (1, 2, 8), (1, 4, 8, 16)
        )
    ]
    for choices, cases in ((dense, DENSE), (routed, ROUTED)):
        tiles = {choice["tile"] for choice in choices if choice["in_cluster"]}
        assert tiles == {case.tile for case in cases.values()}


def rows_of_experts(problem, case):
    """Routed rows in float64, and the budget of their float32 sums; of no expert: exactly zero."""
    y, budget = np.zeros((2, problem.m * problem.top_k, problem.n))
    x = np.repeat(case.x.astype(np.float64), problem.top_k, axis=0)
    assert case.bias is not None
    for expert, weight in enumerate(case.weights):
        own = case.topk_ids.ravel() == expert
        bias = case.bias[expert].astype(np.float64)
        y[own] = oracle.matmul(x[own], weight, bias)
        budget[own] = oracle.matmul_budget(x[own], weight, "float32", bias)
    return y, budget


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "kind"), PRODUCTS)
def test_products(case, kind):
    problem = problems.Problem(
        f"cluster_{case.m}_{case.k}_{case.n}", m=case.m, k=case.k, n=case.n, top_k=case.top_k,
        num_experts=max(case.experts, 1), routing="random" if case.m == 1 else "skips",
        bias=True, **FORMATS[kind],
    )  # fmt: skip
    built = problems.build(problem)
    x = jnp.asarray(built.x)
    if case.block:
        routing = jm.moe_align_block_size(jnp.asarray(built.topk_ids), case.block, case.experts)
        out = routed_matmul(
            x, problems.poison(built.stack(), built.topk_ids), Routing(*routing),
            moe_block_size=case.block, top_k=case.top_k, preferred_element_type=jnp.float32,
            implementation="cuda",
        )  # fmt: skip
        y, budget = rows_of_experts(problem, built)
    else:
        out = jm.matmul(
            x, built.stack()[0], preferred_element_type=jnp.float32, implementation="cuda"
        )
        assert built.bias is not None
        weight, bias = built.weights[0], built.bias[0].astype(np.float64)
        y = oracle.matmul(built.x, weight, bias)
        budget = oracle.matmul_budget(built.x.astype(np.float64), weight, "float32", bias)
    oracle.assert_within(out, y, budget, problem.name)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_down_in_a_cluster(name, kind):
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    m, top_k, experts, intermediate, columns, block, parts = LAYERS[name]
    moe_block_size = select_moe_block_size(m, top_k, experts)
    slots, _ = aligned_sizes((m, top_k), moe_block_size, experts)
    choice = extension.select_layer(
        m, top_k=top_k, num_experts=experts, hidden=96, intermediate=intermediate, columns=columns,
        bits=FORMATS[kind].get("bits", 4), slots=slots, moe_block_size=moe_block_size, **H100,
    )  # fmt: skip
    assert choice["tables"] == (block is not None) and not choice["sums_routes"]
    assert block in (None, moe_block_size)
    assert choice["down"]["in_cluster"] and choice["down"]["kernel"] == "mma"
    assert choice["down"]["split_k"] == parts


@pytest.mark.cuda
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, kind):
    m, top_k, experts, intermediate, columns, _, _ = LAYERS[name]
    layer = build_layer(
        f"cluster_{name}", m=m, top_k=top_k, num_experts=experts, intermediate=intermediate,
        n=columns, bias=True, **FORMATS[kind],
    )  # fmt: skip
    x = layer.x / 16  # or 8 bit overflow float16
    out = jm.moe_ffn(x, *layer.routes, *layer.stacks(), implementation="cuda")
    oracle.assert_within(out, *expected(layer, x=x))
