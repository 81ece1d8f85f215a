"""Decoding with a KV cache: one jitted prefill, one jitted step, the cache donated to both."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.models.causal_lm import CausalLM, check_ids
from jax_marlin.models.layers import KVCache


def generate(
    model: CausalLM,
    ids: jax.typing.ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    eos_token_id: int | None = None,
    progress: bool = False,
) -> jax.Array:
    """Continues each row of `ids` by `max_new_tokens` tokens.

    Each prompt shape and total length compiles once. With `eos_token_id` or `progress` the host
    follows the device token by token; without them it runs ahead.

    Args:
        model: what `models.load` returns.
        ids: integers `[batch, seq]`, prompts of one length, without padding.
        max_new_tokens: tokens to add to each row, at least 1.
        temperature: 0 takes the likeliest token (the lowest id of a tie); else logits are divided
            by it and sampled.
        key: a `jax.random.key`, needed when temperature is above 0; same key, same tokens.
        eos_token_id: a row that produced it is filled up with it; decoding ends when all rows have.
        progress: shows a tqdm bar on stderr.

    Returns:
        int32 `[batch, max_new_tokens]`, the new tokens without the prompt.

    Raises:
        TypeError: ids are not integers.
        ValueError: ids are not `[batch, seq]`, too many positions, or temperature without a key.
        IndexError: an id in a host array is outside the vocabulary.

    >>> import jax_marlin as jm
    >>> from jax_marlin.data import bundled_checkpoint
    >>> model = jm.models.load(bundled_checkpoint(), dtype="float32")
    >>> jm.models.generate(model, [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], max_new_tokens=4).shape
    (2, 4)
    """
    steps = stream(
        model, ids, max_new_tokens, temperature=temperature, key=key, eos_token_id=eos_token_id
    )
    tokens = list(with_progress(steps, max_new_tokens) if progress else steps)
    # Rows that all ended early: the rest is the end token again.
    tokens += tokens[-1:] * (max_new_tokens - len(tokens))
    return jnp.stack(tokens, axis=1)


def stream(
    model: CausalLM,
    ids: jax.typing.ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    eos_token_id: int | None = None,
) -> Iterator[jax.Array]:
    """The tokens of `generate` step by step, each int32 `[batch]`, as soon as they are requested.

    Arguments and errors are `generate`'s; errors are raised by this call, not by the first step.
    Stops early once every row has ended.
    """
    prompt = check_ids(ids, model.config.vocab_size, "generate")
    batch, length = prompt.shape
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}, expected at least 1")
    # The last token is returned, never read, and needs no place in the cache.
    capacity = length + max_new_tokens - 1
    limit = model.config.max_position_embeddings
    if capacity > limit:
        raise ValueError(
            f"generate: a prompt of {length} and {max_new_tokens} new tokens need {capacity} "
            f"positions, expected at most max_position_embeddings = {limit}"
        )
    if not temperature >= 0:
        raise ValueError(f"generate: temperature is {temperature}, expected 0 (greedy) or more")
    if temperature > 0 and key is None:
        raise ValueError(
            f"generate: temperature {temperature} needs a key, expected key=jax.random.key(seed)"
        )
    key = key if temperature > 0 else None
    return _stream(
        model,
        prompt,
        model.empty_cache(batch, capacity),
        max_new_tokens,
        temperature,
        key,
        eos_token_id,
    )


def _stream(
    model: CausalLM,
    prompt: jax.Array,
    cache: KVCache,
    max_new_tokens: int,
    temperature: float,
    key: jax.Array | None,
    eos_token_id: int | None,
) -> Iterator[jax.Array]:
    ids, ended = prompt, jnp.zeros(prompt.shape[0], bool)
    scale = np.float32(temperature)
    eos = np.int32(-1 if eos_token_id is None else eos_token_id)  # -1 is no token
    for _ in range(max_new_tokens):
        token, ended, cache = _advance(model, ids, cache, ended, key, scale, eos)
        yield token
        if eos_token_id is not None and bool(ended.all()):
            return
        ids = token[:, None]


@functools.partial(jax.jit, donate_argnames=("cache",))
def _advance(
    model: CausalLM,
    ids: jax.Array,
    cache: KVCache,
    ended: jax.Array,
    key: jax.Array | None,
    temperature: jax.Array,
    eos: jax.Array,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Reads ids `[batch, seq]`, picks the next token `[batch]`: prefill and decode, by shape."""
    logits, cache = model.extend(ids, cache)
    if key is None:
        token = jnp.argmax(logits, axis=-1)
    else:
        # The position makes each step's key, so no key state travels along.
        key = jax.random.fold_in(key, cache.length)
        token = jax.random.categorical(key, logits / temperature, axis=-1)
    token = jnp.where(ended, eos, token.astype(jnp.int32))
    return token, ended | (token == eos), cache


def with_progress(steps: Iterator[jax.Array], total: int, done: int = 0) -> Iterator[jax.Array]:
    """Passes tokens on under a tqdm bar from `done`, which counts what the device has finished.

    It waits for a token only after the next was requested, so watching does not idle the device.
    """
    import tqdm  # a progress bar is no reason for the library to load it

    with tqdm.tqdm(total=total, initial=done, desc="decoding", unit="tok") as bar:
        previous = None
        for token in steps:
            if previous is not None:
                previous.block_until_ready()
                bar.update()
            yield token
            previous = token
        if previous is not None:
            previous.block_until_ready()
            bar.update()
