"""`generate`: its arguments checked, prompts padded, and tokens handed out as they are decoded."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.models.causal_lm import CausalLM, check_ids
from jax_marlin.models.decoding import decode, prefill
from jax_marlin.models.layers import KVCache
from jax_marlin.models.sampling import Sampling

_STEPS_SHOWN = 16  # tokens between two moves of the progress bar


def generate(
    model: CausalLM,
    ids: Any,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    progress: bool = False,
) -> jax.Array:
    """Continues each prompt by `max_new_tokens` tokens.

    The prompts are read in one call and all tokens decoded in another, which stays on the device.
    Each shape of prompts and each `max_new_tokens` compiles once.

    Args:
        model: what `models.load` returns.
        ids: the prompts: integers `[batch, seq]` without padding, or a list of sequences of
            different lengths. Each is continued as it would be alone.
        max_new_tokens: tokens to add to each prompt, at least 1.
        temperature: 0 takes the likeliest token (the lowest id of a tie); else logits are divided
            by it and sampled.
        top_k: sample among so many of the likeliest tokens only.
        top_p: of those, sample among the fewest that reach this probability together.
        key: a `jax.random.key`, needed when temperature is above 0; same key, same tokens.
        eos_token_id: the token, or tokens, that end a prompt's continuation; what is left of the
            row repeats it. Decoding stops when all rows have ended.
        progress: shows a tqdm bar on stderr; the host then looks in every few tokens.

    Returns:
        int32 `[batch, max_new_tokens]`, the new tokens without the prompts.

    Raises:
        TypeError: ids are not integers.
        ValueError: ids are not `[batch, seq]` or a list of sequences, too many positions, a number
            out of range, or temperature without a key.
        IndexError: an id in a host array is outside the vocabulary.

    >>> import jax_marlin as jm
    >>> from jax_marlin.data import bundled_checkpoint
    >>> model = jm.models.load(bundled_checkpoint(), dtype="float32")
    >>> jm.models.generate(model, [[3, 1, 4, 1, 5], [9, 2]], max_new_tokens=4).shape
    (2, 4)
    """
    runs = stream(
        model, ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, key=key,
        eos_token_id=eos_token_id, steps=[_STEPS_SHOWN if progress else max_new_tokens],
    )  # fmt: skip
    found = list(with_progress(runs, max_new_tokens) if progress else runs)
    tokens = jnp.concatenate(found, axis=1)
    # Where all rows ended early, what is left repeats their last token.
    return jnp.pad(tokens, ((0, 0), (0, max_new_tokens - tokens.shape[1])), mode="edge")


def stream(
    model: CausalLM,
    ids: Any,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    steps: Sequence[int] = (1,),
) -> Iterator[jax.Array]:
    """The tokens of `generate` in runs int32 `[batch, n]`, the first of one token.

    `steps` are the lengths of the runs after that; its last number repeats. The first run waits for
    the prefill to compile, the second for the decoding loop, whatever its length.

    Arguments and errors are `generate`'s; errors are raised by this call, not by the first run.
    Ends early once every row has ended.
    """
    prompt, lengths = _prompts(ids, model.config.vocab_size)
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
    sampling = Sampling.create(temperature, top_k, top_p, key)
    stops = _stop_tokens(eos_token_id)
    cache = model.empty_cache(batch, capacity)
    return _stream(model, prompt, lengths, cache, sampling, stops, max_new_tokens, steps)


def _stream(
    model: CausalLM,
    prompt: jax.Array,
    lengths: jax.Array | None,
    cache: KVCache,
    sampling: Sampling,
    stops: jax.Array,
    max_new_tokens: int,
    steps: Sequence[int],
) -> Iterator[jax.Array]:
    decoded = prefill(model, prompt, lengths, cache, sampling, stops, max_new_tokens)
    count = 1
    yield decoded.tokens[:, :count]
    lengths_of_runs = itertools.chain(steps, itertools.repeat(steps[-1]))
    while count < max_new_tokens:
        wanted = min(next(lengths_of_runs), max_new_tokens - count)
        decoded = decode(model, decoded, sampling, stops, jnp.int32(wanted))
        start, count = count, count + wanted
        if stops.size > 0:
            count = int(decoded.count)
        if count > start:
            yield decoded.tokens[:, start:count]
        if count < start + wanted:
            return


def _stop_tokens(eos_token_id: int | Sequence[int] | None) -> jax.Array:
    """int32 `[number of them]`."""
    ids = [] if eos_token_id is None else np.atleast_1d(np.asarray(eos_token_id)).tolist()
    if not all(type(i) is int for i in ids):
        raise TypeError(f"generate: eos_token_id is {eos_token_id!r}, expected an id, or several")
    return jnp.asarray(ids, jnp.int32)


def _prompts(ids: Any, vocab_size: int) -> tuple[jax.Array, jax.Array | None]:
    """Prompts `[batch, seq]`, and int32 `[batch]` lengths if those differ: shorter ones are padded
    on the right, where no token sees the padding before it is overwritten."""
    if isinstance(ids, list | tuple) and all(np.ndim(row) == 1 for row in ids):
        lengths = [len(row) for row in ids]
        if len(set(lengths)) > 1:
            if 0 in lengths:
                raise ValueError(
                    f"generate: input_ids[{lengths.index(0)}] is empty, expected at least one token"
                )
            rows = [np.asarray(row) for row in ids]
            padded = np.zeros((len(rows), max(lengths)), np.result_type(*rows))
            for row, out in zip(rows, padded, strict=True):
                out[: len(row)] = row
            return check_ids(padded, vocab_size, "generate"), jnp.asarray(lengths, jnp.int32)
    prompt: Any = ids
    return check_ids(prompt, vocab_size, "generate"), None


def with_progress(runs: Iterator[jax.Array], total: int, done: int = 0) -> Iterator[jax.Array]:
    """Passes runs of tokens on under a tqdm bar from `done`, which counts finished ones."""
    import tqdm  # a progress bar is no reason for the library to load it

    with tqdm.tqdm(total=total, initial=done, desc="decoding", unit="tok") as bar:
        for run in runs:
            bar.update(run.block_until_ready().shape[1])
            yield run
