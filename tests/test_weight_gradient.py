"""Gradients of dense experts: values, rows of no expert, experts of no row, batches, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_memory import temp_bytes

from jax_marlin.ops.weight_gradient import weight_gradient

IDS = np.array([3, 0, -1, 3, 0, 7, 3, 0, 0, 3, 0, 2**31 - 1], np.int32)


def arrays(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in ((6, 40), (12, 24)))


def exact(x, g, ids):
    x, g = (np.asarray(a).astype(np.float64) for a in (x, g))
    sums = np.zeros((2, 4, 40, 24))
    for row, e in enumerate(ids):
        if 0 <= e < 4:
            outer = np.outer(x[row // 2], g[row])
            sums[:, e] += outer, np.abs(outer)
    return sums


def gradient(x, g, ids):
    return weight_gradient(x, g, ids, num_experts=4, top_k=2, out_dtype=x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sums_of_outer_products(dtype):
    x, g = arrays(dtype)
    value, magnitude = exact(x, g, IDS)
    out = jax.jit(gradient)(x, g, jnp.asarray(IDS))
    assert out.dtype == x.dtype
    oracle.assert_within(out, value, 4 * oracle.epsilon(dtype) * magnitude)
    assert not out[1:3].any()  # experts of no row


def test_no_rows():
    out = gradient(jnp.ones((0, 40)), jnp.ones((0, 24)), jnp.zeros((0,), jnp.int32))
    assert out.shape == (4, 40, 24) and not out.any()


def test_vmap_over_everything():
    xs, gs = (jnp.stack(pair) for pair in zip(arrays("float32"), arrays("float32", 1), strict=True))
    ids = jnp.stack([jnp.asarray(IDS), jnp.asarray(IDS[::-1])])
    out = jax.vmap(gradient)(xs, gs, ids)
    for b in range(2):
        value, magnitude = exact(xs[b], gs[b], np.asarray(ids[b]))
        oracle.assert_within(out[b], value, 2.0**-22 * magnitude)


def test_one_sum_at_a_time():
    shapes = [(512, 256), (512, 512)]
    x, g = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    ids = jax.ShapeDtypeStruct((512,), jnp.int32)

    def many(x, g, ids):
        return weight_gradient(x, g, ids, num_experts=64, top_k=1, out_dtype=x.dtype)

    one_sum, rows = 4 * 256 * 512, 4 * 2 * 128 * (256 + 512)
    result = 2 * 64 * 256 * 512
    assert temp_bytes(many, x, g, ids) <= 3 * one_sum + rows + 64 * 512 + result
