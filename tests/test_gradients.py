"""Reverse mode of matmul, moe_matmul and ragged_dot against float64, element by element."""

import dataclasses
from typing import Any

import gradient_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import PROBLEMS, Problem, align, build, implementation, poison

import jax_marlin as jm
from jax_marlin.ops.moe_matmul import Routing, routed_matmul


def cotangent(seed: int, y: jax.Array) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(y.shape), y.dtype)


def wide(a) -> np.ndarray:
    return np.asarray(a).astype(np.float64)


def with_bias(stack, bias):
    return dataclasses.replace(stack, bias=bias)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_matmul(problem, backend):
    """x and the bias, whether it is the stack's or the view's own, which is never both."""
    case, e = build(problem), problem.num_experts - 1
    stack, which = case.stack(), implementation(backend, problem.dtype)

    def product(x, bias):
        return jm.matmul(x, with_bias(stack, bias)[e], implementation=which)

    y, pull_back = jax.vjp(product, jnp.asarray(case.x), stack.bias)
    g = cotangent(1, y)
    d_x, d_bias = jax.jit(pull_back)(g)
    assert d_x.dtype == case.x.dtype
    exact = gradient_oracle.routed(
        wide(g), case.x, case.weights, np.full((problem.m, 1), e), problem.dtype
    )
    oracle.assert_within(d_x, *exact.x, what="x")
    if stack.bias is None:
        assert d_bias is None
    else:
        assert d_bias.dtype == stack.dtype
        oracle.assert_within(d_bias, *exact.bias, what="bias")


@pytest.mark.parametrize(
    ("problem", "before"),
    [(p, before) for p in PROBLEMS for before in (False, True) if p.bias or not before],
    ids=lambda value: {False: "weights_last", True: "weights_before_bias"}.get(value, str(value)),
)
def test_routed_rows(problem, before, backend):
    """x, topk_weights and bias; experts that no row names hold NaN, as do the weights of no row."""
    case = build(problem)
    routing = align(case.topk_ids, problem.moe_block_size, problem.num_experts)
    ids = case.topk_ids
    routed = (ids >= 0) & (ids < problem.num_experts)
    stack = poison(case.stack(), np.unique(ids[routed]))
    weights = jnp.asarray(np.where(routed, case.topk_weights, np.nan))

    def product(x, weights, bias):
        return routed_matmul(
            x, with_bias(stack, bias), Routing(*map(jnp.asarray, routing)),
            moe_block_size=problem.moe_block_size, top_k=problem.top_k, topk_weights=weights,
            weights_before_bias=before, implementation=implementation(backend, problem.dtype),
        )  # fmt: skip

    y, pull_back = jax.vjp(product, jnp.asarray(case.x), weights, stack.bias)
    g = cotangent(2, y)
    d_x, d_weights, d_bias = jax.jit(pull_back)(g)
    assert d_x.dtype == case.x.dtype and d_weights.dtype == jnp.float32
    exact = gradient_oracle.routed(
        wide(g), case.x, case.weights, ids, problem.dtype,
        weights=case.topk_weights, bias=case.bias, weights_before_bias=before,
    )  # fmt: skip
    oracle.assert_within(d_x, *exact.x, what="x")
    oracle.assert_within(d_weights, *exact.weights, what="topk_weights")
    if stack.bias is not None:
        oracle.assert_within(d_bias, *exact.bias, what="bias")


@pytest.mark.parametrize(
    "sizes",
    [[3, 0, 5, 1], [0, 0, 0, 0], [0, 14, 0, 0], [4, 4, 4, 2]],
    ids=["rows_past_the_sum", "all_rows_past_the_sum", "one_expert", "every_row"],
)
@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float32", "bias": True},
        {"dtype": "bfloat16", "zeros": "v1", "g_idx": "per_expert", "bias": True},
        {"bits": 8, "g_idx": "shared"},
    ],
    ids=["float32", "bfloat16_act_order", "float16_8bit_shared_act_order"],
)
def test_ragged_dot(sizes, fields, backend):
    problem = Problem("ragged", m=14, k=96, n=136, group_size=32, num_experts=4, **fields)
    case = build(problem)
    stack = case.stack()

    def product(x, bias):
        return jm.ragged_dot(
            x, with_bias(stack, bias), jnp.asarray(sizes),
            implementation=implementation(backend, problem.dtype),
        )  # fmt: skip

    y, pull_back = jax.vjp(product, jnp.asarray(case.x), stack.bias)
    g = cotangent(3, y)
    d_x, d_bias = jax.jit(pull_back)(g)
    ids = np.repeat([0, 1, 2, 3, -1], [*sizes, 14 - sum(sizes)])[:, None]
    exact = gradient_oracle.routed(wide(g), case.x, case.weights, ids, problem.dtype)
    oracle.assert_within(d_x, *exact.x, what="x")
    if stack.bias is not None:
        oracle.assert_within(d_bias, *exact.bias, what="bias")


SMALL = Problem("small", m=7, k=96, n=200, group_size=32, dtype="float32", num_experts=4, bias=True)


def test_column_views_and_own_bias():
    """A view's gradient touches its columns of the stack's bias, or the bias it brings along."""
    case = build(SMALL)
    stack = case.stack()
    g = cotangent(4, jnp.zeros((7, 72)))

    def view(x, bias):
        return jm.matmul(x, with_bias(stack, bias)[2][:, 128:])

    d_x, d_bias = jax.vjp(view, jnp.asarray(case.x), stack.bias)[1](g)
    weight = case.weights[2:3, :, 128:]
    exact = gradient_oracle.routed(g, case.x, weight, np.zeros((7, 1), int), "float32")
    oracle.assert_within(d_x, *exact.x)
    oracle.assert_within(d_bias[2, 128:], exact.bias.value[0], exact.bias.budget[0])
    assert not d_bias.at[2, 128:].set(0).any()

    own = jnp.ones(72)

    def replaced(own, bias):
        w = with_bias(stack, bias)[2][:, 128:]
        return jm.matmul(case.x, dataclasses.replace(w, bias=own))

    d_own, d_bias = jax.vjp(replaced, own, stack.bias)[1](g)
    oracle.assert_within(d_own, exact.bias.value[0], exact.bias.budget[0])
    assert not d_bias.any()


@pytest.mark.parametrize("e", [-7, 99])
def test_expert_index_is_clamped_as_in_the_forward_pass(e):
    case = build(SMALL)
    stack = case.stack()
    inside = min(max(e, 0), 3)

    def grads(e):
        def loss(x, bias):
            return jm.matmul(x, with_bias(stack, bias)[e]).sum()

        return jax.grad(loss, (0, 1))(jnp.asarray(case.x), stack.bias)

    jax.tree.map(np.testing.assert_array_equal, jax.jit(grads)(e), jax.jit(grads)(inside))


def test_preferred_element_type():
    """The cotangent of a float32 result is not rounded to x's dtype before it is multiplied."""
    case = build(dataclasses.replace(SMALL, dtype="float16"))
    w = case.stack()[1]
    g = cotangent(5, jnp.zeros((7, 200), jnp.float32)) * 1e-6  # subnormal in float16
    product = lambda x: jm.matmul(x, w, preferred_element_type=jnp.float32)  # noqa: E731
    (d_x,) = jax.vjp(product, jnp.asarray(case.x))[1](1e5 * g)
    exact = gradient_oracle.routed(
        1e5 * wide(g), case.x, case.weights[1:2], np.zeros((7, 1), int), "float16"
    )
    oracle.assert_within(d_x, *exact.x)


def operations() -> dict[str, Any]:
    """Each op as a function of (x, stack) on SMALL."""
    case = build(SMALL)
    routing = tuple(map(jnp.asarray, align(case.topk_ids, 8, 4)))
    ids, weights = jnp.asarray(case.topk_ids), jnp.asarray(case.topk_weights)
    down = jm.quantize(jnp.ones((4, 100, 24)), group_size=-1)
    return {
        "matmul": lambda x, stack: jm.matmul(x, stack[1]),
        "ragged_dot": lambda x, stack: jm.ragged_dot(x, stack, jnp.array([3, 0, 2, 1])),
        "moe_matmul": lambda x, stack: jm.moe_matmul(
            x, stack, *routing, moe_block_size=8, top_k=2, topk_weights=weights
        ),
        "moe_ffn": lambda x, stack: jm.moe_ffn(x, ids, weights, stack, down),
    }


OPS = sorted(operations())


@pytest.mark.parametrize("op", OPS)
def test_packed_leaves_get_float0_and_frozen_ones_zero(op):
    case = build(dataclasses.replace(SMALL, zeros="v1", g_idx="per_expert"))
    function = operations()[op]
    loss = lambda stack: function(jnp.asarray(case.x), stack).sum()  # noqa: E731
    d_stack = jax.grad(loss, allow_int=True)(case.stack())
    assert d_stack.qweight.dtype == d_stack.perm.dtype == jax.dtypes.float0
    assert not d_stack.scales.any() and not d_stack.zero_points.any()
    assert d_stack.scales.shape == case.stack().scales.shape
    assert d_stack.bias.any()
    with pytest.raises(TypeError, match=r"uint32.*allow_int"):
        jax.grad(loss)(case.stack())


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op):
    case = build(SMALL)
    x, stack, function = jnp.asarray(case.x), case.stack(), operations()[op]
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: function(x, stack), (x,), (x,))


@pytest.mark.parametrize("op", OPS)
def test_second_order_is_refused(op):
    case = build(SMALL)
    x, stack, function = jnp.asarray(case.x), case.stack(), operations()[op]
    gradient = jax.grad(lambda x: (function(x, stack) ** 2).sum())
    with pytest.raises(NotImplementedError, match="jax_marlin_transposed_product"):
        jax.grad(lambda x: gradient(x).sum())(x)


@pytest.mark.parametrize("op", OPS)
def test_same_inputs_same_bits(op):
    case = build(SMALL)
    x, stack, function = jnp.asarray(case.x), case.stack(), operations()[op]
    gradient = jax.jit(jax.grad(lambda x: (function(x, stack) ** 2).sum()))
    np.testing.assert_array_equal(gradient(x), gradient(x))
