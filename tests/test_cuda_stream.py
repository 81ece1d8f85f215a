"""Products of few rows and many weights, whose blocks stay and stream all operands.

A test without a GPU pins that the shapes below are such; the tests with one compare them with the
oracle. Many row blocks of few experts take the kernel as well as many experts would.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from moe_layers import build_layer, expected
from poisoned_memory import poisoned
from weighted_rows import assert_weighted_rows, topk_ids

import jax_marlin as jm
from jax_marlin.ops.moe_align_block_size import aligned_sizes
from jax_marlin.ops.moe_matmul import Routing, routed_matmul

H100 = {"sm_count": 132, "has_wgmma": True}
# By K: the tile of stages of 8 packed K tiles, or of 6 (4 and 3 of 8-bit codes), and how the last
# one is filled. Groups that begin and end inside stages, of half a tile, of all K.
FORMATS = {
    "one_tile": {"k": 64, "group_size": 64, "dtype": "bfloat16"},
    "group_128": {"k": 1344, "group_size": 128, "dtype": "bfloat16", "zeros": "v1"},
    "whole_stages": {"k": 1024, "group_size": 128, "dtype": "bfloat16"},
    "short_stages": {"k": 768, "group_size": 128, "dtype": "bfloat16"},
    "group_192": {"k": 768, "group_size": 192, "dtype": "float16", "zeros": "v2"},
    "group_32": {"k": 704, "group_size": 32, "dtype": "float16", "zeros": "v1"},
    "group_96": {"k": 576, "group_size": 96, "dtype": "bfloat16"},
    "channelwise": {"k": 448, "group_size": -1, "dtype": "float16"},
    "8bit_group_64": {"k": 576, "group_size": 64, "dtype": "bfloat16", "bits": 8, "zeros": "v2"},
    "8bit_channelwise": {"k": 192, "group_size": -1, "dtype": "float16", "bits": 8},
}
# Columns that end inside a packed tile and inside a block, and an odd number of them.
COLUMNS = {"one_tile": 328, "channelwise": 201}
FEW_ROWS = (0, 1, 7, 8, 9, 3)  # of the first experts; the last takes what fills the GPU


def columns(kind: str) -> int:
    return COLUMNS.get(kind, 200)


def rows_of_experts(kind: str, block: int) -> tuple[int, ...]:
    k_tiles = FORMATS[kind]["k"] // 64
    pieces = max(70 * 132 // k_tiles, 2 * 132)
    return *FEW_ROWS, block * -(-pieces // -(-columns(kind) // 128)) + 2


def choose(extension, kind, block):
    rows, form = rows_of_experts(kind, block), FORMATS[kind]
    slots, _ = aligned_sizes((sum(rows), 1), block, len(rows))
    return extension.select_tile(
        slots, block, form["k"], columns(kind), form.get("bits", 4), routes=sum(rows),
        num_experts=len(rows), **H100,
    )  # fmt: skip


@pytest.mark.parametrize("block", [8, 5])
def test_products_stream(block):
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    choices = [choose(extension, kind, block) for kind in FORMATS]
    assert all(choice["kernel"] == "stream" for choice in choices)
    tiles = {choice["tile"] for choice in choices}
    assert tiles == set(range(len(extension.stream_table())))


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("block", "out"), [(8, None), (8, jnp.float32), (5, None)], ids=["8", "8_float32_out", "5"]
)
@pytest.mark.parametrize("kind", FORMATS)
def test_products(kind, block, out):
    rows, form = rows_of_experts(kind, block), FORMATS[kind]
    ids = topk_ids(rows)
    problem = problems.Problem(
        f"stream_{kind}_{block}", m=len(ids), n=columns(kind), top_k=1, num_experts=len(rows),
        bias=True, **form,
    )  # fmt: skip
    case = problems.build(problem)
    stack, x = problems.poison(case.stack(), ids), jnp.asarray(case.x)
    routing = Routing(*map(jnp.asarray, problems.align(ids, block, len(rows))))
    weights = jnp.asarray(case.topk_weights)

    def run(x, stack, routing, weights):
        return routed_matmul(
            x, stack, routing, moe_block_size=block, top_k=1, topk_weights=weights,
            preferred_element_type=out, implementation="cuda",
        )  # fmt: skip

    got = np.asarray(poisoned(run)(x, stack, routing, weights))
    again = np.asarray(jax.jit(run)(x, stack, routing, weights))
    assert got.tobytes() == again.tobytes()
    assert_weighted_rows(got, case, ids, problem.dtype)


# Tokens; few rows and slots are zeroed beside the products, others before them.
UNNAMED = {"zeroed_beside": 500, "zeroed_before": 1900}


@pytest.mark.cuda
@pytest.mark.parametrize("out", [None, jnp.float32], ids=["", "float32_out"])
@pytest.mark.parametrize("kind", UNNAMED)
def test_rows_that_no_block_names_are_zero(kind, out):
    """Blocks of an expert outside the stack, and more blocks than are in use."""
    m, k, n = UNNAMED[kind], 1280, 265
    problem = problems.Problem(
        f"stream_{kind}", m=m, k=k, n=n, top_k=2, num_experts=3, routing="skips",
        group_size=64, dtype="bfloat16",
    )  # fmt: skip
    case = problems.build(problem)
    tables = problems.align(case.topk_ids, 8, 3)
    assert (len(tables[0]) <= 2048 and 2 * m <= 1024) == (kind == "zeroed_beside")
    routing = Routing(*map(jnp.asarray, tables))
    extension = pytest.importorskip("_jax_marlin")
    choice = extension.select_tile(len(tables[0]), 8, k, n, 4, routes=2 * m, num_experts=3, **H100)
    assert choice["kernel"] == "stream"

    def run(x, stack, routing):
        return routed_matmul(
            x, stack, routing, moe_block_size=8, top_k=2, preferred_element_type=out,
            implementation="cuda",
        )  # fmt: skip

    got = np.asarray(poisoned(run)(jnp.asarray(case.x), case.stack(), routing))
    nobody = (case.topk_ids < 0) | (case.topk_ids >= 3)
    assert nobody.any() and not got[nobody.ravel()].any()
    exact = oracle.routed_rows(case.x, case.weights, case.topk_ids, case.bias)
    for expert, weight in enumerate(case.weights):
        own = np.flatnonzero(case.topk_ids.ravel() == expert)
        budget = oracle.matmul_budget(case.x[own // 2].astype(float), weight, problem.dtype, None)
        oracle.assert_within(got[own], exact[own], budget, f"expert {expert}")


# A single token needs no routing tables. Many of its routes, to few experts: both products stream,
# the second one's weights while the first one still runs, over more stages than its ring has.
LAYERS = {
    "bfloat16": {"dtype": "bfloat16", "group_size": 128},
    "float16_zeros": {"dtype": "float16", "group_size": 32, "zeros": "v1"},
    "bfloat16_8bit": {"dtype": "bfloat16", "group_size": 64, "bits": 8, "zeros": "v2"},
}
ROUTES, HIDDEN, INTERMEDIATE, WIDTH = 96, 960, 1152, 1288


def test_layers_stream():
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    for form in LAYERS.values():
        choice = extension.select_layer(
            1, top_k=ROUTES, num_experts=3, hidden=HIDDEN, intermediate=INTERMEDIATE,
            columns=WIDTH, bits=form.get("bits", 4), slots=ROUTES, moe_block_size=1, **H100,
        )  # fmt: skip
        assert not choice["tables"] and not choice["sums_routes"]
        assert choice["gate_up"]["kernel"] == choice["down"]["kernel"] == "stream"


@pytest.mark.cuda
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_clamped"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, activation):
    layer = build_layer(
        f"stream_{kind}", m=1, top_k=ROUTES, num_experts=3, k=HIDDEN, intermediate=INTERMEDIATE,
        n=WIDTH, bias=True, **LAYERS[kind],
    )  # fmt: skip
    ids = np.random.default_rng(7).integers(-1, 4, (1, ROUTES)).astype(np.int32)
    weights = jnp.asarray(layer.gate_up.topk_weights)

    def run(x, ids, weights, gate_up, down):
        return jm.moe_ffn(
            x, ids, weights, gate_up, down, activation=activation, implementation="cuda"
        )

    arguments = (layer.x, jnp.asarray(ids), weights, *layer.stacks())
    got = poisoned(run)(*arguments)
    oracle.assert_within(got, *expected(layer, activation, ids=ids))
    assert np.asarray(got).tobytes() == np.asarray(jax.jit(run)(*arguments)).tobytes()


# Two tokens with tables, which the second product reads while the kernel that wrote them may run.
TABLES = {"m": 2, "top_k": 4, "num_experts": 4, "k": 2560, "intermediate": 2560, "n": 5128}


def test_layers_with_tables_stream():
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    slots, _ = aligned_sizes((2, 4), 8, 4)
    choice = extension.select_layer(
        2, top_k=4, num_experts=4, hidden=TABLES["k"], intermediate=TABLES["intermediate"],
        columns=TABLES["n"], bits=4, slots=slots, moe_block_size=8, **H100,
    )  # fmt: skip
    assert choice["tables"]
    assert choice["gate_up"]["kernel"] == choice["down"]["kernel"] == "stream"


@pytest.mark.cuda
@pytest.mark.parametrize("weights_on_input", [False, True], ids=["", "weights_on_input"])
def test_layers_with_tables(weights_on_input):
    layer = build_layer(
        "stream_tables", group_size=128, dtype="bfloat16", bias=True, **TABLES,
    )  # fmt: skip

    def run(x, ids, weights, gate_up, down):
        return jm.moe_ffn(
            x, ids, weights, gate_up, down, weights_on_input=weights_on_input,
            implementation="cuda",
        )  # fmt: skip

    arguments = (layer.x, *layer.routes, *layer.stacks())
    got = poisoned(run)(*arguments)
    oracle.assert_within(got, *expected(layer, weights_on_input=weights_on_input))
    again = np.asarray(jax.jit(run)(*arguments)).tobytes()
    assert all(np.asarray(jax.jit(run)(*arguments)).tobytes() == again for _ in range(20))
