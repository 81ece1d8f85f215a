"""Sends tokens to the devices that hold their experts, and their results back."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_marlin.explicit_mesh import explicit_axes

EXCHANGES = ("all_gather", "all_to_all")
_FEWEST_TOKENS = 1024  # below, fewer collectives count for more than fewer bytes
# On two H100s, ragged all-to-alls moved a byte at a twentieth of the speed of the others.
_LARGEST_SHARE = 1 / 20


def select_exchange(tokens: int, top_k: int, devices: int) -> str:
    """Which exchange moves T tokens over `devices`; a function of static shapes alone.

    all_gather sends each token to all other devices. all_to_all sends it, in expectation over
    random routings, to the share 1 - (1 - 1 / devices) ** top_k of them, by slower collectives.

    >>> select_exchange(4096, 2, 64), select_exchange(4096, 8, 8), select_exchange(64, 2, 64)
    ('all_to_all', 'all_gather', 'all_gather')
    """
    share = 1 - (1 - 1 / devices) ** top_k
    few = not isinstance(tokens, int) or tokens < _FEWEST_TOKENS
    return "all_gather" if few or share > _LARGEST_SHARE else "all_to_all"


def gathered(layer: Callable, x, ids, weights, axis: str) -> jax.Array:
    """Each device runs its experts on all tokens; sums are scattered. float32 `[T, N]`.

    `layer` takes (x, global ids, weights) of any number of tokens and skips experts of others.
    """
    x, ids, weights = (jax.lax.all_gather(a, axis, tiled=True) for a in (x, ids, weights))
    out = layer(x, ids, weights).astype(jnp.float32)
    return _scattered(out, axis)


def _scattered(out, axis: str) -> jax.Array:
    """`psum_scatter`, which JAX does not lower beside explicit axes: they are automatic in it."""
    scatter: Callable = functools.partial(jax.lax.psum_scatter, axis_name=axis, tiled=True)
    sharding = jax.typeof(out).sharding
    axes = explicit_axes(sharding.mesh)
    if axes:
        scatter = jax.sharding.auto_axes(scatter, axes=axes, out_sharding=sharding.spec)
    return scatter(out)


def routed(layer: Callable, x, ids, weights, axis: str, experts: int) -> jax.Array:
    """Each token goes once to each device that holds one of its experts. float32 `[T, N]`.

    Buffers have room for every token on every device, so that none is ever dropped. Where JAX has
    a ragged all-to-all (CUDA), only the rows in use travel; elsewhere the whole buffers do.

    Args:
        layer: as for `gathered`.
        x: `[T, H]` of this device.
        ids: int32 `[T, top_k]`, of all experts; those out of range contribute nothing.
        weights: float32 `[T, top_k]`.
        axis: the mesh axis.
        experts: of one device.
    """
    devices = jax.lax.axis_size(axis)
    tokens, top_k = ids.shape
    to = jnp.where((ids >= 0) & (ids < devices * experts), ids // experts, devices)  # [T, top_k]
    each = jnp.arange(devices, dtype=jnp.int32)[None, None]
    goes = jnp.any(to[:, :, None] == each, axis=1)  # [T, devices]
    place = jnp.cumsum(goes.astype(jnp.int32), axis=0) - 1  # among a device's rows
    sent = jnp.sum(goes.astype(jnp.int32), axis=0)
    received = jax.lax.all_to_all(sent, axis, 0, 0, tiled=True)

    # Row `device * T + place` holds the token; a slot whose device an earlier slot named has none.
    row = to * tokens + jnp.take_along_axis(place, jnp.minimum(to, devices - 1), axis=1)
    same = to[:, :, None] == to[:, None, :]
    repeated = jnp.any(same & jnp.tri(top_k, k=-1, dtype=bool)[None], axis=2)
    row = jnp.where(repeated | (to == devices), devices * tokens, row)
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    token_of_row = jnp.full((devices * tokens,), tokens, jnp.int32)
    token_of_row = token_of_row.at[row].set(jnp.broadcast_to(token, row.shape), mode="drop")

    def rows_of(array, fill):
        return array.at[token_of_row].get(mode="fill", fill_value=fill)

    arrived = [
        _exchange(rows_of(array, fill), fill, sent, received, axis)
        for array, fill in ((x, 0), (ids, -1), (weights, 0))
    ]
    back = _exchange(layer(*arrived), 0, received, sent, axis)
    total = jnp.zeros((tokens, back.shape[1]), jnp.float32)
    for slot in range(top_k):  # in this order, so that the rounding is the same in every run
        total += back.at[row[:, slot]].get(mode="fill", fill_value=0).astype(jnp.float32)
    return total


def _exchange(rows, fill, sent, received, axis: str) -> jax.Array:
    """Block j of `rows` to device j; what came from device i is block i of the result."""
    devices = jax.lax.axis_size(axis)
    size = rows.shape[0] // devices

    def padded(rows, sent, received):
        del sent, received
        return jax.lax.all_to_all(rows, axis, 0, 0, tiled=True)

    def ragged(rows, sent, received):
        varying = tuple(sorted(jax.typeof(rows).manual_axis_type.varying))
        out = jax.lax.pcast(jnp.full(rows.shape, fill, rows.dtype), varying, to="varying")
        starts = jnp.arange(devices, dtype=jnp.int32) * size
        own = jnp.full((devices,), jax.lax.axis_index(axis) * size, jnp.int32)
        return jax.lax.ragged_all_to_all(rows, out, starts, sent, own, received, axis_name=axis)

    return jax.lax.platform_dependent(rows, sent, received, cuda=ragged, default=padded)
