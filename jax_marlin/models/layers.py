"""Pieces that decoders share: dense linear, RMS norm, rotary embedding, KV cache."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_marlin.linear import MarlinLinear
from jax_marlin.ops.matmul import matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DenseLinear:
    """An unquantized linear, called as `MarlinLinear` is: `x [..., K]` to `[..., N]`.

    Attributes:
        weight: `[N, K]` as checkpoints store it, the compute dtype: for one row of x the product is
            a sum along contiguous memory.
        bias: `[N]` or None.
    """

    weight: jax.Array
    bias: jax.Array | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.product(x).astype(x.dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """The result as accumulated, float32."""
        y = jnp.einsum(
            "...k,nk->...n",
            x,
            self.weight,
            precision=exact(x.dtype),
            preferred_element_type=jnp.float32,
        )
        if self.bias is not None:
            y = y + _over_last_axis(self.bias, y.ndim)
        return y


Linear = MarlinLinear | DenseLinear


def linear_float32(x: jax.Array, w: Linear) -> jax.Array:
    """`w(x)` straight from the float32 accumulator, not rounded to x's dtype."""
    if isinstance(w, MarlinLinear):
        return matmul(x, w, preferred_element_type=jnp.float32)
    return w.product(x)


# Linears of one input: side by side in one, read by one product, or apart where they are packed
# differently (bits, group size, act-order).
SideBySide = Linear | tuple[Linear, ...]


def side_by_side(
    x: jax.Array, w: SideBySide, product: Callable[[jax.Array, Linear], jax.Array]
) -> jax.Array:
    """The columns of all products, `[..., sum of N]`."""
    if not isinstance(w, tuple):
        return product(x, w)
    return jnp.concatenate([product(x, part) for part in w], axis=-1)


# What one layer keeps of the positions read: arrays [batch, heads, positions, D], or without heads.
Kept = tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
    """What layers keep of the positions read so far, at their full length from the start.

    Attributes:
        layers: for each layer its arrays `[batch, heads, capacity, D]`: rotated keys, and values.
            A head's positions lie together, as its products with queries read them. In DeepSeek's
            models latents alone, `[batch, capacity, D]`. See `config.cached`.
        length: int32, positions filled: a scalar, or `[batch]` where rows differ. What lies past
            them is never read.
    """

    layers: tuple[Kept, ...]
    length: jax.Array

    @property
    def capacity(self) -> int:
        """How many positions fit."""
        return self.layers[0][0].shape[-2]

    def begun(self, new: "KVCache") -> "KVCache":
        """This cache with what `new` holds, from position 0 on."""
        layers = jax.tree.map(lambda old, added: _written(old, added, 0), self.layers, new.layers)
        return KVCache(layers, new.length)


def exact(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Matmul precision at which float32 means float32 (GPUs would use 10 mantissa bits)."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x²) + eps) * weight` over the last axis, in float32, returned in x's dtype."""
    return scaled(x, rms_scale(x, eps), weight)


def rms_scale(x: jax.Array, eps: float) -> jax.Array:
    """`1 / sqrt(mean(x²) + eps)` over the last axis, float32 `[..., 1]`."""
    wide = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


def scaled(x: jax.Array, scale: jax.Array, weight: jax.Array) -> jax.Array:
    """`x * scale * weight` in float32, returned in x's dtype; weight `[N]`."""
    return (x.astype(jnp.float32) * scale * _over_last_axis(weight, x.ndim)).astype(x.dtype)


def updated(past: Kept | None, new: Kept, start: jax.Array | None) -> Kept:
    """What one layer keeps, `new` positions written from `start` on; alone without a cache."""
    if past is None or start is None:
        return new
    return tuple(_written(old, added, start) for old, added in zip(past, new, strict=True))


def _written(old: jax.Array, added: jax.Array, start: jax.Array | int) -> jax.Array:
    """`old [..., capacity, D]` with further positions written over it."""
    return jax.lax.dynamic_update_slice_in_dim(old, added, start, axis=old.ndim - 2)


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


def _over_last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    """`[N]` as float32 `[1, ..., 1, N]`, so that nothing relies on rank promotion."""
    return vector.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))
