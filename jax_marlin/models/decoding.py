"""Decoding with a KV cache: one call reads the prompts, then a loop on the device adds tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_marlin.models.causal_lm import CausalLM
from jax_marlin.models.layers import KVCache
from jax_marlin.models.sampling import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """Where decoding stands, on the device; donated from call to call.

    Attributes:
        cache: all tokens read, so all but the last one chosen.
        tokens: int32 `[batch, max_new_tokens]`, the first `count` of them chosen.
        count: int32 scalar.
        ended: bool `[batch]`, rows that have met a stop token.
    """

    cache: KVCache
    tokens: jax.Array
    count: jax.Array
    ended: jax.Array


@functools.partial(jax.jit, static_argnames="max_new_tokens", donate_argnames="cache")
def prefill(
    model: CausalLM,
    prompt: jax.Array,
    lengths: jax.Array | None,
    cache: KVCache,
    sampling: Sampling,
    stops: jax.Array,
    max_new_tokens: int,
) -> Decoded:
    """Reads the prompts `[batch, seq]` and chooses the first token of each row."""
    logits, cache = model.extend(prompt, cache, lengths, empty=True)
    token = sampling(logits, jnp.int32(0))  # [batch]
    tokens = jnp.zeros((prompt.shape[0], max_new_tokens), jnp.int32).at[:, 0].set(token)
    return Decoded(cache, tokens, jnp.int32(1), _is_one_of(token, stops))


@functools.partial(jax.jit, donate_argnames="decoded")
def decode(
    model: CausalLM, decoded: Decoded, sampling: Sampling, stops: jax.Array, steps: jax.Array
) -> Decoded:
    """Adds up to `steps` tokens; fewer if all rows end."""
    end = decoded.count + steps

    def step(d: Decoded) -> Decoded:
        last = jax.lax.dynamic_slice_in_dim(d.tokens, d.count - 1, 1, axis=1)  # [batch, 1]
        logits, cache = model.extend(last, d.cache)
        with jax.named_scope("sampling"):
            token = jnp.where(d.ended, last[:, 0], sampling(logits, d.count))
        tokens = jax.lax.dynamic_update_slice_in_dim(d.tokens, token[:, None], d.count, axis=1)
        return Decoded(cache, tokens, d.count + 1, d.ended | _is_one_of(token, stops))

    return jax.lax.while_loop(lambda d: (d.count < end) & ~d.ended.all(), step, decoded)


def _is_one_of(token: jax.Array, stops: jax.Array) -> jax.Array:
    return (token[:, None] == stops[None, :]).any(axis=1)
