"""Pieces that decoders share: dense linear, RMS norm, rotary embedding, attention, KV cache."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_marlin.linear import MarlinLinear
from jax_marlin.ops.matmul import matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DenseLinear:
    """An unquantized linear, called as `MarlinLinear` is: `x [..., K]` to `[..., N]`.

    Attributes:
        weight: `[K, N]`, the compute dtype.
        bias: `[N]` or None.
    """

    weight: jax.Array
    bias: jax.Array | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.product(x).astype(x.dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """The result as accumulated, float32."""
        y = jnp.dot(x, self.weight, precision=exact(x.dtype), preferred_element_type=jnp.float32)
        if self.bias is not None:
            y = y + _over_last_axis(self.bias, y.ndim)
        return y


Linear = MarlinLinear | DenseLinear


def linear_float32(x: jax.Array, w: Linear) -> jax.Array:
    """`w(x)` straight from the float32 accumulator, not rounded to x's dtype."""
    if isinstance(w, MarlinLinear):
        return matmul(x, w, preferred_element_type=jnp.float32)
    return w.product(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
    """Keys and values of the positions read so far, at their full length from the start.

    Attributes:
        keys: for each layer `[batch, capacity, num_key_value_heads, head_dim]`, rotated.
        values: the same shapes; in DeepSeek's models another head_dim.
        length: int32, positions filled: a scalar, or `[batch]` where rows differ. What lies past
            them is never read.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @property
    def capacity(self) -> int:
        """How many positions fit."""
        return self.keys[0].shape[1]


def exact(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Matmul precision at which float32 means float32 (GPUs would use 10 mantissa bits)."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x²) + eps) * weight` over the last axis, in float32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * _over_last_axis(weight, x.ndim)).astype(x.dtype)


def updated(
    past: tuple[jax.Array, jax.Array] | None, new: tuple[jax.Array, jax.Array], start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer's cache with new ones from `start` on; `new` without a cache."""
    if past is None:
        return new
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, added, start, axis=1)
        for old, added in zip(past, new, strict=True)
    )
    return keys, values


def rotate(
    x: jax.Array, positions: jax.Array, frequencies: jax.Array, factor: float = 1.0
) -> jax.Array:
    """Rotary position embedding over whole heads, halves paired (not neighbours).

    Args:
        x: `[batch, seq, heads, D]`.
        positions: int32 `[seq]`.
        frequencies: radians a position, float32 `[D / 2]`.
        factor: what cosines and sines are multiplied by.

    Returns:
        x's shape and dtype; features (i, i + D / 2) are turned by `position * frequencies[i]`
        radians, computed in float32.
    """
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]  # [seq, D / 2]
    cos, sin = (factor * f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal grouped-query attention; scores and softmax in float32.

    Args:
        q: `[batch, seq, heads, head_dim]`.
        k: `[batch, S, kv_heads, head_dim]`; entry s is position s. Query head h reads head
            `h // (heads / kv_heads)`.
        v: as k; its head_dim may be another.
        positions: int32 `[seq]`, the queries'; position p sees entries 0..p, whatever lies past it.
        scale: of the scores; None is `head_dim**-0.5`.
        window: position p sees only the entries p - window + 1..p; None: all.
        sinks: `[heads]`, a further score in each head's softmax, whose weight goes nowhere.

    Returns:
        `[batch, seq, heads * v's head_dim]`, q's dtype.
    """
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum(
        "bqhgd,bkhd->bhgqk", q, k, precision=exact(q.dtype), preferred_element_type=jnp.float32
    )
    entries = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    visible = entries <= positions[:, None]  # [seq, S]
    if window is not None:
        visible &= entries > positions[:, None] - window
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    scores = jnp.where(visible[None, None, None], scores, -jnp.inf)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        sink = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    out = jnp.einsum(
        "bhgqk,bkhd->bqhgd",
        weights,
        v,
        precision=exact(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(batch, seq, heads * v.shape[-1]).astype(q.dtype)


def _over_last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    """`[N]` as float32 `[1, ..., 1, N]`, so that nothing relies on rank promotion."""
    return vector.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))
