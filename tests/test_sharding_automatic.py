"""Automatic meshes: right results from shards, and no collective but the sums that a cut needs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from meshes import P, case, cpu_mesh, kinds, put, run
from moe_layers import Layer, expected
from problems import Problem, build

import jax_marlin as jm

MESH = cpu_mesh()
VARIANTS = {
    "symmetric": {},
    "v1_zeros_bias": {"zeros": "v1", "bias": True},
    "bfloat16_8bit": {"dtype": "bfloat16", "bits": 8, "zeros": "v2"},
    "channelwise": {"group_size": -1, "bias": True},
    "g_idx_per_expert": {"g_idx": "per_expert", "bias": True},
    "g_idx_shared": {"g_idx": "shared", "zeros": "v1"},
}
# kind, mesh axis, axes of x, collectives, axes of the result
CUTS = [
    ("expert", "expert", ("data",), ["all-reduce"], ("data",)),
    ("column", "tensor", ("data",), [], ("data", "tensor")),
    ("row", "tensor", ("data", "tensor"), ["all-reduce"], ("data",)),
    ("row", "tensor", ("data",), ["all-reduce"], ("data",)),
    ("expert", ("expert", "tensor"), (), ["all-reduce"], ()),
    ("row", ("data", "expert"), (None, ("data", "expert")), ["all-reduce"], ()),
]


def cuts(variant):
    return [cut for cut in CUTS if cut[0] != "row" or "g_idx" not in VARIANTS[variant]]


def linear(x, stack):
    return jm.matmul(x, stack[1])


def routed(x, stack, ids, weights):
    routing = jm.moe_align_block_size(ids, 8, 4)
    return jm.moe_matmul(x, stack, *routing, moe_block_size=8, top_k=2, topk_weights=weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_products(variant):
    problem = case(f"automatic_{variant}", **VARIANTS[variant])
    x, dtype, bias = problem.x.astype(float), problem.x.dtype, problem.bias
    ids, weights = problem.topk_ids, problem.topk_weights
    own_bias = None if bias is None else bias[1]
    dense = oracle.matmul(x, problem.weights[1], own_bias)
    dense_budget = oracle.matmul_budget(x, problem.weights[1], dtype, own_bias)
    rows, magnitude = (
        oracle.routed_rows(f(x), f(problem.weights), ids, None if bias is None else f(bias))
        * weights.reshape(-1, 1)
        for f in (lambda a: a.astype(float), np.abs)
    )
    eps = max(oracle.epsilon(dtype), 4 * 16 * oracle.epsilon(np.float32))
    for kind, axis, of_x, sums, of_result in cuts(variant):
        stack = jm.shard(problem.stack(), MESH, kind, axis)
        placed = put(MESH, problem.x, *of_x)
        out, found = run(linear, placed, stack)
        oracle.assert_within(out, dense, dense_budget)
        assert kinds(found) == sums
        assert out.sharding.is_equivalent_to(NamedSharding(MESH, P(*of_result)), 2)
        out, found = run(routed, placed, stack, jnp.asarray(ids), jnp.asarray(weights))
        oracle.assert_within(out, rows, 2 * eps * magnitude)
        assert kinds(found) == sums


@pytest.mark.parametrize("kind, axis", [("expert", "expert"), ("column", "tensor")])
def test_ragged_dot(kind, axis):
    problem, sizes = case("automatic_ragged", zeros="v1", bias=True), np.array([3, 0, 1, 2])
    placed = put(MESH, problem.x, "data"), jm.shard(problem.stack(), MESH, kind, axis)
    out, found = run(jm.ragged_dot, *placed, jnp.asarray(sizes))
    ids = np.append(np.repeat(np.arange(4), sizes), [-1, -1])[:, None]
    assert problem.bias is not None
    expected, magnitude = (
        oracle.routed_rows(f(problem.x), f(problem.weights), ids, f(problem.bias))
        for f in (np.asarray, np.abs)
    )
    oracle.assert_within(out, expected, 2.0**-16 * magnitude)
    assert kinds(found) == (["all-reduce"] if kind == "expert" else [])


def test_views_scans_and_vmap():
    problem = case("automatic_views")
    x = put(MESH, problem.x, "data")
    columns = jm.shard(problem.stack(), MESH, "column", "tensor")
    experts = jm.shard(problem.stack(), MESH, "expert", "expert")
    batched = put(MESH, problem.x.reshape(4, 2, 256), "data")
    out, found = run(lambda x, s: jax.vmap(lambda x: jm.matmul(x, s[2]))(x), batched, columns)
    assert out.shape == (4, 2, 256) and not found
    scanned = lambda x, s: jax.lax.map(lambda e: jm.matmul(x, s[e]), jnp.arange(4))  # noqa: E731
    out, found = run(scanned, x, experts)
    assert kinds(found) == ["all-reduce"]
    expected, magnitude = (
        np.einsum("mk,ekn->emn", f(problem.x), f(problem.weights)) for f in (np.asarray, np.abs)
    )
    oracle.assert_within(out, expected, 2.0**-17 * magnitude)
    eager = jm.matmul(x, columns[1])  # a program of its own
    assert eager.sharding.is_equivalent_to(NamedSharding(MESH, P("data", "tensor")), 2)


def test_shardings_of_jit_alone():
    """Arguments that lie nowhere yet: in_shardings are what makes the program one of a mesh."""
    problem = case("automatic_in_shardings")
    stack = problem.stack()
    specs = jax.tree.map(
        lambda spec: NamedSharding(MESH, spec), jm.partition_specs(stack, "expert", "expert")
    )
    product = jax.jit(
        lambda x, stack: jm.matmul(x, stack[3]),
        in_shardings=(NamedSharding(MESH, P("data")), specs),
    )
    arguments = (problem.x, jax.tree.map(np.asarray, stack))
    text = product.lower(*arguments).compile().as_text() or ""
    assert "all-reduce(" in text and "all-gather(" not in text


LAYERS = {
    "v1_zeros_bias": {"zeros": "v1", "bias": True},
    "bfloat16": {"dtype": "bfloat16"},
    "skips": {"routing": "skips", "bias": True},
    "g_idx_per_expert": {"g_idx": "per_expert", "zeros": "v2"},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    fields = LAYERS[name]
    gate_up = case(f"{name}_gu", **fields)
    layer = Layer(gate_up, case(f"{name}_dn", **(fields | {"k": 128, "n": 192})))
    tokens = [put(MESH, a, "data") for a in (layer.x, *layer.routes)]
    cuts = [("expert", "expert"), ("expert", ("expert", "tensor"))]
    cuts += [] if "g_idx" in fields else [(("column", "row"), "tensor")]
    for kind, axis in cuts:
        stacks = jm.shard(layer.stacks(), MESH, kind, axis, gate_up=True)
        out, found = run(jm.moe_ffn, *tokens, *stacks)
        oracle.assert_within(out, *expected(layer))
        assert kinds(found) == ["all-reduce"]
        assert out.sharding.is_equivalent_to(NamedSharding(MESH, P("data")), 2)


def test_layer_that_is_composed():
    """A pair (gate, up) runs as single products: token ids are gathered, tokens are not."""
    gate, up = (case(f"automatic_{name}", n=128) for name in ("gate", "up"))
    joined = dataclasses.replace(gate, weights=np.concatenate([gate.weights, up.weights], axis=2))
    layer = Layer(joined, case("automatic_pair_down", k=128, n=192))
    stacks = ((gate.stack(), up.stack()), layer.down.stack())
    tokens = [put(MESH, a, "data") for a in (layer.x, *layer.routes)]
    for kind, axis in (("expert", "expert"), (("column", "row"), "tensor")):
        out, found = run(jm.moe_ffn, *tokens, *jm.shard(stacks, MESH, kind, axis))
        oracle.assert_within(out, *expected(layer))
        assert "all-gather" not in kinds(found)


def test_tokens_on_the_axis_of_the_experts_are_gathered():
    gate_up, down = case("same_axis"), case("same_axis_down", k=128, n=192)
    layer = Layer(gate_up, down)
    stacks = jm.shard(layer.stacks(), MESH, "expert", "expert")
    tokens = [put(MESH, a, "expert") for a in (layer.x, *layer.routes)]
    out, found = run(jm.moe_ffn, *tokens, *stacks)
    oracle.assert_within(out, *expected(layer))
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
    assert max(c.bytes_sent for c in found if c.kind == "all-gather") <= 8 * 256 * 4


def test_tokens_cut_behind_an_axis_that_is_folded_are_gathered():
    """Unless that axis is the one that vmap maps; weights stay in either case."""
    problem = case("cut_behind")
    stack = jm.shard(problem.stack(), MESH, "column", "tensor")
    x = put(MESH, problem.x.reshape(4, 2, 256), None, "data")
    out, found = run(linear, x, stack)
    assert kinds(found) == ["all-gather"] and found[0].bytes_sent <= problem.x.nbytes
    mapped = lambda x, s: jax.vmap(lambda x: linear(x, s), 1, 1)(x)  # noqa: E731
    again, found = run(mapped, x, stack)
    assert not found
    arguments = (problem.x, problem.weights[1])
    budget = oracle.matmul_budget(*arguments, problem.x.dtype)
    for result in (out, again):
        oracle.assert_within(result.reshape(8, 256), oracle.matmul(*arguments), budget)


def test_a_cut_that_no_device_can_compute_with_is_refused():
    problem = build(Problem("bad_cut", m=8, k=256, n=256, g_idx="per_expert", dtype="float32"))
    stack = problem.stack()
    placed = jax.tree.map(lambda leaf: put(MESH, leaf), stack)
    qweight = put(MESH, stack.qweight, None, None, "tensor")
    placed = type(stack)(qweight, placed.scales, None, placed.perm, None, stack.spec)
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"ragged_dot: qweight \[3, 4, 4, 512\] has sharding .*its axis 2 cannot be cut over "
        r"tensor here: it has at most 1 equal parts",
    ):
        jax.jit(jm.ragged_dot)(put(MESH, problem.x, "data"), placed, jnp.asarray([3, 1, 2]))
