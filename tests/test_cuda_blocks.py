"""Routed products in blocks of 16 rows and more: experts of no row, of one, and of any number
around the tiles' edges, in tiles and column counts that do not fit each other."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from moe_layers import build_layer, expected
from weighted_rows import assert_weighted_rows, topk_ids

import jax_marlin as jm
from jax_marlin.ops.moe_align_block_size import aligned_sizes, select_moe_block_size
from jax_marlin.ops.moe_matmul import Routing, routed_matmul

# Rows of each expert, by what a block holds; products are of 16, 32 or 48 rows and their multiples.
ROWS = {
    16: (0, 1, 7, 8, 9, 15, 16, 17, 33),
    32: (0, 1, 15, 16, 17, 31, 32, 33),
    64: (0, 1, 16, 17, 33, 63, 64, 65),
    96: (0, 1, 31, 32, 33, 64, 65, 95, 96, 97),
    128: (0, 1, 33, 96, 97, 127, 128, 129),
    144: (0, 1, 47, 48, 49, 95, 96, 97, 143, 144, 145, 289),
    160: (0, 1, 128, 129, 159, 160, 161),  # more than a tile: 128 and a rest
}
TILES = {16: {16}, 32: {32}, 64: {64}, 96: {96}, 128: {128}, 144: {144}, 160: {128}}
FORMATS = {
    "bfloat16": {"dtype": "bfloat16", "k": 200, "group_size": -1},
    "float16_zeros": {"dtype": "float16", "k": 320, "group_size": 32, "zeros": "v1"},
    "bfloat16_8bit": {"dtype": "bfloat16", "k": 136, "group_size": 64, "bits": 8, "zeros": "v2"},
    "float16_8bit": {"dtype": "float16", "k": 192, "group_size": 64, "bits": 8},
    # Groups of a stage, more stages than the ring has, and a single K tile in the last.
    "bfloat16_group_128": {"dtype": "bfloat16", "k": 1344, "group_size": 128},
    "float16_group_256": {"dtype": "float16", "k": 1344, "group_size": 256, "zeros": "v2"},
}  # fmt: skip


def columns(block: int) -> int:
    """Of a product; few blocks of 16 rows would be left to mma.sync."""
    return 2312 if block == 16 else 392


@pytest.mark.parametrize("block", ROWS)
def test_blocks_take_a_tile_of_their_size(block):
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    slots, _ = aligned_sizes((sum(ROWS[block]), 1), block, len(ROWS[block]))
    for n, gated in ((columns(block), False), (4096, True)):
        choice = extension.select_tile(slots, block, 200, n, 4, 132, True, gated)
        assert choice["kernel"] == "wgmma"
        assert extension.wgmma_table()[choice["tile"]]["tile_m"] in TILES[block]


@pytest.mark.cuda
@pytest.mark.parametrize("out", [None, jnp.float32], ids=["", "float32_out"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("block", ROWS)
def test_products(block, kind, out):
    rows, form = ROWS[block], FORMATS[kind]
    ids = topk_ids(rows)
    problem = problems.Problem(
        f"blocks_of_{block}_{kind}", m=len(ids), n=columns(block), top_k=1,
        num_experts=len(rows), bias=True, **form,
    )  # fmt: skip
    case = problems.build(problem)
    stack, x = problems.poison(case.stack(), ids), jnp.asarray(case.x)
    routing = Routing(*map(jnp.asarray, problems.align(ids, block, len(rows))))
    weights = jnp.asarray(case.topk_weights)

    def run():
        return routed_matmul(
            x, stack, routing, moe_block_size=block, top_k=1, topk_weights=weights,
            preferred_element_type=out, implementation="cuda",
        )  # fmt: skip

    got = np.asarray(jax.block_until_ready(run()))
    assert got.tobytes() == np.asarray(run()).tobytes()
    assert_weighted_rows(got, case, ids, problem.dtype)


@pytest.mark.parametrize("k", [2048, 8192, 14336])
@pytest.mark.parametrize("n", [64, 4096, 8192])
def test_tiles_of_blocks_keep_k_whole_and_serve_no_dense_product(n, k):
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    table = extension.wgmma_table()
    for block in (16, 96, 144):
        choice = extension.select_tile(300 * block, block, k, n, 4, 132, True)
        assert (table[choice["tile"]]["tile_m"], choice["split_k"]) == (block, 1)
        for rows in (17, block + 9, 2 * block, 1024):
            choice = extension.select_tile(rows, 0, k, n, 4, 132, True)
            assert table[choice["tile"]]["tile_m"] not in (16, 96, 144)


@pytest.mark.cuda
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu_clamped"])
@pytest.mark.parametrize("average", [70, 128])
def test_activations(average, activation):
    """Others than silu are applied to sums in shared memory, not in registers."""
    layer = build_layer(
        f"blocks_for_{average}_rows", m=average * 2, top_k=2, num_experts=4, intermediate=192,
        k=96, n=200, group_size=32, dtype="bfloat16", bias=True,
    )  # fmt: skip
    out = jm.moe_ffn(
        layer.x, *layer.routes, *layer.stacks(), activation=activation,
        implementation="cuda",
    )  # fmt: skip
    oracle.assert_within(out, *expected(layer, activation))


@pytest.mark.cuda
@pytest.mark.parametrize("average", [70, 86, 112, 128, 140, 256, 280])
def test_layers(average):
    """Gate and up in one block; whatever the average, experts have fewer rows and more."""
    layer = build_layer(
        f"blocks_for_{average}_rows", m=average * 2, top_k=2, num_experts=4, intermediate=192,
        k=96, n=200, group_size=32 if average % 4 else -1, dtype="bfloat16", bias=True,
    )  # fmt: skip
    out = jm.moe_ffn(layer.x, *layer.routes, *layer.stacks(), implementation="cuda")
    oracle.assert_within(out, *expected(layer))


# Layers whose gate_up fills the GPU in blocks of few rows: (tokens, columns of down). Down does so,
# too, or is left to mma.sync.
FEW_ROWS = {16: [(96, 200), (96, 2056)], 32: [(240, 200)]}
FEW_ROWS_CASES = [(block, *case) for block, cases in FEW_ROWS.items() for case in cases]
FEW = {"top_k": 2, "num_experts": 24, "intermediate": 512}


@pytest.mark.parametrize(("block", "m", "n"), FEW_ROWS_CASES)
def test_layers_of_few_rows_take_their_tiles(block, m, n):
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    assert select_moe_block_size(m, FEW["top_k"], FEW["num_experts"]) == block
    slots, _ = aligned_sizes((m, FEW["top_k"]), block, FEW["num_experts"])
    choice = extension.select_layer(
        m, **FEW, hidden=1344, columns=n, bits=4, slots=slots, moe_block_size=block,
        sm_count=132, has_wgmma=True,
    )  # fmt: skip
    assert choice["gate_up"]["kernel"] == "wgmma"
    assert extension.wgmma_table()[choice["gate_up"]["tile"]]["tile_m"] == block
    assert (choice["down"]["kernel"] == "wgmma") == (block == 32 or n > 2048)


@pytest.mark.cuda
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16_8bit_zeros"])
@pytest.mark.parametrize(("block", "m", "n"), FEW_ROWS_CASES)
def test_layers_of_few_rows(block, m, n, kind, activation):
    form = {"dtype": "float16", "bits": 8, "zeros": "v1"} if "8bit" in kind else {"dtype": kind}
    layer = build_layer(
        f"few_rows_{block}_{kind}", m=m, n=n, k=1344, group_size=128, bias=True, **FEW, **form
    )
    x = layer.x / 16  # or 8 bit overflow float16
    out = jm.moe_ffn(
        x, *layer.routes, *layer.stacks(), activation=activation, implementation="cuda"
    )
    oracle.assert_within(out, *expected(layer, activation, x=x))
