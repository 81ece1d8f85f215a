"""Gradients over several devices: as on one, from shards, with sums as the only collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from meshes import P, case, cpu_mesh, kinds, put, run
from moe_layers import Layer

import jax_marlin as jm
from jax_marlin.layout import unpair_columns

MESH = cpu_mesh()
OWN = P(("data", "expert"))  # each device's own tokens
EXPERTS, COLUMNS = ("expert", "expert"), (("column", "row"), "tensor")
VARIANTS = {
    "v1_bias_skips": {"zeros": "v1", "bias": True, "routing": "skips", "m": 24},
    "act_order": {"g_idx": "per_expert", "bias": True},
    "dense": {"bias": True},
}


def layer_of(variant):
    """((x, ids, weights), stacks)."""
    fields = VARIANTS[variant]
    gate_up = case(f"gradients_{variant}", **fields)
    down = case(f"gradients_down_{variant}", **fields | {"k": 128, "n": 192})
    layer = Layer(gate_up, down)
    stacks = layer.dense_stacks() if variant == "dense" else layer.stacks()
    return tuple(map(jnp.asarray, (layer.x, *layer.routes))), stacks


def gradients(function, tokens, weights):
    """((of x, of the router's weights, of what is trained of the weights), collectives)."""
    x, ids, router_weights = tokens

    def loss(x, router_weights, trainable, frozen):
        out = function(x, ids, router_weights, jm.merge_trainable(trainable, frozen))
        return (out.astype(jnp.float32) ** 2).sum()

    return run(jax.grad(loss, (0, 1, 2)), x, router_weights, *jm.split_trainable(weights))


def one_device(x, ids, router_weights, stacks):
    return jm.moe_ffn(x, ids, router_weights, *stacks)


def unpaired(of_stacks):
    """Gradients of (gate_up, down) with gate_up's columns in the order of one device."""
    width = of_stacks[0].pair_width
    count = 1 if width is None else of_stacks[0].bias.shape[-1] // width
    host = jax.tree.map(np.asarray, of_stacks)
    return jax.tree.map(lambda leaf: unpair_columns(leaf, count), host[0]), host[1]


def assert_equal(got, expected):
    *of_tokens, of_stacks = got
    got = (*of_tokens, unpaired(of_stacks))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = np.abs(other).max()
        assert scale > 0
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5 * scale)


CASES = [(*EXPERTS, v) for v in VARIANTS] + [(*COLUMNS, v) for v in VARIANTS if v != "act_order"]


@pytest.mark.parametrize("cut", CASES)
@pytest.mark.parametrize("mesh_type", [AxisType.Auto, AxisType.Explicit])
def test_layer_that_jit_partitions(mesh_type, cut):
    kind, axis, variant = cut
    tokens, stacks = layer_of(variant)
    expected, _ = gradients(one_device, tokens, stacks)
    mesh = cpu_mesh(mesh_type)
    placed = jm.shard(stacks, mesh, kind, axis, gate_up=True)
    got, found = gradients(one_device, [put(mesh, a, "data") for a in tokens], placed)
    assert_equal(got, expected)
    assert set(kinds(found)) == {"all-reduce"}


@pytest.mark.parametrize("variant", ["v1_bias_skips", "dense"])
@pytest.mark.parametrize("on_mesh", ["tokens", "stacks"])
def test_operands_on_no_mesh_beside_an_explicit_one(on_mesh, variant):
    """They are the same on all devices, and so are their cotangents."""
    tokens, stacks = layer_of(variant)
    expected, _ = gradients(one_device, tokens, stacks)
    mesh = cpu_mesh(AxisType.Explicit)
    if on_mesh == "tokens":
        got, _ = gradients(one_device, [put(mesh, a, "data") for a in tokens], stacks)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got[2]))
    else:
        got, _ = gradients(one_device, tokens, jm.shard(stacks, mesh, *COLUMNS, gate_up=True))
        assert got[0].sharding.is_fully_replicated
    assert_equal(got, expected)


MANUAL = {
    "own_tokens_gathered": (
        *EXPERTS, OWN, {"expert_axis": "expert", "exchange": "all_gather"},
        {"all-gather", "reduce-scatter", "all-reduce"},
    ),
    "own_tokens_routed": (
        *EXPERTS, OWN, {"expert_axis": "expert", "exchange": "all_to_all"},
        {"all-to-all", "all-reduce"},
    ),
    "same_tokens": (*EXPERTS, P("data"), {"expert_axis": "expert"}, {"all-reduce"}),
    "columns_and_rows": (*COLUMNS, P("data"), {"tensor_axis": "tensor"}, {"all-reduce"}),
}  # fmt: skip


@pytest.mark.parametrize(
    "manner, variant", [(m, v) for m in MANUAL for v in VARIANTS if (*MANUAL[m][:2], v) in CASES]
)
def test_layer_in_shard_map(manner, variant):
    """Replicated operands (router weights over tensor_axis, biases over data) are summed over."""
    kind, axis, rows, options, collectives = MANUAL[manner]
    tokens, stacks = layer_of(variant)
    expected, _ = gradients(one_device, tokens, stacks)
    placed = jm.shard(stacks, MESH, kind, axis, gate_up=True)

    def mapped(x, ids, router_weights, stacks):
        return jax.shard_map(
            lambda x, ids, weights, stacks: jm.moe_ffn(x, ids, weights, *stacks, **options),
            mesh=MESH, in_specs=(rows,) * 3 + (jm.partition_specs(stacks, kind, axis),),
            out_specs=rows,
        )(x, ids, router_weights, stacks)  # fmt: skip

    got, found = gradients(mapped, tokens, placed)
    assert_equal(got, expected)
    assert set(kinds(found)) == collectives


@pytest.mark.parametrize("rows", [P("data"), OWN])
def test_layer_in_shard_map_over_both_axes(rows):
    """Experts cut over one axis and their columns over another."""
    tokens, stacks = layer_of("v1_bias_skips")
    expected, _ = gradients(one_device, tokens, stacks)
    paired = jm.shard(stacks, MESH, *COLUMNS, gate_up=True)
    by_expert, by_column = (jm.partition_specs(paired, *cut) for cut in (EXPERTS, COLUMNS))
    both = jax.tree.map(lambda e, c: P("expert", *c[1:]) if e else c, by_expert, by_column)
    axes = {"expert_axis": "expert", "tensor_axis": "tensor"}

    def mapped(x, ids, router_weights, stacks):
        return jax.shard_map(
            lambda x, ids, weights, stacks: jm.moe_ffn(x, ids, weights, *stacks, **axes),
            mesh=MESH, in_specs=(rows,) * 3 + (both,), out_specs=rows,
        )(x, ids, router_weights, stacks)  # fmt: skip

    got, found = gradients(mapped, tokens, paired)
    assert_equal(got, expected)
    gathers = {"all-gather", "reduce-scatter"} if rows == OWN else set()
    assert set(kinds(found)) == {"all-reduce", *gathers}


def linear(x, ids, router_weights, stack):
    return jm.matmul(x, stack[1])


def routed(x, ids, router_weights, stack):
    routing = jm.moe_align_block_size(ids, 8, 4)
    return jm.moe_matmul(x, stack, *routing, moe_block_size=8, top_k=2, topk_weights=router_weights)


@pytest.mark.parametrize("op", [linear, routed])
@pytest.mark.parametrize("mesh_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "kind, axis, of_x",
    [
        ("expert", "expert", ("data",)),
        ("column", "tensor", ("data",)),
        ("row", "tensor", ("data", "tensor")),
    ],
)
def test_products(kind, axis, of_x, mesh_type, op):
    """Neither weights nor rows travel: what does are float32 sums."""
    problem = case("gradients_products", zeros="v1", bias=True)
    stack, mesh = problem.stack(), cpu_mesh(mesh_type)
    tokens = (
        jnp.asarray(problem.x),
        jnp.asarray(problem.topk_ids),
        jnp.asarray(problem.topk_weights),
    )
    expected, _ = gradients(op, tokens, stack)
    placed = put(mesh, tokens[0], *of_x), put(mesh, tokens[1]), put(mesh, tokens[2])
    got, found = gradients(op, placed, jm.shard(stack, mesh, kind, axis))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5 * np.abs(other).max())
    # Of one value to a routed row, such as gradients of router weights that are whole, any may.
    found = [c for c in found if len(c.shape) > 1]
    assert {(c.kind, c.dtype) for c in found} <= {("all-reduce", "f32")}


@pytest.mark.parametrize("variant", ["v1_bias_skips", "dense"])
def test_paired_columns_on_one_device(variant):
    """A bias's gradient stands as the bias does; x and router weights do not see the pairs."""
    tokens, stacks = layer_of(variant)
    expected, _ = gradients(one_device, tokens, stacks)
    paired = jax.device_get(jm.shard(stacks, MESH, *COLUMNS, gate_up=True))
    assert paired[0].pairs == 2
    got, found = gradients(one_device, tokens, jax.tree.map(jnp.asarray, paired))
    assert_equal(got, expected)
    assert not found
