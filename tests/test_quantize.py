"""quantize: every element within half a scale, whatever the range, the dtype and the sizes."""

import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.layout import unpack_columns
from jax_marlin.quantize import quantize
from jax_marlin.weights import MarlinExpertStack, MarlinLinear

K, N = 96, 72
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]


def dense(seed: int, *shape: int) -> np.ndarray:
    """Columns of very different ranges: float32 [..., N], from 1e-6 to 1e4."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 4, shape[-1])
    return w.astype(np.float32)


def scale_of_each_element(stack: MarlinExpertStack) -> np.ndarray:
    """float64 [E, K, N]."""
    scales = unpack_columns(np.asarray(stack.scales).astype(np.float64))
    return np.repeat(scales, stack.spec.group_size, axis=1)[:, : stack.k, : stack.n_per_expert]


def worst_error_in_scales(w: np.ndarray, stack: MarlinExpertStack | MarlinLinear) -> float:
    assert isinstance(stack, MarlinExpertStack)
    scale = scale_of_each_element(stack)
    error = np.abs(np.asarray(stack.dequantize(jnp.float32), np.float64) - w)
    assert (error[scale == 0] == 0).all()
    return float((error[scale > 0] / scale[scale > 0]).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group_size", [(4, 32), (8, 64), (4, -1)])
def test_error_is_at_most_half_a_scale(bits, group_size, symmetric, dtype):
    w = dense(1, 3, K, N)
    stack = quantize(w, bits=bits, group_size=group_size, symmetric=symmetric, dtype=dtype)
    assert isinstance(stack, MarlinExpertStack)
    assert stack.shape == w.shape
    assert stack.dtype == dtype
    assert (stack.zero_points is None) == symmetric
    assert worst_error_in_scales(w, stack) <= 0.5 + 1e-4  # dequantize itself rounds to float32
    # and the scales are no wider than the range needs, where the dtype has them (float16 from 6e-5)
    needed = np.abs(w).max(axis=1, keepdims=True) * 2 / (2**bits - 2)
    steps = scale_of_each_element(stack)
    assert (steps <= np.maximum(needed, 6e-5) * 1.01).all()


def test_linear_is_a_stack_of_one():
    w = dense(2, K, N)
    linear = quantize(w, group_size=32)
    assert isinstance(linear, MarlinLinear)
    assert linear.shape == (K, N)
    expected = quantize(w[None], group_size=32).dequantize()[0]
    np.testing.assert_array_equal(linear.dequantize(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_constant_and_tiny_columns_stay_finite(symmetric, dtype):
    w = np.zeros((64, N), np.float32)
    w[:, 1], w[:, 2], w[:, 3] = 3.0, -3.0, 1e-7  # column 0 and the rest: zero
    w[:32, 4] = 5.0  # and in one group only
    w[:, 5] = 1e-44
    stack = quantize(w[None], group_size=32, symmetric=symmetric, dtype=dtype)
    back = np.asarray(stack.dequantize(jnp.float32))[0]
    assert np.isfinite(back).all()
    assert worst_error_in_scales(w, stack) <= 0.5 + 1e-4
    assert not back[:, [0, *range(6, N)]].any()
    np.testing.assert_allclose(back[:, :5], w[:, :5], rtol=0.01, atol=1e-7)


def test_what_was_quantized_before_comes_back_exactly():
    rng = np.random.default_rng(3)
    codes = rng.integers(-7, 8, (64, N))
    codes[::32] = 7  # each group uses its whole range
    w = (codes * 0.25).astype(np.float16)
    linear = quantize(w, group_size=32)
    assert linear.dtype == np.float16
    np.testing.assert_array_equal(linear.dequantize(), w)


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_columns_do_not_matter(symmetric):
    w = dense(4, 32, 1100)  # three blocks, the last one short
    whole = quantize(w, group_size=32, symmetric=symmetric).dequantize()
    for start in (0, 448, 1024):
        part = quantize(w[:, start : start + 64], group_size=32, symmetric=symmetric).dequantize()
        np.testing.assert_array_equal(whole[:, start : start + 64], part)


def test_jax_arrays_of_short_floats_are_taken_as_they_are():
    w = jnp.asarray(dense(5, 2, 64, N)).astype(jnp.bfloat16)
    stack = quantize(w, group_size=64)
    assert stack.dtype == jnp.bfloat16
    assert worst_error_in_scales(np.asarray(w).astype(np.float64), stack) <= 0.5 + 1e-4


def test_only_one_expert_is_wide_at_a_time():
    w = dense(7, 48, 128, 128)
    quantize(w, group_size=32)
    tracemalloc.start()
    stack = quantize(w, group_size=32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one_in_float64 = 128 * 128 * 8
    assert peak < stack.nbytes + 8 * one_in_float64  # of all 48 they would be 48 times that


W = dense(6, 64, N)
BIG = np.where(np.arange(N) == 3, np.float32(1e6), W).astype(np.float32)
CASES = {
    "rank_1": ({"w": W[0]}, ValueError, "quantize: w has shape (72,), expected (K, N) or", {}),
    "empty": ({"w": W[:0]}, ValueError, "quantize: w has shape (0, 72)", {}),
    "integers": ({"w": W.astype(int)}, TypeError, "quantize: w has dtype int64", {}),
    "float64": (
        {"w": W.astype(np.float64)},
        TypeError,
        "quantize: w has dtype float64; pass dtype=",
        {"w": W.astype(np.float64), "dtype": np.float32},
    ),
    "dtype": ({"dtype": np.int8}, TypeError, "quantize: dtype is int8", {"dtype": np.float16}),
    "not_finite": (
        {"w": np.stack([W, W * np.float32(np.nan)])},
        ValueError,
        "quantize: expert 1: w holds values that are not finite",
        {"w": np.stack([W, -W])},
    ),
    "scales_overflow": (
        {"w": BIG, "dtype": np.float16},
        ValueError,
        "quantize: scales up to 142857 overflow float16; use dtype=bfloat16 or float32",
        {"w": BIG, "dtype": jnp.bfloat16},
    ),
    "bits": ({"bits": 2}, NotImplementedError, "quantize: bits is 2", {"bits": 8}),
    "group_size": ({"group_size": 48}, ValueError, "quantize: group_size is 48", {}),
    "symmetric": (
        {"symmetric": None}, TypeError, "quantize: symmetric is None", {"symmetric": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad, error, message, good", CASES.values(), ids=CASES)
def test_refused_with_a_twin_that_is_accepted(bad, error, message, good):
    arguments = {"w": W, "group_size": 32}
    with pytest.raises(error, match=re.escape(message)):
        quantize(**arguments | bad)
    quantize(**arguments | good)


def test_tracers_are_refused():
    with pytest.raises(TypeError, match="quantize: w is traced"):
        jax.jit(quantize)(W)
