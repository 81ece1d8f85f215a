"""Ops in memory full of NaN: each program holds a product of NaN, in whose place its calls write.

What a call leaves unwritten and reads all the same, or hands out, shows in its result, which must
have the bits of a program without that product, and for layers be what the oracle says.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from moe_layers import LAYERS, build_layer, expected
from poisoned_memory import poisoned

import jax_marlin as jm
from jax_marlin.ops.moe_matmul import Routing, routed_matmul

pytestmark = pytest.mark.cuda

ONE_CALL = [name for name in LAYERS if name.startswith("one_call")]
# Down's K in parts, which meet in clusters or in scratch: without tables, and with.
SPLIT = {
    "without_tables": {"m": 1, "top_k": 9, "num_experts": 11, "intermediate": 2112},
    "blocks_of_8": {"m": 8, "top_k": 2, "num_experts": 3, "intermediate": 2112, "n": 72},
}
PROBLEMS = [p for p in problems.PROBLEMS if p.dtype != "float32" and p.m > 0]


def same_bits(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        # Bytes, so that NaN differs from all but the same NaN.
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_a_call_does_not_write_is_nan():
    """No used slot has an expert and nothing is zeroed: the result is what memory held."""
    case = problems.build(problems.Problem("untouched", m=5, n=200, top_k=2, dtype="bfloat16"))

    def untouched(x, stack):
        routing = Routing(jnp.zeros(16, jnp.int32), jnp.full(2, -1), jnp.full(1, 16))
        return routed_matmul(
            x, stack, routing, moe_block_size=8, top_k=2, zero_output=False,
            preferred_element_type=jnp.float32, implementation="cuda",
        )  # fmt: skip

    out = np.asarray(poisoned(untouched)(jnp.asarray(case.x), case.stack()))
    assert out.shape == (10, 200)
    assert np.isnan(out).all()
    assert np.isnan(out.view(jnp.bfloat16)).all()  # either half of each


@pytest.mark.parametrize("name", [*ONE_CALL, *SPLIT])
def test_layers(name):
    layer = build_layer(f"poisoned_{name}", **(LAYERS | SPLIT)[name])

    def run(x, ids, weights, gate_up, down):
        return jm.moe_ffn(x, ids, weights, gate_up, down, implementation="cuda")

    arguments = (layer.x, *layer.routes, *layer.stacks())
    out = poisoned(run)(*arguments)
    oracle.assert_within(out, *expected(layer))
    same_bits(out, jax.jit(run)(*arguments))


@pytest.mark.parametrize("problem", PROBLEMS[1::3], ids=str)
def test_products(problem):
    case = problems.build(problem)
    routing = problems.align(case.topk_ids, problem.moe_block_size, problem.num_experts)

    def run(x, stack, slots, expert_ids, used):
        routed = jm.moe_matmul(
            x, stack, slots, expert_ids, used,
            moe_block_size=problem.moe_block_size, top_k=problem.top_k,
        )  # fmt: skip
        return routed, jm.matmul(x, stack[1], implementation="cuda")

    arguments = (jnp.asarray(case.x), case.stack(), *map(jnp.asarray, routing))
    out = poisoned(run)(*arguments)
    assert all(np.isfinite(np.asarray(y, np.float32)).all() for y in out)
    same_bits(out, jax.jit(run)(*arguments))


@pytest.mark.parametrize(
    ("routes", "num_experts", "block"), [(7, 5, 8), (130, 11, 16), (4097, 3, 64)]
)
def test_routing_tables(routes, num_experts, block):
    ids = np.random.default_rng(routes).integers(-1, num_experts + 1, (routes, 2)).astype(np.int32)

    def run(ids):
        return jm.moe_align_block_size(ids, block, num_experts)

    same_bits(poisoned(run)(jnp.asarray(ids)), jax.jit(run)(jnp.asarray(ids)))
