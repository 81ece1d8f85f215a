"""Inside jax.shard_map: local sizes from the leaves, out_specs that must be right, sums by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from meshes import P, case, cpu_mesh, kinds, run

import jax_marlin as jm

MESH = cpu_mesh()


def mapped(function, in_specs, out_specs, **options):
    return jax.shard_map(function, mesh=MESH, in_specs=in_specs, out_specs=out_specs, **options)


def dense(problem, expert):
    bias = None if problem.bias is None else problem.bias[expert]
    x = problem.x.astype(float)
    arguments = (x, problem.weights[expert])
    return oracle.matmul(*arguments, bias), oracle.matmul_budget(*arguments, problem.x.dtype, bias)


def test_column_shards_know_their_own_size():
    problem = case("manual_column", zeros="v1", bias=True)
    stack = jm.shard(problem.stack(), MESH, "column", "tensor")

    def product(x, stack):
        assert (stack.shape, stack.n_per_expert, stack[1].shape) == ((4, 256, 128), 128, (256, 128))
        assert "N=128" in repr(stack) and "N=128" in repr(stack[1])
        return jm.matmul(x, stack[1])

    specs = jm.partition_specs(stack, "column", "tensor")
    out, found = run(mapped(product, (P("data"), specs), P("data", "tensor")), problem.x, stack)
    oracle.assert_within(out, *dense(problem, 1))
    assert not found


def test_row_shards_are_added_up_by_the_caller():
    problem = case("manual_row", zeros="v2", bias=True)
    stack = jm.shard(problem.stack(), MESH, "row", "tensor")
    specs = jm.partition_specs(stack, "row", "tensor")

    def product(x, stack):
        assert stack.shape == (4, 128, 256) and stack.held_spec.group_size == 64
        stack = jm.bias_on_first(stack, "tensor")
        return jax.lax.psum(jm.matmul(x, stack[2]), "tensor")

    function = mapped(product, (P("data", "tensor"), specs), P("data"))
    out, found = run(function, problem.x, stack)
    oracle.assert_within(out, *dense(problem, 2))
    assert kinds(found) == ["all-reduce"]


def test_a_bias_that_would_be_added_by_every_device_is_refused():
    problem = case("manual_row_bias", bias=True)
    stack = jm.shard(problem.stack(), MESH, "row", "tensor")
    specs = (P("data", "tensor"), jm.partition_specs(stack, "row", "tensor"))

    def product(x, stack):
        return jax.lax.psum(jm.matmul(x, stack[2]), "tensor")

    for options in ({}, {"check_vma": False}):
        with pytest.raises(
            ValueError, match=r"a shard of 128 of 256 rows has a bias, .*bias_on_fi"
        ):
            mapped(product, specs, P("data"), **options)(problem.x, stack)


def test_expert_shards():
    problem = case("manual_expert", bias=True)
    stack = jm.shard(problem.stack(), MESH, "expert", "expert")
    sizes = np.array([3, 0, 4, 1])

    def product(x, stack, sizes):
        first = jax.lax.axis_index("expert") * stack.num_experts
        out = jm.ragged_dot(x, stack, sizes, group_offset=first)
        return jax.lax.psum(out, "expert")

    specs = (P(), jm.partition_specs(stack, "expert", "expert"), P())
    out, found = run(mapped(product, specs, P()), problem.x, stack, jnp.asarray(sizes))
    ids = np.repeat(np.arange(4), sizes)[:, None]
    assert problem.bias is not None
    expected, magnitude = (
        oracle.routed_rows(f(problem.x), f(problem.weights), ids, f(problem.bias))
        for f in (np.asarray, np.abs)
    )
    oracle.assert_within(out, expected, 2.0**-16 * magnitude)
    assert kinds(found) == ["all-reduce"]


def routed(x, stack, ids):
    routing = jm.moe_align_block_size(ids, 8, stack.num_experts)
    return jm.moe_matmul(x, stack, *routing, moe_block_size=8, top_k=2)


OPS = {
    "matmul": lambda x, stack, ids: jm.matmul(x, stack[1]),
    "ragged_dot": lambda x, stack, ids: jm.ragged_dot(x, stack, jnp.array([3, 1, 0, 2])),
    "moe_matmul": routed,
    "moe_ffn": lambda x, stack, ids: jm.moe_ffn(x, ids, jnp.ones(ids.shape), stack, half(stack)),
}


def half(stack):
    """A down of 128 rows for the gate|up `stack`: its own first rows."""
    return dataclasses.replace(
        stack,
        qweight=stack.qweight[:, :, :2],
        scales=stack.scales[:, :, :2],
        spec=dataclasses.replace(stack.spec, k=128),
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("varies", ["x", "stack"])
def test_a_wrong_out_spec_is_an_error(op, varies):
    problem = case("manual_out_spec")
    ids = jnp.asarray(problem.topk_ids)
    axis = "data" if varies == "x" else "tensor"
    of_x = P("data") if varies == "x" else P()
    stack = problem.stack()
    of_stack = jax.tree.map(lambda _: P(), stack)
    if varies == "stack":  # different scales on each device
        of_stack = dataclasses.replace(of_stack, scales=P(None, None, None, None, "tensor"))
        stack = dataclasses.replace(stack, scales=jnp.stack([stack.scales] * 2, axis=-1))

    def function(x, stack, ids):
        scales = stack.scales[..., 0] if varies == "stack" else stack.scales
        return OPS[op](x, dataclasses.replace(stack, scales=scales), ids)

    call = lambda out: mapped(function, (of_x, of_stack, of_x), out)(problem.x, stack, ids)  # noqa: E731
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(lambda: call(P()))
    assert jax.eval_shape(lambda: call(P(axis))).ndim == 2


def test_leaves_cut_apart_are_refused():
    stack = case("manual_apart").stack()
    specs = jm.partition_specs(stack, "column", "tensor")
    wrong = dataclasses.replace(specs, scales=P())
    with pytest.raises(
        ValueError, match=r"matmul: the stack's scales have shape \(4, 4, 4, 64\), "
    ):
        mapped(lambda x, s: jm.matmul(x, s[1]), (P(), wrong), P(None, "tensor"))(
            jnp.ones((3, 256)), stack
        )
    stack = case("manual_groups", k=384, group_size=256).stack()
    rows = dataclasses.replace(
        jm.partition_specs(stack, "column", "tensor"),
        qweight=P(None, None, "tensor"),
        scales=P(None, None, "tensor"),
    )
    with pytest.raises(
        ValueError, match="hold 192 of 384 rows, no equal part of whole tiles and gr"
    ):
        mapped(
            lambda x, s: jax.lax.psum(jm.matmul(x, s[1]), "tensor"), (P(None, "tensor"), rows), P()
        )(jnp.ones((3, 384)), stack)


def test_gate_up_cut_without_pairs_is_refused():
    gate_up, down = case("manual_unpaired"), case("manual_unpaired_down", k=128)
    stacks = jm.shard((gate_up.stack(), down.stack()), MESH, ("column", "row"), "tensor")
    specs = jm.partition_specs(stacks, ("column", "row"), "tensor")
    arrays = (gate_up.x, jnp.asarray(gate_up.topk_ids), jnp.asarray(gate_up.topk_weights))
    function = lambda *a: jax.lax.psum(jm.moe_ffn(*a), "tensor")  # noqa: E731
    with pytest.raises(
        ValueError, match=r"gate_up holds 128 of its 256 columns, .*shard\(..., gate_up="
    ):
        mapped(function, (P("data"), P("data"), P("data"), *specs), P("data"))(*arrays, *stacks)
