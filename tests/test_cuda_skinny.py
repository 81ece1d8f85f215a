"""Dense products of a handful of rows, whose warps have a slice of K each.

A test without a GPU pins that the shapes below are such; the tests with one compare them with the
oracle.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from poisoned_memory import poisoned

import jax_marlin as jm

H100 = {"sm_count": 132, "has_wgmma": True}
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
    # Several pieces a team, some with one more than others; slices of a turn of the ring, of less,
    # of turns and a part of one.
    "pieces_of_a_turn": {"k": 2048, "group_size": 128, "dtype": "bfloat16", "zeros": "v1"},
    "pieces_of_less": {"k": 64, "group_size": 32, "dtype": "float16"},
    "pieces_of_turns_and_a_part": {"k": 2112, "group_size": 32, "dtype": "bfloat16"},
}
# Columns that end inside a packed tile and inside a piece, an odd number of them, whole pieces.
FIRST = 64  # column of a slice
COLUMNS = {"one_tile": 4136, "channelwise": 4201, "all_warps": 4096,
           "pieces_of_a_turn": 8312, "pieces_of_less": 67912,
           "pieces_of_turns_and_a_part": 8312}  # fmt: skip


def columns(kind: str) -> int:
    return COLUMNS.get(kind, 4040)


@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_skinny(kind):
    extension = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")
    form = FORMATS[kind]
    for m, n in itertools.product((1, 8, 9, 16), (columns(kind), columns(kind) - FIRST)):
        choice = extension.select_tile(m, 0, form["k"], n, form.get("bits", 4), **H100)
        assert choice["kernel"] == "skinny"
        cut = extension.cut_skinny(choice["tile"], m, form["k"] // 64, n, sm_count=132)
        assert (cut["pieces"] > 0 and cut["more"] > 0) == kind.startswith("pieces")


@functools.cache
def dense_case(kind: str) -> problems.Case:
    return problems.build(
        problems.Problem(
            f"skinny_{kind}", m=16, n=columns(kind), num_experts=2, top_k=1, bias=True,
            **FORMATS[kind],
        )
    )  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("kind", FORMATS)
def test_dense(kind, rows):
    """Of an expert that is known on the device alone, and of a slice of its columns."""
    case = dense_case(kind)
    dtype, n = FORMATS[kind]["dtype"], columns(kind)
    x, weight, stack = case.x[:rows], case.weights[1], case.stack()
    assert case.bias is not None
    bias = case.bias[1].astype(float)

    def run(x, expert):
        sliced = stack.make_expert_linear(n + FIRST, n - FIRST)
        wide = jm.matmul(
            x, stack[expert], preferred_element_type=jnp.float32, implementation="cuda"
        )
        return wide, *(jm.matmul(x, w, implementation="cuda") for w in (stack[expert], sliced))

    wide, whole, part = poisoned(run)(jnp.asarray(x), jnp.int32(1))
    exact = oracle.matmul(x.astype(float), weight, bias)
    exactly = oracle.matmul_budget(x.astype(float), weight, "float32", bias)
    oracle.assert_within(wide, exact, exactly, "float32")  # which no lost packed tile of K meets
    budget = oracle.matmul_budget(x.astype(float), weight, dtype, bias)
    oracle.assert_within(whole, exact, budget, "whole")
    oracle.assert_within(part, exact[:, FIRST:], budget[:, FIRST:], "slice")
    again = jax.jit(run)(jnp.asarray(x), jnp.int32(1))[1]
    assert np.asarray(whole).tobytes() == np.asarray(again).tobytes()
