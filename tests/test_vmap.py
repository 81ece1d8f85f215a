"""vmap of every op over x, over stacks, over both, nested; of gradients, and gradients of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations
from operations import OPS, PRIMITIVES, STACKED, E, H, arguments

from jax_marlin.ops import transposed_product

B = 3
PACKED = (E, 2, 2, 512)  # qweight of the stack; down's is [E, 2, 1, 512]


def batch(*batched, **fields):
    """(arguments with a leading axis on those named, in_axes, the arguments one by one)."""
    singles = [arguments(seed, **fields) for seed in range(B)]
    first = singles[0]
    singles = [first._replace(**{name: getattr(s, name) for name in batched}) for s in singles]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    whole = first._replace(**{name: getattr(stacked, name) for name in batched})
    axes = [0 if name in batched else None for name in first._fields]
    return whole, axes, singles


def close(actual, expected):
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)


def calls(op, function, *operands):
    """Shapes of the packed weights in each call that multiplies."""
    name, position = PRIMITIVES[op]
    found = [e for e in equations(function, *operands) if e.primitive.name == name]
    return [np.shape(e.invars[position].aval) for e in found]


def one_by_one(function, singles):
    return jax.tree.map(lambda *parts: jnp.stack(parts), *[function(*s) for s in singles])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batched", [("x",), ("x", "ids", "weights")], ids=["x", "tokens"])
def test_over_x_is_one_call_that_copies_no_weights(op, batched):
    operands, axes, singles = batch(*batched)
    function = jax.vmap(OPS[op], axes)
    close(jax.jit(function)(*operands), one_by_one(OPS[op], singles))
    assert calls(op, function, *operands) == [PACKED]
    repeated = [
        e.primitive.name
        for e in equations(function, *operands)
        if any(v.aval.dtype == jnp.uint32 and v.aval.ndim >= 4 for v in e.outvars)
    ]
    assert repeated == []


@pytest.mark.parametrize("op", STACKED)
@pytest.mark.parametrize("g_idx", ["none", "shared", "per_expert"])
@pytest.mark.parametrize("batched", [("stack", "down"), ("x", "stack", "down")],
                         ids=["stacks", "x_and_stacks"])  # fmt: skip
def test_over_stacks_is_one_call_of_one_larger_stack(op, batched, g_idx):
    operands, axes, singles = batch(*batched, g_idx=g_idx)
    function = jax.vmap(OPS[op], axes)
    close(jax.jit(function)(*operands), one_by_one(OPS[op], singles))
    assert calls(op, function, *operands) == [(B * E, *PACKED[1:])]


@pytest.mark.parametrize("batched", [("stack",), ("x", "stack")], ids=["stacks", "x_and_stacks"])
def test_matmul_over_stacks_slices_no_weights(batched):
    """One call after another, which reads its expert of one larger stack."""
    operands, axes, singles = batch(*batched)
    function = jax.vmap(OPS["matmul"], axes)
    close(jax.jit(function)(*operands), one_by_one(OPS["matmul"], singles))
    assert calls("matmul", function, *operands) == [(B * E, *PACKED[1:])]


@pytest.mark.parametrize("op", ["moe_ffn"])
def test_over_one_of_two_stacks(op):
    operands, axes, singles = batch("down")
    close(jax.vmap(OPS[op], axes)(*operands), one_by_one(OPS[op], singles))


@pytest.mark.parametrize("op", OPS)
def test_over_the_bias_alone(op):
    """As with adapters that are biases: the packed weights are the same for all."""
    operands, _, _ = batch()
    biases = jnp.arange(B * E * H, dtype=jnp.float32).reshape(B, E, H) / H

    def function(bias):
        return OPS[op](*operands._replace(stack=dataclasses.replace(operands.stack, bias=bias)))

    close(jax.vmap(function)(biases), jnp.stack([function(bias) for bias in biases]))


@pytest.mark.parametrize("op", OPS)
def test_nested(op):
    """Layers outside, batches of tokens inside; and the other way round for in_axes that differ."""
    operands, axes, singles = batch("x", "stack", "down")
    xs = jnp.stack([operands.x, 2 * operands.x], axis=2)  # [B, T, 2, H]
    inner = jax.vmap(OPS[op], (1, None, None, None, None), 1)
    got = jax.vmap(inner, axes)(*operands._replace(x=xs))
    expected = jnp.stack(
        [jnp.stack([OPS[op](*s._replace(x=f * s.x)) for f in (1, 2)], axis=1) for s in singles]
    )
    close(got, expected)


def gradient_of(op):
    """Gradients of x, the weights and both stacks' biases: everything that has one."""

    def gradient(x, ids, weights, stack, down):
        def loss(x, weights, first, second):
            new = (dataclasses.replace(s, bias=b) for s, b in ((stack, first), (down, second)))
            return (OPS[op](x, ids, weights, *new) ** 2).sum()

        return jax.grad(loss, (0, 1, 2, 3))(x, weights, stack.bias, down.bias)

    return gradient


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "batched",
    [("x",), ("x", "ids", "weights"), ("stack", "down"), ("x", "stack", "down")],
    ids=["x", "tokens", "stacks", "x_and_stacks"],
)
def test_of_gradients(op, batched):
    """Per-example gradients; each backward pass is one transposed product for a stack."""
    operands, axes, singles = batch(*batched, g_idx="per_expert")
    function = jax.vmap(gradient_of(op), axes)
    close(jax.jit(function)(*operands), one_by_one(gradient_of(op), singles))
    transposed = [
        e for e in equations(function, *operands) if e.primitive.name == transposed_product.TARGET
    ]
    assert len(transposed) == (2 if op == "moe_ffn" else 1)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_it(op):
    operands, axes, singles = batch("x", "weights")

    def loss(x, weights):
        return (jax.vmap(OPS[op], axes)(*operands._replace(x=x, weights=weights)) ** 2).sum()

    def single(*single):
        return gradient_of(op)(*single)[:2]

    close(jax.grad(loss, (0, 1))(operands.x, operands.weights), one_by_one(single, singles))


def test_of_nothing():
    operands, axes, _ = batch("x", "ids", "weights")
    empty = operands._replace(**{n: getattr(operands, n)[:0] for n in ("x", "ids", "weights")})
    for op, function in OPS.items():
        rows = 12 if op == "moe_matmul" else 6
        assert jax.vmap(function, axes)(*empty).shape == (0, rows, H)
