"""Sharded weights as pytrees: one spec for a whole stack, and checkpoints of other libraries."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import P, case, cpu_mesh, kinds, put, run

import jax_marlin as jm

MESH = cpu_mesh()
EXPERTS = NamedSharding(MESH, P("expert"))
FIELDS = {"zeros": "v1", "bias": True, "g_idx": "per_expert"}
SIZES = jnp.array([3, 0, 4, 1])
CUTS = ["expert", ("expert", "tensor"), None]  # axes that cut the experts


def stacks():
    """A packed stack with every leaf that there is, and a dense one."""
    problem = case("prefix", **FIELDS)
    dense = jm.DenseExpertStack(
        jnp.asarray(problem.weights, jnp.float32), jnp.asarray(problem.bias)
    )
    return problem, {"packed": problem.stack(), "dense": dense}


def assert_cut(stack, sharding):
    for leaf in jax.tree.leaves(stack):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_one_sharding_for_a_whole_stack(kind):
    """A prefix of the tree, as `P("expert")`: on every leaf the experts are the first axis."""
    problem, both = stacks()
    stack, x = both[kind], jnp.asarray(problem.x)
    assert_cut(jax.device_put(stack, EXPERTS), EXPERTS)
    assert_cut(jax.jit(lambda s: s, out_shardings=EXPERTS)(stack), EXPERTS)
    expected = jm.ragged_dot(x, stack, SIZES)
    product = jax.jit(jm.ragged_dot, in_shardings=(None, EXPERTS, None))
    compiled = product.lower(x, jax.tree.map(np.asarray, stack), SIZES).compile()
    text = compiled.as_text() or ""
    assert "all-reduce(" in text and "all-gather(" not in text
    np.testing.assert_allclose(product(x, stack, SIZES), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_one_spec_for_a_whole_stack_in_shard_map(kind):
    problem, both = stacks()
    placed = jax.device_put(both[kind], EXPERTS)

    def own(x, stack):
        first = jax.lax.axis_index("expert") * stack.num_experts
        return jax.lax.psum(jm.ragged_dot(x, stack, SIZES, group_offset=first), "expert")

    function = jax.shard_map(own, mesh=MESH, in_specs=(P(), P("expert")), out_specs=P())
    out, found = run(function, put(MESH, problem.x), placed)
    expected = jm.ragged_dot(problem.x, both[kind], SIZES)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
    assert kinds(found) == ["all-reduce"]


@pytest.mark.skipif(importlib.util.find_spec("orbax") is None, reason="orbax is not installed")
@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_orbax_restores_shards_as_they_are_asked_for(tmp_path, kind):
    """Saved from experts cut over two devices; restored cut over four, by columns, and whole."""
    import orbax.checkpoint as ocp  # pyright: ignore[reportMissingImports]

    stack = stacks()[1][kind]
    by_columns = jm.partition_specs(stack, "column", "tensor")
    alike = [jax.tree.map(lambda _, axes=axes: P(axes), stack) for axes in CUTS]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stack", jax.device_put(stack, EXPERTS))
        checkpointer.wait_until_finished()
        for specs in (*alike, by_columns):
            shardings = jax.tree.map(lambda spec: NamedSharding(MESH, spec), specs)
            wanted = jax.tree.map(
                lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
                stack, shardings,
            )  # fmt: skip
            restored = checkpointer.restore(tmp_path / "stack", wanted)
            assert jax.tree.structure(restored) == jax.tree.structure(stack)
            for leaf, exact, s in zip(
                *map(jax.tree.leaves, (restored, stack, shardings)), strict=True
            ):
                np.testing.assert_array_equal(leaf, exact)
                assert leaf.sharding.is_equivalent_to(s, leaf.ndim)
