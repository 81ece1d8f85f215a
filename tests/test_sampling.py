"""Sampling: the frequencies of many draws against probabilities worked out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.models.sampling import Sampling

LOGITS = np.array([1.0, 3.0, 2.0, 2.5, -1.0, 2.0], np.float32)
DRAWS = 20_000


def probabilities(temperature, top_k, top_p):
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or len(p)]
    kept, total = [], p[order].sum()
    for i in order:  # until the likelier ones reach top_p
        if p[kept].sum() / total < (top_p or 1.0):
            kept.append(i)
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(None, None), (3, None), (100, None), (None, 0.6), (None, 1.0), (4, 0.75), (3, 0.2)],
)
def test_frequencies(temperature, top_k, top_p):
    sampling = Sampling.create(temperature, top_k, top_p, jax.random.key(5))
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, len(LOGITS)))
    tokens = jax.jit(lambda s, logits: s(logits, jnp.int32(1)))(sampling, logits)
    expected = probabilities(temperature, top_k, top_p)
    found = np.bincount(tokens, minlength=len(LOGITS)) / DRAWS
    # Five standard deviations of a frequency; what has no probability never comes.
    np.testing.assert_array_less(
        np.abs(found - expected), 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9
    )


def test_top_k_keeps_the_lower_id_of_a_tie():
    sampling = Sampling.create(1.0, 3, None, jax.random.key(0))
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (2000, len(LOGITS)))  # 2 and 5 are equal
    assert set(np.asarray(sampling(logits, jnp.int32(0))).tolist()) == {1, 2, 3}


def test_steps_and_keys_differ():
    logits = jnp.zeros((64, 100))
    a, b = (Sampling.create(1.0, None, None, jax.random.key(seed)) for seed in (0, 1))
    draws = [np.asarray(s(logits, jnp.int32(step))) for s in (a, b) for step in (0, 1)]
    assert all((x != y).any() for i, x in enumerate(draws) for y in draws[:i])
    np.testing.assert_array_equal(draws[0], a(logits, jnp.int32(0)))


def test_greedy_takes_the_lowest_id_of_a_tie():
    assert Sampling()(jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]), jnp.int32(0)).tolist() == [
        1,
        0,
    ]
