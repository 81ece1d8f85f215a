"""The weights as pytrees in other hands: pickle, copy, tree.map, Equinox, Flax, Orbax."""

import copy
import importlib.util
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linears import SPEC, build, random_linear

import jax_marlin as jm

STACK = build([random_linear(e, asymmetric=True, act_order=True, bias=True) for e in range(3)])
X = jnp.asarray(np.random.default_rng(0).standard_normal((5, SPEC.k)), jnp.float32)
SIZES = jnp.array([2, 0, 3])


def same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def pickled(weight):
    return pickle.loads(pickle.dumps(weight))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("weight", [STACK, STACK[1], jm.DenseExpertStack(jnp.ones((2, 8, 4)))],
                         ids=["stack", "linear", "dense"])  # fmt: skip
def test_copies(duplicate, weight):
    other = duplicate(weight)
    same(other, weight)
    assert repr(other) == repr(weight) and other.nbytes == weight.nbytes


@pytest.mark.parametrize("weight", [STACK, STACK[1], jax.tree.map(lambda leaf: leaf[1], STACK)],
                         ids=["stack", "linear", "single"])  # fmt: skip
def test_an_ellipsis_is_all_of_it(weight):
    assert weight[...] is weight


def test_tree_map_over_experts():
    """Leaves reordered, sliced and stacked along the expert axis are stacks of those experts."""
    expected = jm.ragged_dot(X, STACK, SIZES)
    turned = jax.tree.map(lambda leaf: leaf[::-1], STACK)
    np.testing.assert_array_equal(jm.ragged_dot(X[::-1], turned, SIZES[::-1])[::-1], expected)
    parts = [jax.tree.map(lambda leaf, e=e: leaf[e], STACK) for e in range(3)]
    same(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts), STACK)
    np.testing.assert_allclose(jm.matmul(X[:2], parts[0]), expected[:2], rtol=1e-5, atol=1e-5)


def test_nbytes_is_what_lies_in_memory():
    leaves = jax.tree.leaves(STACK)
    assert STACK.nbytes == sum(leaf.nbytes for leaf in leaves)
    assert STACK.nbytes == sum(len(np.asarray(leaf).tobytes()) for leaf in leaves)
    assert STACK.qweight.nbytes == 3 * 2 * 3 * 64 * 64 // 2  # half a byte for each padded weight


def test_device_put_with_one_sharding_for_all_leaves():
    device = jax.devices()[0]
    same(jax.device_put(STACK, jax.sharding.SingleDeviceSharding(device)), STACK)


def needs(module: str):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


@needs("equinox")
def test_equinox_filters():
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    class Layer(eqx.Module):
        experts: jm.MarlinExpertStack
        scale: jax.Array

        def __call__(self, x):
            return jm.ragged_dot(x * self.scale, self.experts, SIZES)

    layer = Layer(STACK, jnp.ones((1, SPEC.k)))
    np.testing.assert_allclose(eqx.filter_jit(layer)(X), layer(X), rtol=1e-5, atol=1e-5)
    gradient = eqx.filter_grad(lambda layer: layer(X).sum())(layer)
    assert gradient.experts.qweight is None and gradient.scale.any()
    trainable, frozen = jm.split_trainable(layer)
    same(eqx.combine(trainable, frozen), layer)


@needs("flax")
def test_flax_nnx_parameters():
    from flax import nnx  # pyright: ignore[reportMissingImports]

    class Layer(nnx.Module):
        def __init__(self):
            self.experts = nnx.data(STACK)
            self.scale = nnx.Param(jnp.ones((1, SPEC.k)))
            self.variable = nnx.Variable(STACK)

        def __call__(self, x):
            return jm.ragged_dot(x * self.scale[...], self.experts, SIZES)

    layer = Layer()
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, X), layer(X), rtol=1e-5, atol=1e-5)
    gradient = nnx.grad(lambda m: m(X).sum())(layer)
    assert gradient["scale"][...].any()
    same(layer.variable.get_value(), STACK)


@needs("flax")
def test_flax_nnx_param_of_a_stack():
    """As a Param it is part of the state: split, merged, updated, and frozen by a filter."""
    from flax import nnx  # pyright: ignore[reportMissingImports]

    class Scale(nnx.Variable):
        pass

    class Layer(nnx.Module):
        def __init__(self):
            self.experts = nnx.Param(STACK)
            self.scale = Scale(jnp.ones((1, SPEC.k)))

        def __call__(self, x):
            return jm.ragged_dot(x * self.scale[...], self.experts.get_value(), SIZES)

    layer, expected = Layer(), jm.ragged_dot(X, STACK, SIZES)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, X), expected, rtol=1e-5, atol=1e-5)
    graph, packed, rest = nnx.split(layer, nnx.Param, ...)
    same(jax.tree.leaves(packed), jax.tree.leaves(STACK))
    merged = nnx.merge(graph, jax.tree.map(lambda leaf: leaf + 0, packed), rest)
    same(merged.experts.get_value(), STACK)
    gradient = nnx.grad(lambda m: m(X).sum(), argnums=nnx.DiffState(0, Scale))(layer)
    assert jax.tree.leaves(gradient)[0].any() and len(jax.tree.leaves(gradient)) == 1


@needs("orbax")
def test_orbax_saves_and_restores(tmp_path):
    import orbax.checkpoint as ocp  # pyright: ignore[reportMissingImports]

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stack", STACK)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "stack", jax.eval_shape(lambda: STACK))
    same(restored, STACK)
