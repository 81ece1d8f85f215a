"""States of decoding to start measurements from: a cache of random keys and values, any length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_marlin.models.causal_lm import CausalLM
from jax_marlin.models.decoding import Decoded
from jax_marlin.models.layers import KVCache


def started(model: CausalLM, batch: int, context: int, new_tokens: int) -> Decoded:
    """Nothing read yet, room for all; random tokens."""
    tokens = jax.random.randint(
        jax.random.key(3), (batch, new_tokens), 0, model.config.vocab_size, jnp.int32
    )
    cache = model.empty_cache(batch, context + new_tokens - 1)
    return Decoded(cache, tokens, jnp.int32(0), jnp.zeros((batch,), jnp.bool_))


def in_context(model: CausalLM, batch: int, context: int, new_tokens: int) -> Decoded:
    """One token chosen after so many, room for more.

    Random keys and values take as long to read as those of a prompt, and no time to come by.
    """
    state = started(model, batch, context, new_tokens)
    state = dataclasses.replace(state, cache=_random_like(state.cache, jax.random.key(2)))
    return rewound(state, context)


def _random_like(cache: KVCache, key: jax.Array) -> KVCache:
    """One small program for all layers: XLA compiled theirs together for minutes."""
    arrays, structure = jax.tree.flatten(cache.layers)
    keys = jax.random.split(key, len(arrays))
    arrays = [_random_in_place(a, k) for a, k in zip(arrays, keys, strict=True)]
    return dataclasses.replace(cache, layers=jax.tree.unflatten(structure, arrays))


@functools.partial(jax.jit, donate_argnums=0)
def _random_in_place(array: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, array.shape, array.dtype)


def rewound(decoded: Decoded, context: int) -> Decoded:
    """Back to one token chosen after the context; what the cache holds past it is never read."""
    cache = dataclasses.replace(decoded.cache, length=jnp.int32(context))
    return dataclasses.replace(decoded, cache=cache, count=jnp.int32(1))
