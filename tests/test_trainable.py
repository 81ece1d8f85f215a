"""split_trainable and merge_trainable: what is frozen, what is trained, and both together again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linears import SPEC, build, random_linear

import jax_marlin as jm

STACK = build([random_linear(e, asymmetric=True, act_order=True, bias=True) for e in range(3)])
TREE = {
    "stack": STACK,
    "view": dataclasses.replace(STACK[1], bias=jnp.ones(SPEC.n)),
    "no_bias": build([random_linear(5)]),
    "dense": jm.DenseExpertStack(jnp.ones((2, 8, 4)), jnp.zeros((2, 4))),
    "norms": [jnp.ones(8, jnp.bfloat16), np.ones(3, np.float32)],
    "ids": jnp.arange(3),
    "flags": (True, None, "text", 2.5),
}
TRAINABLE = 1 + 2 + 0 + 2 + 2  # the biases, the dense weight, the norms


def test_what_is_packed_is_frozen_and_the_rest_of_the_floats_is_trained():
    trainable, frozen = jm.split_trainable(TREE)
    sizes = [len(jax.tree.leaves(part)) for part in (trainable, frozen, TREE)]
    assert sizes == [TRAINABLE, sizes[2] - TRAINABLE, sizes[2]]
    for part in (trainable["stack"], trainable["view"].stack):
        assert (part.qweight, part.scales, part.zero_points, part.perm) == (None,) * 4
        assert part.bias is STACK.bias
    assert frozen["stack"].bias is None and frozen["stack"].qweight is STACK.qweight
    assert trainable["view"].expert is None and frozen["ids"] is TREE["ids"]
    assert jax.tree.leaves(trainable["no_bias"]) == []
    assert jax.tree.leaves(frozen["dense"]) == []
    assert repr(trainable["stack"]).startswith("MarlinExpertStack(K=96, N=192")


def test_merging_gives_the_same_tree():
    merged = jm.merge_trainable(*jm.split_trainable(TREE))
    assert jax.tree.structure(merged) == jax.tree.structure(TREE)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(TREE), strict=True))


def test_under_tracing_and_with_shapes_alone():
    merged = jax.jit(lambda tree: jm.merge_trainable(*jm.split_trainable(tree)))(STACK)
    jax.tree.map(np.testing.assert_array_equal, merged, STACK)
    trainable, _ = jm.split_trainable(jax.eval_shape(lambda: STACK))
    assert trainable.bias.shape == (3, SPEC.n) and trainable.scales is None


def test_parts_of_different_trees_are_refused():
    trainable, frozen = jm.split_trainable({"a": jnp.ones(2), "b": jnp.arange(2)})
    with pytest.raises(ValueError, match="merge_trainable: a leaf is in both"):
        jm.merge_trainable(trainable, {"a": jnp.ones(2), "b": frozen["b"]})
    with pytest.raises(ValueError, match=r"[Kk]ey"):
        jm.merge_trainable(trainable, {"c": frozen["b"]})


def test_plain_grad_without_allow_int():
    trainable, frozen = jm.split_trainable({"experts": STACK, "scale": jnp.ones(SPEC.k)})
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, SPEC.k)), jnp.float32)

    def loss(trainable):
        layer = jm.merge_trainable(trainable, frozen)
        y = jm.ragged_dot(x * layer["scale"][None], layer["experts"], jnp.array([2, 0, 4]))
        return (y**2).mean()

    gradient = jax.jit(jax.grad(loss))(trainable)
    assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
    assert len(jax.tree.leaves(gradient)) == 2
    assert gradient["scale"].all() and not gradient["experts"].bias[1].any()
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, trainable, gradient)
    assert loss(moved) < loss(trainable)
