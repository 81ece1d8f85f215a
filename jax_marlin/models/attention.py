"""Causal grouped-query attention over a cache or a prompt: by cuDNN, or in blocks of queries."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp

from jax_marlin.models.layers import exact

_QUERIES = 512  # at once, so that the scores of a long prompt never exist as a whole


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array | None,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal grouped-query attention; scores and softmax in float32.

    Args:
        q: `[batch, seq, heads, head_dim]`.
        k: `[batch, kv_heads, S, head_dim]`; entry s is position s. Query head h reads head
            `h // (heads / kv_heads)`.
        v: as k; its head_dim may be another.
        start: int32, position of the first query; position p sees entries 0..p, whatever lies past
            it. None: 0, known while tracing, so that blocks of queries read only what they see.
        scale: of the scores; None is `head_dim**-0.5`.
        window: position p sees only the entries p - window + 1..p; None: all.
        sinks: `[heads]`, a further score in each head's softmax, whose weight goes nowhere.

    Returns:
        `[batch, seq, heads * v's head_dim]`, q's dtype.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    in_blocks = functools.partial(
        _attend_in_blocks, start=start, scale=scale, window=window, sinks=sinks
    )
    if start is None and window is None and sinks is None and _has_flash(q, v):
        flash = functools.partial(_flash, scale=scale)
        with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):
            # What cuDNN of this version and device does not take, or no cuDNN, raises here.
            return jax.lax.platform_dependent(q, k, v, cuda=flash, default=in_blocks)
    return in_blocks(q, k, v)


def _has_flash(q: jax.Array, v: jax.Array) -> bool:
    """Whether cuDNN's attention is worth trying; 128 queries are few enough for blocks."""
    on_gpu = jax.default_backend() == "gpu" and q.dtype != jnp.float32
    return on_gpu and q.shape[1] >= 128 and q.shape[-1] == v.shape[-1]


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    k, v = (jnp.swapaxes(heads, 1, 2) for heads in (k, v))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=scale, implementation="cudnn")
    return out.reshape(*q.shape[:2], -1)


def _attend_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    start: jax.Array | None,
    scale: float,
    window: int | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """`attend` of some queries at a time."""
    batch, seq, heads, head_dim = q.shape
    kv_heads, entries = k.shape[1:3]
    # [batch, kv_heads, group, seq, head_dim]: for one query no element moves
    q = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    blocks = []
    for first in range(0, seq, _QUERIES):
        last = min(first + _QUERIES, seq)
        seen = entries if start is not None else min(last, entries)
        positions = jnp.arange(first, last, dtype=jnp.int32) + (0 if start is None else start)
        block = _attend(
            q[:, :, :, first:last], k[:, :, :seen], v[:, :, :seen], positions, scale, window, sinks
        )
        blocks.append(block)
    out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads * v.shape[-1])


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    scale: float,
    window: int | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """q `[batch, kv_heads, group, queries, D]` to the same shape with v's D."""
    batch, kv_heads, group, queries, head_dim = q.shape
    rows = (batch, kv_heads, group * queries)  # keys and values are read once for a whole group
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk",
        q.reshape(*rows, head_dim),
        k,
        precision=exact(q.dtype),
        preferred_element_type=jnp.float32,
    ).reshape(batch, kv_heads, group, queries, -1)
    entries = jnp.arange(k.shape[2], dtype=jnp.int32)[None, :]
    visible = entries <= positions[:, None]  # [queries, S]
    if window is not None:
        visible &= entries > positions[:, None] - window
    scores = jnp.where(visible[None, None, None], scores * scale, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, kv_heads, group, 1, 1)
        top = jnp.maximum(top, sinks)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    out = jnp.einsum(
        "bhqk,bhkd->bhqd",
        (weights / total).astype(v.dtype).reshape(*rows, -1),
        v,
        precision=exact(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(batch, kv_heads, group, queries, -1).astype(q.dtype)
