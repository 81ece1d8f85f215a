"""Latent attention in 16 bits: what is read through the cache is what a prompt by itself gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin import models


@pytest.mark.parametrize("rows", [None, [4, 3]])
def test_sixteen_bits_read_on_with_a_cache(find_checkpoint, rows):
    """A batch, several tokens at once, rows of different lengths: what one token does not do."""
    model = models.load(find_checkpoint("deepseekv3-gptq-sym-g32"), jnp.bfloat16)
    ids = np.random.default_rng(6).integers(0, model.config.vocab_size, (2, 7))
    extend = jax.jit(type(model).extend)
    lengths = None if rows is None else jnp.asarray(rows)
    logits, cache = extend(model, jnp.asarray(ids[:, :4]), model.empty_cache(2, 9), lengths)
    next_ids = ids[:, 4:6] if rows is None else np.stack([ids[0, 4:6], ids[1, 3:5]])
    logits, _ = extend(model, jnp.asarray(next_ids), cache)
    full = np.asarray(model(ids))
    expected = full[:, 5] if rows is None else np.stack([full[0, 5], full[1, 4]])
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(full).max())
