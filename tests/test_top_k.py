"""top_k by counting: the same as jax.lax.top_k in values and order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.top_k import top_k

RNG = np.random.default_rng(11)
ROWS = {
    "distinct": RNG.permutation(96).reshape(2, 48).astype(np.float32) - 40,
    "few_values_many_ties": RNG.integers(0, 3, (5, 33)).astype(np.float32),
    "one_element": np.full((3, 1), -2.0, np.float32),
    "infinities": np.array([[np.inf, -np.inf, 0, np.inf, -np.inf, 1]], np.float32),
    "nan_first": np.array([[1, np.nan, np.inf, np.nan, -np.inf, 2]], np.float32),
    "more_axes": RNG.normal(size=(2, 3, 4, 16)).astype(np.float32),
    "one_axis": RNG.normal(size=(20,)).astype(np.float32),
    "no_rows": np.zeros((0, 8), np.float32),
    "past_the_limit_of_comparisons": RNG.normal(size=(70, 130)).astype(np.float32),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["one", "half", "all"])
def test_as_lax_top_k(name, share, backend):
    del backend  # the fixture chooses the device
    rows = jnp.asarray(ROWS[name])
    k = max(1, int(rows.shape[-1] * share))
    values, indices = jax.jit(top_k, static_argnums=1)(rows, k)
    expected_values, expected_indices = jax.lax.top_k(rows, k)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(indices), np.asarray(expected_indices))
    np.testing.assert_array_equal(np.asarray(values), np.asarray(expected_values))


def test_order_of_subnormals_and_signed_zeros():
    rows = jnp.array([[1e-45, -1e-45, 0.0, 3e-45, -0.0]], jnp.float32)
    assert top_k(rows, 5)[1].tolist() == [[3, 0, 2, 4, 1]]


def test_gradient_goes_to_the_chosen():
    rows = jnp.array([[0.0, 3.0, -1.0, 2.0]])
    gradient = jax.grad(lambda v: jnp.sum(top_k(v, 2)[0] * jnp.array([[1.0, 10.0]])))(rows)
    assert gradient.tolist() == [[0.0, 1.0, 0.0, 10.0]]
