"""Dense products of a handful of rows, whose warps have a slice of K each.

A test without a GPU pins that the shapes below are such; the tests with one compare them with the
oracle.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from poisoned_memory import poisoned

import jax_marlin as jm

H100 = {"sm_count": 132, "has_wgmma": True}
ROWS = (1, 3, 8, 9, 16, 17, 32)
# By K: how many warps share it, and how it divides among them. Groups that begin and end inside
# slices, of half a packed tile, of a tile and a half, of all K.
FORMATS = {
    "one_tile": {"k": 64, "group_size": 64, "dtype": "bfloat16"},
    "two_warps": {"k": 320, "group_size": 64, "dtype": "float16", "zeros": "v1"},
    "four_warps": {"k": 768, "group_size": 128, "dtype": "bfloat16"},
    "eight_warps": {"k": 1216, "group_size": 32, "dtype": "float16", "zeros": "v2"},
    "all_warps": {"k": 2048, "group_size": 128, "dtype": "bfloat16"},
    "last_slice_is_short": {"k": 3008, "group_size": 128, "dtype": "bfloat16", "zeros": "v1"},
    "slices_are_empty": {"k": 2112, "group_size": 192, "dtype": "float16"},
    "group_96": {"k": 1152, "group_size": 96, "dtype": "bfloat16"},
    "channelwise": {"k": 832, "group_size": -1, "dtype": "float16"},
    "8bit_group_64": {"k": 2176, "group_size": 64, "dtype": "bfloat16", "bits": 8, "zeros": "v2"},
    "8bit_group_32": {"k": 1088, "group_size": 32, "dtype": "bfloat16", "bits": 8},
    "8bit_channelwise": {"k": 192, "group_size": -1, "dtype": "float16", "bits": 8},
    "8bit_zeros": {"k": 5184, "group_size": 96, "dtype": "float16", "bits": 8, "zeros": "v1"},
    "few_columns": {"k": 4096, "group_size": 128, "dtype": "bfloat16", "zeros": "v1"},
    # x of 16 rows fits in two blocks only, of 32 in four.
    "long_k": {"k": 8256, "group_size": 128, "dtype": "bfloat16"},
    # Some blocks of a cluster have no row whose sums they add up.
    "parts_without_rows": {"k": 21952, "group_size": 128, "dtype": "bfloat16"},
    # Several pieces a team, some with one more than others; slices of a turn of the ring, of less,
    # of turns and a part of one.
    "pieces_of_a_turn": {"k": 2048, "group_size": 128, "dtype": "bfloat16", "zeros": "v1"},
    "pieces_of_less": {"k": 64, "group_size": 32, "dtype": "float16"},
    "pieces_of_turns_and_a_part": {"k": 2560, "group_size": 32, "dtype": "bfloat16"},
    "pieces_in_two_parts": {"k": 3136, "group_size": 64, "dtype": "float16", "zeros": "v2"},
}
# Columns that end inside a packed tile and inside a piece, an odd number of them, whole pieces.
FIRST = 64  # column of a slice
COLUMNS = {"one_tile": 4136, "channelwise": 4201, "all_warps": 4096, "few_columns": 104,
           "long_k": 1032, "parts_without_rows": 1032, "pieces_in_two_parts": 8456,
           "pieces_of_a_turn": 12264, "pieces_of_less": 67912,
           "pieces_of_turns_and_a_part": 12264}  # fmt: skip


def columns(kind: str) -> int:
    return COLUMNS.get(kind, 4040)


def is_skinny(kind: str, rows: int) -> bool:
    """More than 16 rows: where a multiprocessor has a piece of 32 columns at most, and x fits."""
    return rows <= 16 or (columns(kind) <= 32 * 132 and FORMATS[kind]["k"] < 16384)


def cut(kind: str, rows: int) -> dict:
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    form = FORMATS[kind]
    bits, k_tiles = form.get("bits", 4), form["k"] // 64
    choices = [
        extension.select_tile(rows, 0, form["k"], n, bits, **H100)
        for n in (columns(kind), columns(kind) - FIRST)
    ]
    assert all(choice["kernel"] == "skinny" for choice in choices)
    return extension.cut_skinny(choices[0]["tile"], rows, k_tiles, columns(kind), sm_count=132)


@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_skinny(kind):
    cuts = [cut(kind, rows) for rows in ROWS if is_skinny(kind, rows)]
    several = [c["pieces"] > 0 and c["more"] > 0 for c in cuts]
    assert any(several) == kind.startswith("pieces")


def test_all_cuts_are_met():
    cuts = [(rows, cut(kind, rows)) for kind in FORMATS for rows in ROWS if is_skinny(kind, rows)]
    tiles = {(0 if rows <= 8 else 1 if rows <= 16 else 2, c["parts"]) for rows, c in cuts}
    assert tiles == {(0, 1), (0, 2), (1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)}
    assert {c["warps_k"] for _, c in cuts if c["parts"] == 1} == {1, 2, 4, 8, 16}
    assert len({c["warps_k"] for _, c in cuts if c["parts"] == 2}) > 2
    assert any(c["slices"] < c["parts"] * c["warps_k"] for _, c in cuts)
    assert any((c["parts"] - 1) * c["sum_rows"] >= rows for rows, c in cuts)
    for tile in (0, 1):  # several pieces a team, of two parts
        assert any(
            c["parts"] == 2 and c["pieces"] > 0 and c["more"] > 0
            for rows, c in cuts
            if (rows > 8) == (tile == 1)
        )


@functools.lru_cache(maxsize=2)
def dense_case(kind: str, *, exact: bool = False) -> problems.Case:
    return problems.build(
        problems.Problem(
            f"skinny_{kind}", m=max(ROWS), n=columns(kind), num_experts=2, top_k=1, bias=True,
            exact=exact, **FORMATS[kind],
        )
    )  # fmt: skip


def products(case: problems.Case, kind: str):
    """(in float32, in the type of x, of a slice of the columns), of an expert that the device
    knows."""
    stack, n = case.stack(), columns(kind)
    sliced = stack.make_expert_linear(n + FIRST, n - FIRST)

    def run(x, expert):
        wide = jm.matmul(
            x, stack[expert], preferred_element_type=jnp.float32, implementation="cuda"
        )
        return wide, *(jm.matmul(x, w, implementation="cuda") for w in (stack[expert], sliced))

    return run


CASES = [(kind, rows) for kind in FORMATS for rows in ROWS if is_skinny(kind, rows)]


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "rows"), CASES)
def test_dense(kind, rows):
    case = dense_case(kind)
    dtype = FORMATS[kind]["dtype"]
    x, weight = case.x[:rows], case.weights[1]
    assert case.bias is not None
    bias = case.bias[1].astype(float)
    run = products(case, kind)
    wide, whole, part = poisoned(run)(jnp.asarray(x), jnp.int32(1))
    exact = oracle.matmul(x.astype(float), weight, bias)
    budget = oracle.matmul_budget(x.astype(float), weight, dtype, bias)
    # Up to 8 rows the sums of codes are scaled; of more, the weights, which rounds them.
    exactly = oracle.matmul_budget(x.astype(float), weight, "float32", bias)
    oracle.assert_within(wide, exact, exactly if rows <= 8 else budget, "float32")
    oracle.assert_within(whole, exact, budget, "whole")
    oracle.assert_within(part, exact[:, FIRST:], budget[:, FIRST:], "slice")
    again = jax.jit(run)(jnp.asarray(x), jnp.int32(1))[1]
    assert np.asarray(whole).tobytes() == np.asarray(again).tobytes()


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "rows"), CASES)
def test_every_product_is_added_once(kind, rows):
    """Where nothing rounds, the float32 sum is that of the oracle, bit by bit."""
    case = dense_case(kind, exact=True)
    x, weight = case.x[:rows], case.weights[1]
    assert case.bias is not None
    exact = oracle.matmul(x.astype(float), weight, case.bias[1].astype(float))
    wide, whole, part = poisoned(products(case, kind))(jnp.asarray(x), jnp.int32(1))
    np.testing.assert_array_equal(np.asarray(wide), exact)
    np.testing.assert_array_equal(np.asarray(whole), exact.astype(whole.dtype))
    np.testing.assert_array_equal(np.asarray(part), exact[:, FIRST:].astype(part.dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("expert", [-1, 0, 1, 2, 2**31 - 1])
def test_experts_outside_the_stack_are_its_first_or_its_last(expert):
    case = dense_case("four_warps", exact=True)
    x, stack = case.x[:5], case.stack()
    inside = min(max(expert, 0), 1)
    run = jax.jit(lambda x, expert: jm.matmul(x, stack[expert], implementation="cuda"))
    assert case.bias is not None
    exact = oracle.matmul(x.astype(float), case.weights[inside], case.bias[inside].astype(float))
    out = run(jnp.asarray(x), jnp.int32(expert))
    np.testing.assert_array_equal(np.asarray(out), exact.astype(out.dtype))


CHAIN, WIDTH = 24, 2048


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 8, 16, 32])
@pytest.mark.parametrize("layers", [False, True], ids=["products", "products_and_layers"])
def test_calls_in_a_chain_wait_for_each_other(rows, layers):
    """In one program as one by one, bit by bit: each reads the result of the one before."""
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    assert extension.select_tile(rows, 0, WIDTH, WIDTH, 4, **H100)["kernel"] == "skinny"
    rng = np.random.default_rng(rows)
    w = rng.normal(0, WIDTH**-0.5, (4, WIDTH, WIDTH)).astype(np.float32)
    stack = jm.quantize(w, group_size=128, dtype=jnp.bfloat16)
    linears = [stack[i] for i in range(4)]
    gate_up = jm.quantize(w[:, :, :512], group_size=128, dtype=jnp.bfloat16)
    down = jm.quantize(w[:, :256], group_size=128, dtype=jnp.bfloat16)
    ids = jnp.asarray(rng.integers(0, 4, (rows, 2)), jnp.int32)
    shares = jnp.full((rows, 2), 0.5, jnp.float32)

    def steps():
        for i in range(CHAIN):
            yield lambda x, i=i: jm.matmul(x, linears[i % 4], implementation="cuda")
            if layers and i % 3 == 0:
                yield lambda x: x + jm.moe_ffn(
                    x, ids, shares, gate_up, down, implementation="cuda"
                )  # fmt: skip

    def run(x):
        for step in steps():
            x = step(x)
        return x

    x = jnp.asarray(rng.normal(size=(rows, WIDTH)), jnp.bfloat16)
    together = jax.jit(run)
    first, second = np.asarray(together(x)), np.asarray(together(x))
    alone = x
    for step in steps():
        alone = jax.block_until_ready(step(alone))
    assert np.isfinite(first.astype(float)).all() and first.astype(float).std() > 1e-3
    assert first.tobytes() == second.tobytes() == np.asarray(alone).tobytes()
