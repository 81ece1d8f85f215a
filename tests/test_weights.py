"""The pytrees: invariants, indexing, views, dequantization; under jit, scan, vmap, tree.map."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from linears import assert_dense, build, dense, random_linear

from jax_marlin.layout import unpack_columns, unpack_tiles
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.weights import MarlinExpertStack, MarlinLinear

LINEARS = [random_linear(e, asymmetric=True, act_order=True, bias=True) for e in range(3)]


@pytest.fixture(scope="module")
def stack() -> MarlinExpertStack:
    return build(LINEARS)


def same(a, b) -> None:
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def test_leaves_hold_the_equation_of_the_docstring(stack):
    group = np.arange(96) // 32
    for e, linear in enumerate(LINEARS):
        codes = unpack_tiles(np.asarray(stack.qweight[e]), 4)[:96, :192].astype(np.float64)
        zeros = unpack_columns(np.asarray(stack.zero_points[e]))[group, :192]
        scales = unpack_columns(np.asarray(stack.scales[e]))[group, :192]
        same(
            (scales * (codes - zeros)).astype(np.float64), dense(linear)[np.asarray(stack.perm[e])]
        )


def test_array_like_properties(stack):
    assert (stack.num_experts, len(stack), stack.k, stack.n_per_expert) == (3, 3, 96, 192)
    assert (stack.shape, stack.ndim, stack.dtype) == ((3, 96, 192), 3, np.float32)
    leaves = jax.tree.leaves(stack)
    assert len(leaves) == 5 and all(leaf.shape[0] == 3 for leaf in leaves)
    assert stack.nbytes == sum(leaf.nbytes for leaf in leaves)
    w = stack[2]
    assert (w.shape, w.ndim, w.dtype, w.nbytes) == ((96, 192), 2, np.float32, stack.nbytes + 4)
    assert stack.zero_workspace() is stack


def test_properties_hold_under_tracing(stack):
    seen = []

    @jax.jit
    def f(s, e):
        w = s[e][:, 64:]
        seen.append((s.shape, s.dtype, s.num_experts, s.nbytes, w.shape, w.dtype, repr(s)))
        return w.dequantize()

    f(stack, 1)
    assert seen == [((3, 96, 192), np.float32, 3, stack.nbytes, (96, 128), np.float32, repr(stack))]


def test_repr_says_what_is_there(stack):
    told = "96, N=192, 4 bit, group_size=32, float32, asymmetric, act-order, bias)"
    assert repr(stack) == f"MarlinExpertStack(E=3, K={told}"
    assert repr(jax.tree.map(lambda a: a[0], stack)) == f"MarlinExpertStack(K={told}"
    assert repr(stack[0]) == f"MarlinLinear(K={told}"
    assert repr(build([random_linear(0)])).endswith("group_size=32, float32)")
    assert "group_size=32, ?" in repr(jax.tree.map(lambda _: object(), stack))


def test_leaves_may_be_anything_that_jax_puts_there(stack):
    shapes = jax.eval_shape(lambda: stack)
    assert (shapes.shape, shapes.nbytes) == (stack.shape, stack.nbytes)
    axes = jax.tree.map(lambda _: 0, stack)
    assert jax.tree.structure(axes) == jax.tree.structure(stack)
    assert jax.tree.structure(stack) == jax.tree.structure(jax.tree.map(lambda a: a[:2], stack))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dequantize_is_exact_up_to_one_rounding_of_the_scale_and_one_of_the_value(dtype):
    stack = build(LINEARS, dtype=dtype)
    rounded = [dataclasses.replace(w, scales=w.scales.astype(dtype)) for w in LINEARS]
    expected = np.stack([dense(linear) for linear in rounded])
    same(
        stack.dequantize(), expected.astype(np.float32).astype(dtype)
    )  # scale * int is exact in f32
    same(stack.dequantize(jnp.float32), expected.astype(np.float32))


def test_one_expert_many_ways(stack):
    expected = dense(LINEARS[1]).astype(np.float32)
    assert stack[1].stack is stack
    for index in (1, -2, np.int64(1), np.array(1), jnp.int32(1), jnp.uint8(1)):
        same(stack[index].dequantize(), expected)
    same(jax.jit(lambda s, e: s[e].dequantize())(stack, 1), expected)
    same(jax.tree.map(lambda a: a[1], stack).dequantize(), expected)
    same(stack[1:][0].dequantize(), expected)
    same([w.dequantize() for w in stack][1], expected)


def test_a_traced_index_out_of_range_is_clamped(stack):
    f = jax.jit(lambda s, e: s[e].dequantize())
    same(f(stack, 99), stack[2].dequantize())
    same(f(stack, -1), stack[0].dequantize())


def test_a_slice_is_a_smaller_stack(stack):
    part = stack[1:3]
    assert part.shape == (2, 96, 192) and part.spec is stack.spec
    assert_dense(part, LINEARS[1:])


def test_scan_and_vmap_over_experts_yield_linears(stack):
    expected = np.stack([dense(linear) for linear in LINEARS]).astype(np.float32)

    def step(carry, expert):
        assert expert.is_single and expert.shape == (96, 192) and expert.num_experts == 1
        return carry, expert.dequantize()

    same(jax.lax.scan(step, 0, stack)[1], expected)
    same(jax.vmap(lambda expert: expert.dequantize())(stack), expected)
    indices = jnp.arange(3, dtype=jnp.int32)
    same(jax.lax.map(lambda e: stack[e].dequantize(), indices), expected)
    same(jax.vmap(lambda e: stack[e].dequantize())(indices), expected)
    views = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)  # layers of MarlinLinear
    same(jax.lax.scan(lambda carry, w: (carry, w.dequantize()), 0, views)[1], expected)


def test_columns_of_a_linear(stack):
    whole = np.asarray(stack[1].dequantize())
    same(stack[1][:, 64:128].dequantize(), whole[:, 64:128])
    same(stack[1][:, -128:].dequantize(), whole[:, 64:])
    nested = stack[1][:, 64:][:, 64:]
    assert nested.columns == (128, 192) and nested.stack is stack
    same(nested.dequantize(), whole[:, 128:])
    own_bias = dataclasses.replace(stack[1], bias=jnp.arange(192.0))
    same(own_bias[:, 128:].bias, np.arange(128, 192, dtype=np.float32))

    spec = QuantSpec.create(bits=4, group_size=32, k=96, n=150)
    ragged = build([random_linear(0, spec)], spec)[0]
    same(ragged[:, 64:].dequantize(), np.asarray(ragged.dequantize())[:, 64:])


def test_a_column_view_copies_no_weights_under_jit(stack):
    jaxpr = str(jax.make_jaxpr(lambda s, e: s[e][:, 64:].stack.qweight)(stack, 1))
    assert "slice" not in jaxpr and "gather" not in jaxpr


def test_astype_changes_the_compute_dtype_and_keeps_the_codes(stack):
    half = stack.astype(jnp.bfloat16)
    assert half.scales.dtype == half.zero_points.dtype == half.bias.dtype == jnp.bfloat16
    assert half.qweight is stack.qweight and half.perm is stack.perm and half.spec is stack.spec
    same(half.scales, stack.scales.astype(jnp.bfloat16))
    w = dataclasses.replace(stack[1], bias=jnp.ones(192)).astype(jnp.float16)
    assert w.dtype == jnp.float16 and w.bias is not None and w.bias.dtype == jnp.float16
    plain = build([random_linear(0)]).astype("bfloat16")
    assert plain.dtype == jnp.bfloat16 and plain.bias is None


def test_linear_as_a_call_and_as_an_operand(stack):
    x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    w = dense(LINEARS[2])
    budget = oracle.matmul_budget(x, w, np.float32, LINEARS[2].bias)
    expected = oracle.matmul(x, w, LINEARS[2].bias)
    oracle.assert_within(stack[2](jnp.asarray(x)), expected, budget)
    single = jax.tree.map(lambda a: a[2], stack)
    assert isinstance(single.as_linear(), MarlinLinear)
    oracle.assert_within(single.as_linear()(jnp.asarray(x)), expected, budget)


def test_dequantize_holds_one_expert_in_float32():
    spec = QuantSpec.create(bits=4, group_size=64, k=256, n=320)
    stack = build([random_linear(e, spec, act_order=True) for e in range(16)], spec, jnp.bfloat16)
    compiled = jax.jit(lambda s: s.dequantize()).lower(stack).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        pytest.skip("this backend does not report memory")
    assert analysis.temp_size_in_bytes < 4 * (4 * 256 * 320)  # of 16 experts; a few buffers of one


@pytest.mark.parametrize("index", [3, -4, np.int32(3)])
def test_a_static_index_out_of_range_raises(stack, index):
    with pytest.raises(IndexError, match=f"index {index} is out of range for 3 experts"):
        stack[index]


def test_bad_indices_are_refused(stack):
    for index in (True, 1.0, "1", (0, 1), [0], None):
        with pytest.raises(TypeError, match="expected an integer, an integer scalar or a:b"):
            stack[index]
    for index in (jnp.float32(1), jnp.arange(2), jnp.array(True)):
        with pytest.raises(TypeError, match="expected an integer scalar"):
            stack[index]
    for part in (slice(None, None, 2), slice(2, 2), slice(7, 9)):
        with pytest.raises(ValueError, match="expected step 1 and at least one of 3 experts"):
            stack[part]
    single = jax.tree.map(lambda a: a[0], stack)
    with pytest.raises(TypeError, match="the leaves have no expert axis"):
        single[0]
    with pytest.raises(TypeError, match=r"of shape \(3, 96, 192\) is no linear, choose an expert"):
        stack.as_linear()


def test_bad_columns_are_refused(stack):
    w = stack[0]
    for index in (0, slice(0, 64), (slice(0, 64), slice(None)), (slice(None), 64)):
        with pytest.raises(TypeError, match=r"expected \[:, a:b\]"):
            w[index]
    for columns in (slice(32, 128), slice(0, 100), slice(64, 64), slice(0, 128, 2)):
        with pytest.raises(ValueError, match=r"of 192, expected multiples of 64 \(or the end\)"):
            w[:, columns]


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, "float8_e4m3fn"])
def test_other_compute_dtypes_are_refused(stack, dtype):
    for weight, name in ((stack, "MarlinExpertStack"), (stack[0], "MarlinLinear")):
        with pytest.raises(
            TypeError, match=f"{name}.astype: dtype is .*, expected float16, bfloat16"
        ):
            weight.astype(dtype)
