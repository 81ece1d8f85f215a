"""matmul: the contract on every backend, views, transformations, and each error with its twin."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from jax.sharding import Mesh, PartitionSpec
from jaxprs import equations

from jax_marlin.gptq import load_gptq_stacked
from jax_marlin.ops.matmul import TARGET, matmul

EXPERT = 1


@functools.cache
def small() -> tuple[problems.Case, np.ndarray]:
    """float32 act-order experts with bias and zero points, N off the tile; and x @ W of each."""
    problem = problems.Problem(
        "views", m=5, k=96, n=200, group_size=32, dtype="float32", zeros="v1", bias=True,
        g_idx="per_expert", num_experts=4,
    )  # fmt: skip
    case = problems.build(problem)
    assert case.bias is not None
    return case, oracle.matmul(case.x, case.weights) + case.bias.astype(np.float64)[:, None]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("problem", problems.PROBLEMS, ids=str)
def test_contract(problem, backend):
    case = problems.build(problem)
    w = problems.poison(case.stack(), [EXPERT])[EXPERT]
    implementation = problems.implementation(backend, problem.dtype)
    weight = case.weights[EXPERT]
    bias = None if case.bias is None else case.bias[EXPERT]
    expected = oracle.matmul(case.x, weight, bias)
    budget = oracle.matmul_budget(case.x, weight, problem.dtype, bias)

    @jax.jit
    def both(x, w):
        wanted = (None, jnp.float32)
        return [
            matmul(x, w, preferred_element_type=d, implementation=implementation) for d in wanted
        ]

    for y, dtype in zip(both(case.x, w), (problem.dtype, jnp.float32), strict=True):
        assert y.dtype == dtype
        oracle.assert_within(y, expected, budget, problem.name)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_hot_rows_give_exact_weights(backend, bits, dtype):
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 2**bits, (2, 96, 136))
    tensors = {
        "qweights": np.stack([oracle.pack_rows(c, bits) for c in codes]),
        "scales": np.exp2(rng.integers(-6, 3, (2, 3, 136))).astype(dtype),
    }
    stack = load_gptq_stacked(**tensors, bits=bits, group_size=32)
    weight = oracle.gptq_weight(
        tensors["qweights"][1], tensors["scales"][1], bits=bits, group_size=32
    )
    y = matmul(
        np.eye(96, dtype=dtype), stack[1], implementation=problems.implementation(backend, dtype)
    )
    np.testing.assert_array_equal(np.asarray(y, np.float64), weight)


def test_same_inputs_give_the_same_bits(backend):
    case = problems.build(problems.PROBLEMS[-1])
    w, x = case.stack()[0], jnp.asarray(case.x)
    first, second = (np.asarray(matmul(x, w, implementation=backend)) for _ in range(2))
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (4, 0), (0, 2, 3)])
def test_leading_axes_of_x(leading):
    case, _ = small()
    x = np.random.default_rng(1).normal(size=(*leading, 96)).astype(np.float32)
    y = matmul(x, case.stack()[2])
    assert case.bias is not None
    close(y, oracle.matmul(x, case.weights[2], case.bias[2]))


def test_column_slice_and_own_bias():
    case, expected = small()
    w = case.stack()[3]
    close(matmul(case.x, w[:, 64:]), expected[3][:, 64:])
    close(matmul(case.x, w[:, 64:128]), expected[3][:, 64:128])
    own = np.linspace(-2, 2, 136, dtype=np.float32)
    replaced = dataclasses.replace(w[:, 64:], bias=jnp.asarray(own))
    assert case.bias is not None
    close(matmul(case.x, replaced), expected[3][:, 64:] - case.bias[3, 64:] + own)
    close(replaced[:, 64:](case.x), (expected[3][:, 64:] - case.bias[3, 64:] + own)[:, 64:])


def test_traced_expert_index_is_clamped():
    case, expected = small()
    multiply = jax.jit(lambda x, stack, e: matmul(x, stack[e]))
    for e, used in ((2, 2), (0, 0), (99, 3), (-7, 0), (-1, 0), (jnp.uint32(2**32 - 1), 3)):
        close(multiply(case.x, case.stack(), e), expected[used])


def test_leaves_without_expert_axis_are_one_weight():
    case, expected = small()
    stack = case.stack()
    close(matmul(case.x, jax.tree.map(lambda leaf: leaf[3], stack)), expected[3])
    close(jax.lax.scan(lambda carry, w: (carry, matmul(case.x, w)), 0, stack)[1], expected)
    close(jax.vmap(lambda w: matmul(case.x, w))(stack), expected)
    close(jax.vmap(matmul)(np.stack([case.x] * 4), stack), expected)


def test_vmap_over_linears_with_own_bias():
    case, expected = small()
    w = dataclasses.replace(case.stack()[2], bias=jnp.zeros(200))
    biases = jnp.asarray(np.random.default_rng(3).normal(size=(3, 200)), jnp.float32)
    y = jax.vmap(lambda b: matmul(case.x, dataclasses.replace(w, bias=b)))(biases)
    assert case.bias is not None
    close(y, (expected[2] - case.bias[2])[None] + np.asarray(biases)[:, None])


def test_vmap_over_stacks_folds_them_into_one():
    case, expected = small()
    stacks = jax.tree.map(lambda leaf: jnp.stack([leaf[:2], leaf[2:]]), case.stack())
    experts = jnp.array([1, 0])
    multiply = jax.vmap(lambda stack, e: matmul(case.x, stack[e]))
    close(multiply(stacks, experts), expected[[1, 2]])
    close(multiply(stacks, jnp.array([2, -1])), expected[[1, 2]])  # clamped to its own stack
    nested = jax.vmap(jax.vmap(lambda w: matmul(case.x, w)))(stacks)
    close(nested, expected.reshape(2, 2, 5, 200))


def test_vmap_over_x_is_one_call_that_copies_no_weights():
    case, expected = small()
    w = case.stack()[2]
    xs = jnp.asarray(np.stack([case.x, 2 * case.x, 3 * case.x], axis=1))  # [5, 3, K]
    batched = jax.vmap(lambda x: matmul(x, w), in_axes=1, out_axes=1)
    assert case.bias is not None
    product = (expected[2] - case.bias[2])[:, None, :]
    close(batched(xs), product * np.array([[1], [2], [3]]) + case.bias[2])
    calls = [e for e in equations(batched, xs) if e.primitive.name == TARGET]
    assert [np.shape(c.invars[1].aval) for c in calls] == [w.stack.qweight.shape]
    assert np.shape(calls[0].outvars[0].aval) == (15, 200)


def test_vmap_over_expert_index():
    case, expected = small()
    stack = case.stack()
    y = jax.vmap(lambda e: matmul(case.x, stack[e]))(jnp.array([3, 0, 1]))
    close(y, expected[[3, 0, 1]])
    xs = jnp.asarray(np.stack([case.x] * 2))
    close(jax.vmap(lambda x, e: matmul(x, stack[e]))(xs, jnp.array([2, 1])), expected[[2, 1]])


def test_shard_map_types_the_result():
    case, expected = small()
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    rows, whole = PartitionSpec("rows"), PartitionSpec()

    def sharded(in_specs, out_specs):
        return jax.jit(
            jax.shard_map(
                lambda x, stack: matmul(x, stack[1]),
                mesh=mesh, in_specs=in_specs, out_specs=out_specs,
            )
        )  # fmt: skip

    close(sharded((rows, whole), rows)(case.x, case.stack()), expected[1])
    close(sharded((whole, rows), rows)(case.x, case.stack()), expected[1])
    close(sharded((whole, whole), whole)(case.x, case.stack()), expected[1])
    with pytest.raises(ValueError, match="out_specs"):
        sharded((rows, whole), whole)(case.x, case.stack())


def test_symbolic_rows_export():
    case, expected = small()
    stack = case.stack()
    (rows,) = jax.export.symbolic_shape("rows")
    exported = jax.export.export(jax.jit(lambda x: matmul(x, stack[1])))(
        jax.ShapeDtypeStruct((rows, 96), jnp.float32)
    )
    for m in (1, 4):
        close(exported.call(case.x[:m]), expected[1][:m])


def test_preferred_element_type_is_cast_from_float32():
    case, expected = small()
    w = case.stack()[1]
    y = matmul(case.x, w, preferred_element_type=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    close(matmul(case.x, w).astype(jnp.bfloat16).astype(jnp.float32), y.astype(jnp.float32))
    half = w.astype(jnp.float16)
    y = matmul(case.x.astype(np.float16), half, preferred_element_type=jnp.bfloat16)
    np.testing.assert_allclose(y.astype(jnp.float32), expected[1], rtol=2**-8, atol=0.02)


class TestErrors:
    def test_x_of_another_width(self):
        case, _ = small()
        with pytest.raises(ValueError, match=r"x has shape \(5, 95\), expected \[\.\.\., 96\]"):
            matmul(case.x[:, :95], case.stack()[0])
        with pytest.raises(ValueError, match=r"matmul: x has shape \(\)"):
            matmul(np.float32(1), case.stack()[0])

    def test_x_of_another_dtype(self):
        case, _ = small()
        x = case.x.astype(np.float16)
        with pytest.raises(TypeError, match=r"x has dtype float16 .* float32; use w.astype"):
            matmul(x, case.stack()[0])
        assert matmul(x, case.stack()[0].astype(jnp.float16)).dtype == jnp.float16

    def test_a_stack_is_no_weight(self):
        case, _ = small()
        with pytest.raises(TypeError, match=r"stack of 4 experts, expected one weight; use w\[e\]"):
            matmul(case.x, case.stack())
        with pytest.raises(TypeError, match="w is ndarray, expected MarlinLinear"):
            matmul(case.x, case.weights[0])  # type: ignore[arg-type]

    def test_no_x(self):
        with pytest.raises(TypeError, match=r"^matmul: x is None, expected an array of float32"):
            matmul(None, small()[0].stack()[0])  # type: ignore[arg-type]

    @pytest.mark.parametrize("dtype", ["int32", "float99"])
    def test_preferred_element_type_is_a_float(self, dtype):
        case, _ = small()
        with pytest.raises(TypeError, match=rf"^matmul: preferred_element_type is .?{dtype}"):
            matmul(case.x, case.stack()[0], preferred_element_type=dtype)
        assert matmul(case.x, case.stack()[0], preferred_element_type="float16").dtype == "float16"

    def test_unknown_implementation(self):
        case, expected = small()
        with pytest.raises(ValueError, match="implementation is 'triton', expected None, 'cuda'"):
            matmul(case.x, case.stack()[0], implementation="triton")
        close(matmul(case.x, case.stack()[0], implementation="xla"), expected[0])

    def test_cuda_has_no_float32(self):
        case, _ = small()
        with pytest.raises(NotImplementedError, match=r"'cuda' computes in float16 or bfloat16"):
            matmul(case.x, case.stack()[0], implementation="cuda")


def test_many_rows_in_chunks_are_the_same_rows():
    """Past the rows that the default lowering takes at once; the last chunk overlaps."""
    case, _ = small()
    w = case.stack()[1]
    x = jnp.asarray(np.random.default_rng(4).normal(size=(601, w.shape[0])), w.dtype)
    whole = matmul(x, w, implementation="xla")
    parts = [matmul(x[i : i + 200], w, implementation="xla") for i in range(0, 601, 200)]
    close(np.concatenate([np.asarray(p) for p in parts]), np.asarray(whole))
