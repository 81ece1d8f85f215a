"""partition_specs and shard: specs leaf by leaf, paired columns, and what is refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import P, case, cpu_mesh

import jax_marlin as jm
from jax_marlin.sharding import pair_gate_up

MESH = cpu_mesh()


def test_specs_of_each_leaf():
    stack = case("specs", zeros="v1", bias=True, g_idx="per_expert").stack()
    experts, columns = (jm.partition_specs(stack, kind, "a") for kind in ("expert", "column"))
    assert experts.qweight == experts.scales == experts.zero_points == P("a", None, None, None)
    assert experts.perm == experts.bias == P("a", None)
    assert columns.qweight == columns.scales == columns.zero_points == P(None, "a", None, None)
    assert (columns.perm, columns.bias) == (P(None, None), P(None, "a"))
    rows = jm.partition_specs(dataclasses.replace(stack, perm=None), "row", ("a", "b"))
    assert rows.qweight == rows.scales == P(None, None, ("a", "b"), None)
    assert rows.bias == P(None, None) and rows.perm is None
    assert jax.tree.structure(experts) == jax.tree.structure(stack)
    one_group = jm.partition_specs(case("specs_one_group", group_size=-1).stack(), "row", "a")
    assert one_group.scales == P(None, None, None, None)  # every device's


def test_specs_of_trees_and_abstract_leaves():
    stack = case("specs_tree", bias=True).stack()
    linear, dense = stack[1], jm.DenseExpertStack(jnp.ones((4, 128, 256)), jnp.ones((4, 256)))
    tree = {"experts": (stack, dense), "q": linear, "norm": jnp.ones(3)}
    specs = jm.partition_specs(jax.eval_shape(lambda: tree), "expert", "a")
    assert jax.tree.structure(specs) == jax.tree.structure(tree)
    assert specs["experts"][1].weight == P("a", None, None)
    assert set(jax.tree.leaves(specs["q"])) == {P()} and specs["norm"] == P()
    columns = jm.partition_specs(tree, "column", "a")
    assert columns["q"].stack.qweight == P(None, "a", None, None) and columns["q"].expert == P()
    assert columns["experts"][1].bias == P(None, "a")
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), stack)
    assert jm.partition_specs(layers, "expert", "a").qweight == P(None, "a", None, None, None)
    single = jax.tree.map(lambda leaf: leaf[0], stack)
    assert jm.partition_specs(single, "column", "a").scales == P("a", None, None)
    mixed = jm.partition_specs((stack, (stack, dense)), ("column", "row"), "a")
    assert mixed[0].qweight[1] == mixed[1][0].qweight[2] == mixed[1][1].weight[1] == "a"


def test_shard_places_leaves_and_copies_the_rest():
    stack = case("placed").stack()
    placed = jm.shard({"w": stack, "b": np.ones(3)}, MESH, "expert", "expert")
    assert placed["w"].qweight.sharding == NamedSharding(MESH, P("expert", None, None, None))
    assert placed["w"].qweight.addressable_shards[0].data.shape == (2, 4, 4, 512)
    assert placed["b"].sharding.is_fully_replicated
    assert str(placed["w"]) == str(stack)
    again = jax.device_put(stack, NamedSharding(MESH, P("expert")))  # a prefix
    np.testing.assert_array_equal(again.qweight, placed["w"].qweight)


@pytest.mark.parametrize("parts", [2, 4])
def test_pairs_keep_the_meaning_of_columns(parts):
    problem = case("paired", n=512, zeros="v1", bias=True, m=5)
    stack, x = problem.stack(), jnp.asarray(problem.x)
    paired = pair_gate_up(stack, parts)
    assert paired.pairs == parts and paired.spec.pair_width == 512 // parts
    half = 256 // parts  # of the first device: its part of gate, then the same part of up
    spec = dataclasses.replace(stack.spec, n=2 * half)
    first = jm.MarlinExpertStack(
        paired.qweight[:, : 8 // parts], paired.scales[:, : 8 // parts],
        paired.zero_points[:, : 8 // parts], None, None, spec,
    )  # fmt: skip
    weights = np.asarray(stack.dequantize())
    columns = np.r_[:half, 256 : 256 + half]
    np.testing.assert_array_equal(first.dequantize(), weights[:, :, columns])
    np.testing.assert_array_equal(paired.dequantize(), weights)
    np.testing.assert_allclose(jm.matmul(x, paired[1]), jm.matmul(x, stack[1]), rtol=1e-6)
    np.testing.assert_allclose(
        jm.ragged_dot(x, paired, jnp.array([2, 1, 0, 2])),
        jm.ragged_dot(x, stack, jnp.array([2, 1, 0, 2])), rtol=1e-6,
    )  # fmt: skip
    routes = jnp.asarray(problem.topk_ids), jnp.asarray(problem.topk_weights)
    down = case("paired_down").stack()
    one, other = (jm.moe_ffn(x, *routes, gate_up, down) for gate_up in (paired, stack))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert pair_gate_up(paired, parts) is paired
    dense = pair_gate_up(jm.DenseExpertStack(jnp.asarray(weights)), parts)
    np.testing.assert_array_equal(dense.dequantize(), weights)
    with pytest.raises(ValueError, match=r"columns 0:64 of a gate\|up weight"):
        paired[0][:, :64]
    with pytest.raises(ValueError, match=f"paired for {parts} devices, got 8"):
        pair_gate_up(paired, 8)


def test_shard_leaves_alone_what_is_no_array():
    tree = {"w": case("functions").stack(), "activation": jax.nn.silu, "name": "moe", "scale": 2.0}
    placed = jm.shard(tree, MESH, "expert", "expert")
    assert placed["activation"] is jax.nn.silu and placed["name"] == "moe"
    types = {"dtype": np.float32, "class": np.ndarray, "text": np.array(["moe"])}
    assert jm.shard(types, MESH, "expert", "expert") == types
    assert placed["scale"].sharding.is_fully_replicated


def test_experts_of_layers_are_cut_along_their_own_axis():
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[case("layers").stack()] * 3)
    placed = jm.shard(layers, MESH, "expert", "expert")
    assert placed.qweight.sharding.spec == P(None, "expert", None, None, None)
    few = jax.tree.map(lambda leaf: leaf[:, :3], layers)  # three layers, three experts
    with pytest.raises(ValueError, match=r"has 3 experts, .* parts for 2 devices"):
        jm.shard(few, MESH, "expert", "data")


STACK, ACT_ORDER = case("refused").stack(), case("refused_g_idx", g_idx="shared").stack()
REFUSED = [
    (STACK, "experts", "data", "shard: kind is 'experts', expected one of"),
    (STACK, "expert", None, r"shard: axis is None, expected one of the mesh's axes \('data'"),
    (STACK, "expert", "model", r"shard: axis is 'model', expected one of the mesh's axes"),
    ({"w": STACK[:3]}, "expert", "data", r"shard: \['w'\] has 3 experts, .* parts for 2 devices"),
    (case("refused_n", n=192).stack(), "column", "data", "192 columns in whole tiles of 64, which"),
    (
        case("refused_off", n=200).stack(),
        "column",
        "data",
        "200 columns in whole tiles of 64, which",
    ),
    (
        case("refused_k", k=384, group_size=256).stack(),
        "row",
        "data",
        "tiles of 64 and groups of 256",
    ),
    (
        case("refused_g", k=384, group_size=128).stack(),
        "row",
        "data",
        "tiles of 64 and groups of 128",
    ),
    (ACT_ORDER, "row", "data", "is in act-order: its rows need the whole x, and K = 256"),
    ([STACK[0][:, :128]], "column", "data", r"shard: \[0\] is a view of columns \(0, 128\) of 256"),
    (jm.DenseExpertStack(jnp.ones((4, 3, 8))), "row", "data", "has 3 rows, which cannot be cut"),
]


@pytest.mark.parametrize("tree, kind, axis, message", REFUSED)
def test_refusals(tree, kind, axis, message):
    with pytest.raises(ValueError, match=message):
        jm.shard(tree, MESH, kind, axis)


def test_refusals_without_a_mesh():
    for tree, kind in ((ACT_ORDER, "row"), (case("refused_off", n=200).stack(), "column")):
        with pytest.raises(ValueError, match="partition_specs: the weight"):
            jm.partition_specs(tree, kind, "a")
    with pytest.raises(
        ValueError, match=r"gate\|up has 192 columns, expected a multiple of 2 \* 2 \* 64"
    ):
        jm.shard(case("refused_n", n=192).stack(), MESH, "column", "data", gate_up=True)
    with pytest.raises(ValueError, match="gate_up's columns are paired for several devices; fold"):
        jm.fold_act_order(pair_gate_up(case("fold", n=512).stack(), 2), ACT_ORDER)
