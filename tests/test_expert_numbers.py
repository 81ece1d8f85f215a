"""Inside jax.shard_map: ids of all experts beside a part of them are refused where types tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from meshes import P, case, cpu_mesh
from moe_layers import Layer, expected

import jax_marlin as jm

MESH = cpu_mesh()
LAYER = Layer(case("numbers", bias=True), case("numbers_down", k=128, n=192, bias=True))
STACKS = LAYER.stacks()
SIZES = jnp.array([3, 0, 4, 1])


def over_experts(function, stacks=STACKS):
    """`function(x, ids, weights, gate_up, down)`, summed over the devices that cut the experts."""
    placed = jm.shard(stacks, MESH, "expert", "expert")
    mapped = jax.shard_map(
        lambda *a: jax.lax.psum(function(*a), "expert"), mesh=MESH, out_specs=P(),
        in_specs=(*[P()] * 3, *jm.partition_specs(placed, "expert", "expert")),
    )  # fmt: skip
    return jax.jit(mapped)(LAYER.x, *LAYER.routes, *placed)


def layer(x, ids, weights, gate_up, down):
    return jm.moe_ffn(x, ids, weights, gate_up, down)


def routed(x, ids, weights, gate_up, down, expert_map=None):
    experts = gate_up.num_experts if expert_map is None else 4
    routing = jm.moe_align_block_size(ids, 8, experts, expert_map)
    return jm.moe_matmul(x, gate_up, *routing, moe_block_size=8, top_k=2, topk_weights=weights)


def ragged(x, ids, weights, gate_up, down, group_offset=None):
    sizes = SIZES[: gate_up.num_experts] if group_offset is None else SIZES
    return jm.ragged_dot(x, gate_up, sizes, group_offset=group_offset)


def own(ids, stack):
    """Ids of a device's own experts, -1 for those of others."""
    local = ids - jax.lax.axis_index("expert") * stack.num_experts
    return jnp.where((local >= 0) & (local < stack.num_experts), local, -1)


OPS = {  # call, the same with what its error asks for
    "moe_ffn": (layer, lambda x, ids, w, s, d: layer(x, own(ids, s), w, s, d)),
    "moe_matmul": (
        routed, lambda x, ids, w, s, d: routed(x, ids, w, s, d, own(jnp.arange(4), s))
    ),
    "ragged_dot": (
        ragged,
        lambda x, ids, w, s, d: ragged(
            x, ids, w, s, d, jax.lax.axis_index("expert") * s.num_experts
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_the_same_ids_for_other_experts_are_refused(op):
    given, corrected = OPS[op]
    whole = given(jnp.asarray(LAYER.x), *LAYER.routes, *STACKS)
    with pytest.raises(ValueError, match=rf"{op}: \w+ holds other experts \(2\) on each d"):
        over_experts(given)
    out = over_experts(corrected)
    np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-4)


def test_expert_axis_is_the_remedy_of_a_layer():
    placed = jm.shard(STACKS, MESH, "expert", "expert")
    specs = jm.partition_specs(placed, "expert", "expert")
    function = functools.partial(
        jax.shard_map, mesh=MESH, in_specs=(P("data"), P("data"), P("data"), *specs),
        out_specs=P("data"),
    )  # fmt: skip
    arguments = (LAYER.x, *LAYER.routes, *placed)
    with pytest.raises(ValueError, match=r"moe_ffn: .* use expert_axis, or where every device"):
        function(lambda *a: jax.lax.psum(jm.moe_ffn(*a), "expert"))(*arguments)
    out = jax.jit(function(lambda *a: jm.moe_ffn(*a, expert_axis="expert")))(*arguments)
    oracle.assert_within(out, *expected(LAYER))


def test_experts_and_columns_cut_at_once_without_expert_axis():
    """Columns alone are no cut of the experts; the same ids beside both cuts are refused."""
    gate_up, down = jm.shard(STACKS, MESH, ("column", "row"), "tensor", gate_up=True)
    columns = jm.partition_specs((gate_up, down), ("column", "row"), "tensor")
    both = jax.tree.map(lambda spec: P("expert", *spec[1:]), columns)
    for specs, refused in ((columns, False), (both, True)):
        function = jax.shard_map(
            lambda *a: jm.moe_ffn(*a, tensor_axis="tensor"), mesh=MESH,
            in_specs=(P("data"), P("data"), P("data"), *specs), out_specs=P("data"),
        )  # fmt: skip
        if refused:
            with pytest.raises(ValueError, match=r"gate_up holds .* device along expert, tensor"):
                jax.eval_shape(function, LAYER.x, *LAYER.routes, gate_up, down)
        else:
            out = jax.jit(function)(LAYER.x, *LAYER.routes, gate_up, down)
            oracle.assert_within(out, *expected(LAYER))


def test_ids_that_are_meant_for_every_device_say_so():
    """Gathered weights have a type that varies, and all experts: the ids are cast to say so."""
    whole = functools.partial(
        jax.tree.map, lambda leaf: jax.lax.all_gather(leaf, "expert", tiled=True)
    )

    def one(x, ids, weights, gate_up, down, cast=True):
        if cast:
            ids = jax.lax.pcast(ids, "expert", to="varying")
        return jm.moe_ffn(x, ids, weights, whole(gate_up), whole(down)) / 2

    oracle.assert_within(over_experts(one), *expected(LAYER))
    with pytest.raises(ValueError, match=r"jax\.lax\.pcast\(topk_ids, 'expert', to='varying'\)"):
        over_experts(functools.partial(one, cast=False))


def test_rows_of_each_device_may_have_the_same_sizes():
    """Buffers as large for every expert, of tokens that another exchange has brought."""
    x, gate_up = jnp.asarray(LAYER.x), STACKS[0]
    ids = np.array([[0], [1]] * 4)
    function = jax.shard_map(
        lambda x, gate_up, down: (
            jm.ragged_dot(x, gate_up, np.array([1, 1])),
            jm.moe_matmul(
                x, gate_up, *jm.moe_align_block_size(ids[:2], 8, 2), moe_block_size=8, top_k=1
            ),
            jm.moe_ffn(x, ids[:2], np.ones((2, 1), np.float32), gate_up, down),
            gate_up.gemm_phase_batched(x, np.array([[0, 0, 0, 1], [1, 1, 1, 1]])),
        ),
        mesh=MESH, in_specs=P("expert"), out_specs=P("expert"),
    )  # fmt: skip
    got = jax.jit(function)(x[:4], *STACKS)
    whole = jm.ragged_dot(x[:4], gate_up, jnp.ones(4, jnp.int32))
    layer = jm.moe_ffn(x[:4], np.arange(4)[:, None], np.ones((4, 1), np.float32), *STACKS)
    for one, same in zip(got, (whole, whole, layer, whole), strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-5, atol=1e-4)


def test_dispatches_are_named():
    dispatches = jnp.array([[0, 0, 0, 3], [1, 3, 3, 2]])
    with pytest.raises(ValueError, match=r"gemm_phase_batched: .* but dispatches and x are the sa"):
        over_experts(lambda x, ids, w, stack, _: stack.gemm_phase_batched(x, dispatches))


def test_what_types_do_not_tell_is_taken_as_it_is():
    """Dense stacks, an axis of one device, tokens that are each device's own."""
    jax.eval_shape(lambda: over_experts(layer, LAYER.dense_stacks()))
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    one = jax.shard_map(
        lambda *a: jax.lax.psum(jm.moe_ffn(*a), "expert"), mesh=mesh, out_specs=P(),
        in_specs=(P(), P(), P(), P("expert"), P("expert")),
    )  # fmt: skip
    out = jax.jit(one)(LAYER.x, *LAYER.routes, *STACKS)
    oracle.assert_within(out, *expected(LAYER))
    tokens = jax.shard_map(
        jm.moe_ffn, mesh=MESH, in_specs=(P("expert"),) * 5, out_specs=P("expert")
    )
    assert jax.eval_shape(tokens, LAYER.x, *LAYER.routes, *STACKS).shape == (8, 192)
