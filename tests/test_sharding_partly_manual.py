"""Inside jax.shard_map over some axes of a mesh: ops are partitioned over the other axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from meshes import P, case, cpu_mesh, kinds, put, run
from moe_layers import Layer, expected

import jax_marlin as jm

OWN = P("data")
GATHERS = jax.__version_info__ < (0, 11, 2)  # JAX itself, on explicit axes, at shard_map's entry
EXPLICIT = pytest.param(
    AxisType.Explicit,
    marks=pytest.mark.skipif(GATHERS, reason="refused, see test_what_jax_has_gathered_is_refused"),
)
KINDS = pytest.mark.parametrize("mesh_type", [AxisType.Auto, EXPLICIT])


def mesh_of(kind: AxisType) -> Mesh:
    devices = np.array(jax.devices("cpu")[:8]).reshape(2, 4)
    return Mesh(devices, ("data", "model"), axis_types=(kind,) * 2)


def over_data(function, mesh, tokens: int, out=OWN):
    """`function` of so many arrays of tokens and one tree of weights, "data" alone manual."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=(*[OWN] * tokens, P()), out_specs=out, axis_names={"data"}
    )


def linear(x, ids, weights, stack):
    return jm.matmul(x, stack[1])


def ragged(x, ids, weights, stack):
    """The rows of each device, all of them, to experts 2, 0 and 3."""
    return jm.ragged_dot(x, stack, jnp.array([1, 0, 2, 1]))


def routed(x, ids, weights, stack):
    routing = jm.moe_align_block_size(ids, 8, 4)
    return jm.moe_matmul(x, stack, *routing, moe_block_size=8, top_k=2, topk_weights=weights)


@KINDS
@pytest.mark.parametrize("op", [linear, ragged, routed])
@pytest.mark.parametrize(
    "kind, of_x, sums, columns",
    [
        ("expert", (), ["all-reduce"], None),
        ("column", (), [], "model"),
        ("row", ("model",), ["all-reduce"], None),
    ],
)
def test_products(mesh_type, op, kind, of_x, sums, columns):
    mesh = mesh_of(mesh_type)
    problem = case("partly_manual", zeros="v1", bias=True)
    stack = jm.shard(problem.stack(), mesh, kind, "model")
    x = put(mesh, problem.x, "data", *of_x)
    routes = [put(mesh, a, "data") for a in (problem.topk_ids, problem.topk_weights)]
    out, found = run(over_data(op, mesh, 3), x, *routes, stack)
    halves = np.split(problem.x, 2), *(np.split(np.asarray(a), 2) for a in routes)
    one = [op(*half, problem.stack()) for half in zip(*halves, strict=True)]
    np.testing.assert_allclose(out, np.concatenate(one), rtol=1e-5, atol=1e-4)
    assert kinds(found) == sums
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", columns)), 2)


CUTS = pytest.mark.parametrize("kind", ["expert", ("column", "row")])
FIELDS = {"zeros": "v1", "bias": True}


def layer_of_tokens(mesh):
    """(layer, its tokens on `mesh`)."""
    fields = {"num_experts": 4, **FIELDS}
    gate_up = case("partly_gate_up", n=512, **fields)
    layer = Layer(gate_up, case("partly_down", **(fields | {"n": 192})))
    return layer, [put(mesh, a, "data") for a in (layer.x, *layer.routes)]


def halves_of(stacks):
    """A pair (gate, up) in place of gate|up; its layer is composed of single products."""
    gate_up, down = stacks
    n = gate_up.n_per_expert // 2
    spec = dataclasses.replace(gate_up.spec, n=n)
    leaves = [
        jnp.split(leaf, 2, 1)
        for leaf in (gate_up.qweight, gate_up.scales, gate_up.zero_points, gate_up.bias)
    ]
    gate, up = (
        dataclasses.replace(gate_up, qweight=q, scales=s, zero_points=z, bias=b, spec=spec)
        for q, s, z, b in zip(*leaves, strict=True)
    )
    return (gate, up), down


LAYERS = {
    "fused": lambda layer: layer.stacks(),
    "pair": lambda layer: halves_of(layer.stacks()),
    "dense": lambda layer: layer.dense_stacks(),
}


@KINDS
@CUTS
@pytest.mark.parametrize("name", LAYERS)
def test_layers(mesh_type, kind, name):
    mesh = mesh_of(mesh_type)
    layer, tokens = layer_of_tokens(mesh)
    placed = jm.shard(LAYERS[name](layer), mesh, kind, "model", gate_up=name != "pair")
    function = over_data(lambda x, ids, w, stacks: jm.moe_ffn(x, ids, w, *stacks), mesh, 3)
    out, found = run(function, *tokens, placed)
    oracle.assert_within(out, *expected(layer))
    assert {*kinds(found)} == {"all-reduce"}
    assert name != "fused" or len(found) == 1


@KINDS
@CUTS
@pytest.mark.parametrize("name", ["fused", "dense"])
def test_gradients(mesh_type, kind, name):
    """Of x, router weights and what is trained of the weights; only float32 sums travel."""
    mesh = mesh_of(mesh_type)
    layer, tokens = layer_of_tokens(mesh)
    stacks = LAYERS[name](layer)

    def gradients(layer_of_four, tokens, stacks):
        def loss(x, weights, trained, frozen, ids):
            out = layer_of_four(x, ids, weights, jm.merge_trainable(trained, frozen))
            return (out**2).sum()

        x, ids, weights = tokens
        return run(jax.grad(loss, (0, 1, 2)), x, weights, *jm.split_trainable(stacks), ids)

    def one(x, ids, weights, stacks):
        return jm.moe_ffn(x, ids, weights, *stacks)

    host = jax.device_get(jm.shard(stacks, mesh_of(AxisType.Auto), kind, "model", gate_up=True))
    placed = jm.shard(stacks, mesh, kind, "model", gate_up=True)
    got, found = gradients(over_data(one, mesh, 3), tokens, placed)
    exact, _ = gradients(one, jax.device_get(tokens), jax.tree.map(jnp.asarray, host))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())
    assert {*kinds(found)} == {"all-reduce"}


@KINDS
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_tokens_travel_by_hand_and_columns_are_cut_by_jit(mesh_type, exchange):
    """expert_axis is manual, the axis of the columns is not."""
    mesh = mesh_of(mesh_type)
    layer, tokens = layer_of_tokens(mesh)
    paired = jm.shard(layer.stacks(), mesh, ("column", "row"), "model", gate_up=True)
    by_column = jm.partition_specs(paired, ("column", "row"), "model")
    both = jax.tree.map(lambda leaf, spec: put(mesh, leaf, "data", *spec[1:]), paired, by_column)
    function = jax.shard_map(
        lambda x, ids, w, stacks: jm.moe_ffn(
            x, ids, w, *stacks, expert_axis="data", exchange=exchange
        ),
        mesh=mesh, in_specs=(OWN,) * 4, out_specs=OWN, axis_names={"data"},
    )  # fmt: skip
    out, found = run(function, *tokens, both)
    oracle.assert_within(out, *expected(layer))
    rows = {"all_gather": {"all-gather", "reduce-scatter"}, "all_to_all": {"all-to-all"}}
    assert {*kinds(found)} == {"all-reduce", *rows[exchange]}
    words = both[0].qweight.nbytes // 8
    assert max(c.bytes_sent for c in found) < words  # no packed leaf


@pytest.mark.parametrize("manual, of_x", [("data", "tensor"), ("tensor", "data")])
def test_an_axis_before_that_of_the_sum(manual, of_x):
    """XLA numbers a group's devices as it likes: here not as they stand on the mesh."""
    mesh, problem = cpu_mesh(), case("partly_numbered", bias=True)
    stack = jm.shard(problem.stack(), mesh, "row", "expert")
    x = put(mesh, problem.x, (manual, of_x), "expert")
    function = jax.shard_map(
        lambda x, stack: jm.matmul(x, stack[1]),
        mesh=mesh, in_specs=(P(manual), P()), out_specs=P(manual), axis_names={manual},
    )  # fmt: skip
    out, found = run(function, x, stack)
    assert problem.bias is not None
    arguments = (problem.x, problem.weights[1])
    budget = oracle.matmul_budget(*arguments, problem.x.dtype, problem.bias[1])
    oracle.assert_within(out, oracle.matmul(*arguments, problem.bias[1]), budget)
    assert kinds(found) == ["all-reduce"]


@KINDS
@pytest.mark.parametrize("op", [linear, ragged, routed])
def test_a_wrong_out_spec_is_an_error(mesh_type, op):
    mesh, problem = mesh_of(mesh_type), case("partly_out_spec")
    stack = jm.shard(problem.stack(), mesh, "column", "model")
    tokens = [put(mesh, a, "data") for a in (problem.x, problem.topk_ids, problem.topk_weights)]
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(over_data(op, mesh, 3, out=P()), *tokens, stack)


def test_in_another_shard_map():
    """Whose mesh is the one that is set; without one there are no devices to partition over."""
    mesh, problem = cpu_mesh(), case("partly_nested")
    stack = jm.shard(problem.stack(), mesh, "row", "tensor")
    x = put(mesh, problem.x, ("data", "expert"), "tensor")

    def over(axis, function, **mesh):
        specs = {"in_specs": (P(axis), P()), "out_specs": P(axis), "axis_names": {axis}}
        return jax.shard_map(function, **specs, **mesh)

    inner = over("expert", lambda x, stack: jm.matmul(x, stack[3]))
    with jax.set_mesh(mesh):
        out, found = run(over("data", inner), x, stack)
    arguments = (problem.x, problem.weights[3])
    budget = oracle.matmul_budget(*arguments, problem.x.dtype)
    oracle.assert_within(out, oracle.matmul(*arguments), budget)
    assert kinds(found) == ["all-reduce"]
    with pytest.raises(
        NotImplementedError, match=r"matmul: inside jax.shard_map over .*set_mesh\("
    ):
        run(over("data", inner, mesh=mesh), x, stack)


def test_an_operand_that_a_part_of_an_axis_cuts_is_refused():
    """Four devices of an axis hold eight rows; as two rows, each lies on two of them."""
    mesh, stack = mesh_of(AxisType.Auto), case("partly_divided", k=1024).stack()

    def joined(x, stack):
        routing = jm.moe_align_block_size(jnp.zeros((2, 1), jnp.int32), 8, 4)
        return jm.moe_matmul(x.reshape(2, 1024), stack, *routing, moe_block_size=8, top_k=1)

    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"moe_matmul: inside jax.shard_map over some axes, .*part"
    ):
        run(over_data(joined, mesh, 1), put(mesh, jnp.ones((16, 256)), ("data", "model")), stack)


@pytest.mark.skipif(not GATHERS, reason="this jax gathers nothing there")
def test_what_jax_has_gathered_is_refused():
    mesh, problem = mesh_of(AxisType.Explicit), case("partly_gathered")
    stack = jm.shard(problem.stack(), mesh, "column", "model")
    function = over_data(lambda x, stack: jm.matmul(x, stack[0]), mesh, 1)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"matmul: qweight has type uint32.* was gathered over mod"
    ):
        run(function, put(mesh, problem.x, "data"), stack)
