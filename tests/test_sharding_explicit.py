"""Explicit meshes: results typed by their operands, sums inside the ops, misfits refused."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from meshes import P, case, cpu_mesh, kinds, put, run
from moe_layers import Layer, expected

import jax_marlin as jm

MESH = cpu_mesh(AxisType.Explicit)
CUTS = [
    ("expert", "expert", ("data",), ["all-reduce"], P("data", None)),
    ("column", "tensor", ("data",), [], P("data", "tensor")),
    ("row", "tensor", ("data", "tensor"), ["all-reduce"], P("data", None)),
]


@pytest.mark.parametrize("kind, axis, of_x, sums, spec", CUTS)
@pytest.mark.parametrize("mesh", [MESH, cpu_mesh(AxisType.Auto)], ids=["explicit", "automatic"])
def test_matmul_while_a_mesh_is_set(mesh, kind, axis, of_x, sums, spec):
    problem = case("set_mesh", zeros="v1", m=8)
    x, stack = put(mesh, problem.x, *of_x), jm.shard(problem.stack(), mesh, kind, axis)
    with jax.set_mesh(mesh):
        out, found = run(lambda x, stack: jm.matmul(x, stack[1]), x, stack)
        gradient = jax.grad(lambda x: jm.matmul(x, stack[1]).sum())(x)
    weight, dtype = problem.weights[1], problem.x.dtype
    budget = oracle.matmul_budget(problem.x, weight, dtype)
    oracle.assert_within(out, oracle.matmul(problem.x, weight), budget)
    ones = np.ones(out.shape)
    budget = oracle.matmul_budget(ones, weight.T, dtype)
    oracle.assert_within(gradient, oracle.matmul(ones, weight.T), budget)
    assert kinds(found) == sums


@pytest.mark.parametrize("kind, axis, of_x, sums, spec", CUTS)
def test_matmul(kind, axis, of_x, sums, spec):
    problem = case("explicit", zeros="v1", bias=True)
    x, stack = put(MESH, problem.x, *of_x), jm.shard(problem.stack(), MESH, kind, axis)

    def linear(x, stack):
        out = jm.matmul(x, stack[1])
        assert jax.typeof(out).sharding.spec == spec
        return out

    out, found = run(linear, x, stack)
    assert problem.bias is not None
    bias = problem.bias[1]
    oracle.assert_within(
        out,
        oracle.matmul(problem.x, problem.weights[1], bias),
        oracle.matmul_budget(problem.x, problem.weights[1], problem.x.dtype, bias),
    )
    assert kinds(found) == sums


@pytest.mark.parametrize("kind, axis, of_x, sums, spec", CUTS)
def test_ragged_dot(kind, axis, of_x, sums, spec):
    problem, sizes = case("explicit_ragged"), np.array([3, 1, 0, 4])
    x, stack = put(MESH, problem.x, *of_x), jm.shard(problem.stack(), MESH, kind, axis)
    out, found = run(jm.ragged_dot, x, stack, jnp.asarray(sizes))
    assert jax.typeof(out).sharding.spec == spec and kinds(found) == sums
    ids = np.repeat(np.arange(4), sizes)[:, None]
    result, magnitude = (
        oracle.routed_rows(f(problem.x), f(problem.weights), ids) for f in (np.asarray, np.abs)
    )
    oracle.assert_within(out, result, 2.0**-16 * magnitude)


@pytest.mark.parametrize("spec", [P("data"), P("tensor"), P(("data", "tensor"))])
def test_group_sizes_may_be_cut(spec):
    problem, sizes = case("explicit_sizes"), jnp.array([3, 1, 0, 4])
    expected = jm.ragged_dot(jnp.asarray(problem.x), problem.stack(), sizes)
    for stack in (problem.stack(), jm.shard(problem.stack(), MESH, "expert", "tensor")):
        with jax.set_mesh(MESH):
            out = jax.jit(jm.ragged_dot)(problem.x, stack, put(MESH, sizes, *spec))
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
        out = jm.ragged_dot(jnp.asarray(problem.x), stack, put(MESH, sizes, *spec))  # no mesh set
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "kind, axis", [("expert", "expert"), ("column", "tensor"), ("row", "tensor")]
)
def test_dequantized_weights_are_cut_as_packed_ones(kind, axis):
    stack = case("explicit_dequantized", zeros="v1").stack()
    placed = jm.shard(stack, MESH, kind, axis)
    cut = {
        "expert": P("expert", None, None),
        "column": P(None, None, "tensor"),
        "row": P(None, "tensor", None),
    }
    whole = placed.dequantize()
    assert whole.sharding.spec == cut[kind]
    np.testing.assert_array_equal(whole, stack.dequantize())
    np.testing.assert_array_equal(placed[1].dequantize(), stack[1].dequantize())


PAIRED = {
    "packed": lambda problem: problem.stack(),
    "dense": lambda problem: jm.DenseExpertStack(jnp.asarray(problem.weights, jnp.float32)),
}


def paired_products(x, stack, ids):
    routing = jm.moe_align_block_size(ids, 8, 4)
    batch = jax.vmap(lambda x: jm.ragged_dot(x, stack, jnp.array([1, 0, 1, 0])))
    return (
        jm.ragged_dot(x, stack, jnp.array([3, 1, 0, 2])),
        jm.moe_matmul(x, stack, *routing, moe_block_size=8, top_k=2),
        batch(x.reshape(4, 2, -1)),
        jax.grad(lambda x: (jm.ragged_dot(x, stack, jnp.array([3, 1, 0, 2])) ** 2).sum())(x),
        jm.matmul(x, stack[1]) if isinstance(stack, jm.MarlinExpertStack) else x,
    )


@pytest.mark.parametrize("axis", ["tensor", ("data", "tensor")])
@pytest.mark.parametrize("form", PAIRED)
def test_paired_columns_come_back_in_their_old_order(form, axis):
    """Columns that `shard(..., gate_up=True)` has paired, as weights and in products."""
    problem = case("explicit_paired", n=512)
    stack = PAIRED[form](problem)
    placed = jm.shard(stack, MESH, "column", axis, gate_up=True)
    assert placed.pairs > 1
    whole = placed.dequantize()
    assert whole.sharding.spec == P(None, None, axis)
    np.testing.assert_array_equal(whole, stack.dequantize())
    x, ids = jnp.asarray(problem.x), jnp.asarray(problem.topk_ids)
    got, found = run(paired_products, put(MESH, x), placed, ids)
    assert [jax.typeof(a).sharding.spec[-1] for a in got[:3]] == [axis] * 3
    assert max(c.bytes_sent for c in found) < stack.nbytes / 8  # columns of results travel
    for one, same in zip(got, jax.jit(paired_products)(x, stack, ids), strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-5, atol=1e-4)


def test_weights_are_dequantized_where_some_axes_are_manual():
    stack = case("dequantized_in_part").stack()
    whole = jax.jit(
        jax.shard_map(
            lambda stack: stack.dequantize(), mesh=MESH, in_specs=P("expert"),
            out_specs=P("expert"), axis_names={"expert"}, check_vma=False,
        )
    )(jm.shard(stack, MESH, "expert", "expert"))  # fmt: skip
    np.testing.assert_array_equal(whole, stack.dequantize())


@pytest.mark.parametrize("kind, axis", [("expert", "expert"), (("column", "row"), "tensor")])
def test_layer(kind, axis):
    layer = Layer(case("explicit_layer", bias=True), case("explicit_down", k=128, n=192))
    stacks = jm.shard(layer.stacks(), MESH, kind, axis, gate_up=True)
    tokens = [put(MESH, a, "data") for a in (layer.x, *layer.routes)]
    out, found = run(jm.moe_ffn, *tokens, *stacks)
    assert jax.typeof(out).sharding.spec == P("data", None) and kinds(found) == ["all-reduce"]
    oracle.assert_within(out, *expected(layer))


@pytest.mark.parametrize("kind, axis", [("expert", "expert"), (("column", "row"), "tensor")])
def test_layer_of_dense_stacks(kind, axis):
    """Composed of single products, whose order of rows all devices know: ids alone are gathered."""
    layer = Layer(case("dense_layer", bias=True), case("dense_down", k=128, n=192, bias=True))
    placed = jm.shard(layer.dense_stacks(), MESH, kind, axis, gate_up=True)
    tokens = [put(MESH, a, "data") for a in (layer.x, *layer.routes)]
    out, found = run(jm.moe_ffn, *tokens, *placed)
    assert jax.typeof(out).sharding.spec == P("data", None)
    oracle.assert_within(out, *expected(layer))
    assert {*kinds(found)} == {"all-reduce"}


def test_a_routing_table_counts_the_rows_of_all_devices():
    ids = np.array([[2, 0], [2, 1], [0, 2], [1, 1]], np.int32)
    on_mesh = jax.jit(jm.moe_align_block_size, static_argnums=(1, 2))(put(MESH, ids, "data"), 2, 3)
    jax.tree.map(np.testing.assert_array_equal, on_mesh, jm.moe_align_block_size(ids, 2, 3))


def test_an_operand_that_cannot_be_used_as_it_lies_is_refused():
    problem = case("explicit_misfit", g_idx="per_expert")
    stack = jm.shard(problem.stack(), MESH, "column", "tensor")
    sizes = jnp.array([3, 1, 0, 4])
    with pytest.raises(
        ValueError, match=r"ragged_dot: x \[8, 256\] has sharding .*its axis 1 cannot"
    ):
        jax.jit(jm.ragged_dot)(put(MESH, problem.x, None, "data"), stack, sizes)
    with pytest.raises(ValueError, match=r"ragged_dot: x .*axis 0 cannot be cut over tensor"):
        jax.jit(jm.ragged_dot)(put(MESH, problem.x, "tensor"), stack, sizes)


def test_a_product_of_a_layer_is_named():
    """x fits a layer of dense stacks and its gate_up; the hidden rows do not fit its down."""
    layer = Layer(case("named_layer", bias=True), case("named_down", k=128, n=192, bias=True))
    tokens = [put(MESH, a, "data") for a in (layer.x, *layer.routes)]
    gate_up, down = layer.dense_stacks()
    cut = jm.shard(gate_up, MESH, "expert", "expert"), jm.shard(down, MESH, "column", "data")
    with pytest.raises(
        ValueError,
        match=r"moe_ffn, in its product with down: x \[16, 128\] has sharding .*axis 0 can",
    ):
        jax.jit(jm.moe_ffn).lower(*tokens, *cut)
    with pytest.raises(
        ValueError, match=r"moe_ffn, in its product with gate_up: x \[8, 256\] has sh"
    ):
        jax.jit(jm.moe_ffn).lower(put(MESH, layer.x, "expert"), *tokens[1:], *cut)


def vmapped(x, ids, weights, stacks, axis=0):
    return jax.vmap(lambda *tokens: jm.moe_ffn(*tokens, *stacks), axis)(x, ids, weights)


def ragged(x, stack):
    return jm.ragged_dot(x, stack, jnp.array([1, 0, 1, 0]))


FRONT, BEHIND = ("data", None), (None, "data")
FOLDED = {  # call, cut of the tokens [4, 2], how the message begins
    "matmul": (lambda x, i, w, s: jm.matmul(x, s[0][1]), BEHIND, "matmul: x has"),
    "moe_ffn": (lambda x, i, w, s: jm.moe_ffn(x, i, w, *s), BEHIND, "moe_ffn: topk_ids has"),
    "vmap": (vmapped, BEHIND, "moe_ffn: x, its mapped axis first, has"),
    "vmap_behind": (
        lambda x, i, w, s: vmapped(x, i, w, s, 1), FRONT, "moe_ffn: x, its mapped axis first, has"
    ),
    "vmap_matmul": (
        lambda x, i, w, s: jax.vmap(lambda x: jm.matmul(x, s[0][1]), 1)(x), FRONT,
        "matmul: x, its mapped axis first, has",
    ),
    "vmap_ragged": (
        lambda x, i, w, s: jax.vmap(lambda x: ragged(x, s[0]))(x), BEHIND,
        "ragged_dot: x, its mapped axis first, has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_axes_that_cannot_be_folded_as_they_are_cut_are_refused(name):
    function, cut, message = FOLDED[name]
    layer = Layer(case("folded_layer"), case("folded_down", k=128, n=192))
    stacks = jm.shard(layer.stacks(), MESH, "expert", "expert")
    tokens = [a.reshape(4, 2, -1) for a in (layer.x, *layer.routes)]
    lower = jax.jit(function).lower
    with pytest.raises(ValueError, match=message + r" type .*@data.* folded into one, .*reshard"):
        lower(*(put(MESH, a, *cut) for a in tokens), stacks)
    lower(*(put(MESH, a, *cut[::-1]) for a in tokens), stacks)


def test_routes_cut_over_top_k_are_refused():
    layer = Layer(case("cut_routes", bias=True), case("cut_routes_down", k=128, n=192, bias=True))
    ids, weights = (put(MESH, a, None, "data") for a in layer.routes)
    for stacks in (layer.stacks(), layer.dense_stacks()):
        placed = jm.shard(stacks, MESH, "expert", "expert")
        with pytest.raises(ValueError, match=r"moe_ffn: topk_ids has type int32\[8,2@data\]"):
            jax.jit(jm.moe_ffn).lower(put(MESH, layer.x), ids, weights, *placed)
    problem = case("cut_routes", bias=True)
    stack, routing = problem.stack(), jm.moe_align_block_size(problem.topk_ids, 8, 4)
    with pytest.raises(ValueError, match=r"moe_matmul: topk_weights has type float32\[8,2@data\]"):
        jm.moe_matmul(problem.x, stack, *routing, moe_block_size=8, top_k=2, topk_weights=weights)
