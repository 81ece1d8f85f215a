"""ragged_dot: `jax.lax.ragged_dot`'s meaning on packed experts, wild group sizes, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import Problem, build, implementation

from jax_marlin.ops.ragged_dot import ragged_dot

PROBLEMS = [
    Problem("float32", dtype="float32", m=13),
    Problem("float16_v1_zeros_off_the_tile", zeros="v1", k=96, n=72, group_size=32, m=17),
    Problem("bfloat16_8bit_g_idx_per_expert", dtype="bfloat16", bits=8, g_idx="per_expert", m=37),
    Problem("float16_bias_g_idx_shared", bias=True, g_idx="shared", num_experts=5, m=9),
]
SMALL = Problem("ragged", dtype="float32", k=64, n=72, group_size=32, m=11, num_experts=4)


def sizes_of(p: Problem) -> np.ndarray:
    """Uneven, one group empty, two rows past the end."""
    sizes = np.zeros(p.num_experts, np.int32)
    sizes[0], sizes[-1] = 3, p.m - 5
    return sizes


def grouped(case, sizes, first=0):
    """float64 result and error budget with the case's bias; group g meets expert g - first."""
    y = np.zeros((len(case.x), case.weights.shape[2]))
    budget, start = np.zeros(y.shape), 0
    for group, size in enumerate(sizes):
        rows, start = slice(start, start + size), start + size
        if 0 <= group - first < len(case.weights):
            w = case.weights[group - first]
            bias = None if case.bias is None else case.bias[group - first].astype(np.float64)
            x = case.x[rows].astype(np.float64)
            y[rows] = oracle.matmul(x, w, bias)
            budget[rows] = oracle.matmul_budget(x, w, case.x.dtype, bias)
    return y, budget


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_groups(p, backend):
    case, sizes = build(p), sizes_of(p)
    got = ragged_dot(
        jnp.asarray(case.x), case.stack(), jnp.asarray(sizes),
        implementation=implementation(backend, p.dtype),
    )  # fmt: skip
    assert got.dtype == case.x.dtype
    expected, budget = grouped(case, sizes)
    oracle.assert_within(got, expected, budget)
    assert not np.asarray(got, np.float32)[sizes.sum() :].any()


def test_the_same_as_lax_ragged_dot_on_the_dequantized_stack():
    case = build(SMALL)
    stack, x, sizes = case.stack(), jnp.asarray(case.x), jnp.array([0, 4, 1, 5])
    theirs = jax.lax.ragged_dot(x, stack.dequantize(), sizes, precision="highest")
    np.testing.assert_allclose(ragged_dot(x, stack, sizes), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "meant"),
    [
        ([11, 0, 0, 0], [11, 0, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([-4, 3, -(2**31), 2], [0, 3, 0, 2]),  # negative sizes are empty groups
        ([4, 900, 5, 6], [4, 7, 0, 0]),  # the sum ends at M
        ([2**31 - 1, 2**31 - 1, 2**31 - 1, 7], [11, 0, 0, 0]),  # whose sum overflows int32
        ([5, -3, 2**31 - 1, 2**31 - 1], [5, 0, 6, 0]),
    ],
)
def test_group_sizes_on_the_device_may_be_anything(sizes, meant, backend):
    case = build(SMALL)
    got = jax.jit(ragged_dot)(jnp.asarray(case.x), case.stack(), jnp.array(sizes, jnp.int32))
    oracle.assert_within(got, *grouped(case, meant))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64"])
def test_integer_dtypes_of_group_sizes(dtype):
    case = build(Problem("long", dtype="float32", k=32, n=64, group_size=32, m=300))
    sizes = np.array([100, 120, 9], dtype)
    with jax.enable_x64(dtype == "int64"):
        got = ragged_dot(jnp.asarray(case.x), case.stack(), jnp.asarray(sizes))
    oracle.assert_within(got, *grouped(case, sizes.astype(int)))


@pytest.mark.parametrize("sizes", [[1, 2, 0, 3, 1, 2, 1], [2, 3], [2, 0, 1, 4, 1]])
@pytest.mark.parametrize("first", [0, 2, 6, 40])
def test_group_offset_is_the_first_group_of_the_stack(sizes, first):
    case = build(SMALL)
    expected = grouped(case, sizes, first)
    for offset in (jnp.int32(first), jnp.array([first]), first, np.array([first], np.uint8)):
        got = ragged_dot(jnp.asarray(case.x), case.stack(), jnp.array(sizes), group_offset=offset)
        oracle.assert_within(got, *expected)


def test_a_negative_group_offset_on_the_device_counts_as_zero():
    case, sizes = build(SMALL), [1, 2, 3, 4]
    got = ragged_dot(
        jnp.asarray(case.x), case.stack(), jnp.array(sizes), group_offset=jnp.array([-(2**31)])
    )
    oracle.assert_within(got, *grouped(case, sizes))


def test_preferred_element_type(backend):
    case, sizes = build(PROBLEMS[2]), sizes_of(PROBLEMS[2])
    got = ragged_dot(
        jnp.asarray(case.x), case.stack(), sizes,
        preferred_element_type=jnp.float32, implementation=backend,
    )  # fmt: skip
    assert got.dtype == jnp.float32
    oracle.assert_within(got, *grouped(case, sizes))
    other = ragged_dot(jnp.asarray(case.x), case.stack(), sizes, preferred_element_type=jnp.float16)
    assert other.dtype == jnp.float16


@pytest.mark.parametrize(
    "precision", [None, "highest", jax.lax.Precision.DEFAULT, ("high", jax.lax.Precision.HIGH)]
)
def test_every_named_precision_is_accepted(precision):
    case, sizes = build(SMALL), [1, 2, 3, 4]
    got = ragged_dot(jnp.asarray(case.x), case.stack(), sizes, precision=precision)
    oracle.assert_within(got, *grouped(case, sizes))


def test_no_rows():
    case = build(SMALL)
    assert ragged_dot(jnp.zeros((0, 64)), case.stack(), jnp.array([3, 0, 1, 2])).shape == (0, 72)
    assert ragged_dot(jnp.zeros((0, 64)), case.stack(), [0, 0, 0, 0]).shape == (0, 72)


def test_vmap_over_rows_and_sizes():
    case = build(SMALL)
    x = jnp.stack([jnp.asarray(case.x), 2 * jnp.asarray(case.x)])
    sizes = jnp.array([[1, 2, 3, 4], [0, 6, 0, 5]])
    got = jax.jit(jax.vmap(ragged_dot, (0, None, 0)))(x, case.stack(), sizes)
    for i, factor in enumerate((1, 2)):
        expected, budget = grouped(case, sizes[i].tolist())
        oracle.assert_within(got[i], factor * expected, factor * budget)


STACK = build(SMALL).stack()
X = np.zeros((11, 64), np.float32)
ERRORS = [
    ({"x": X[:, :63]}, ValueError, r"x has shape \(11, 63\)"),
    ({"x": X[0]}, ValueError, r"x has shape \(64,\)"),
    ({"x": X.astype(np.float16)}, TypeError, r"x has dtype float16 .* w.astype"),
    ({"stack": X}, TypeError, r"stack is .*expected a MarlinExpertStack"),
    ({"group_sizes": np.ones(3, np.int32)}, ValueError, r"group_sizes has shape \(3,\), expected"),
    ({"group_sizes": np.ones(4)}, TypeError, "group_sizes has dtype float64"),
    ({"group_sizes": [3, -1, 2, 0]}, ValueError, "group_sizes holds -1"),
    ({"group_sizes": [3, 4, 2, 3]}, ValueError, "group_sizes sums to 12, expected at most 11"),
    ({"group_offset": 1.0}, TypeError, "group_offset has dtype float64"),
    ({"group_offset": -1}, ValueError, "group_offset is -1"),
    ({"group_offset": [0, 1]}, ValueError, r"group_offset has shape \(2,\)"),
    ({"precision": "exact"}, ValueError, "precision is 'exact'"),
    (
        {"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32},
        NotImplementedError,
        "precision is .*dot algorithms",
    ),
    ({"preferred_element_type": jnp.int32}, TypeError, "preferred_element_type is int32"),
    ({"implementation": "triton"}, ValueError, "implementation is 'triton'"),
    ({"implementation": "cuda"}, NotImplementedError, "implementation='cuda'"),  # float32
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors_name_the_argument(changes, error, message):
    arguments = {"x": X, "stack": STACK, "group_sizes": np.array([3, 4, 2, 2])}
    assert ragged_dot(**arguments).shape == (11, 72)
    with pytest.raises(error, match="^ragged_dot: " + message):
        ragged_dot(**(arguments | changes))
