"""Explicit meshes, where JAX types what is cut: what rearranges columns is left to the compiler."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_marlin.layout import unpair_columns


def explicit_axes(mesh: Any) -> tuple[str, ...]:
    """Names of the axes by which operands and results are typed."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def unpack_on_mesh(
    unpack: Callable[[Any, np.dtype], jax.Array], weight: Any, packed: jax.Array, dtype: np.dtype
) -> jax.Array:
    """`unpack(weight, dtype)`, `[..., K, N]`; `packed` holds its tiles `[..., N/64, K/64, words]`.

    Axes of the result are cut as those of the tiles are, where they divide so.
    """
    tiles = jax.typeof(packed).sharding
    if not explicit_axes(tiles.mesh):
        return unpack(weight, dtype)
    *lead, n, k, _ = tiles.spec
    cut = (*lead, k, n)[-weight.ndim :]
    names = [axis if isinstance(axis, tuple) else (axis,) if axis else () for axis in cut]
    parts = [math.prod(tiles.mesh.shape[name] for name in own) for own in names]
    fits = [
        axis if size % part == 0 else None
        for axis, size, part in zip(cut, weight.shape, parts, strict=True)
    ]
    return _compiled(weight, unpack, dtype, NamedSharding(tiles.mesh, PartitionSpec(*fits)))


def row_on_mesh(leaf: jax.Array, index: Any) -> jax.Array:
    """`leaf[index]`, the index clamped, on every device, whatever cuts the first axis of `leaf`."""
    sharding = jax.typeof(leaf).sharding
    if not explicit_axes(sharding.mesh) or sharding.spec[0] is None:
        if isinstance(index, int):
            return leaf[index]
        index = jnp.clip(index, 0, leaf.shape[0] - 1)
        return jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)
    whole = NamedSharding(sharding.mesh, PartitionSpec(*[None] * (leaf.ndim - 1)))
    return _compiled((leaf, jnp.asarray(index, jnp.int32)), _held_row, None, whole)


def _held_row(operand: tuple[jax.Array, jax.Array], _: None) -> jax.Array:
    """A sum of one row and zeros: that row travels, and not all, as of an index they would."""
    leaf, index = operand
    rows = jnp.arange(leaf.shape[0], dtype=jnp.int32)
    held = (rows == jnp.clip(index, 0, leaf.shape[0] - 1)).reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.sum(jnp.where(held, leaf, jnp.zeros((), leaf.dtype)), axis=0, dtype=leaf.dtype)


def unpair_on_mesh(columns: jax.Array, pairs: int) -> jax.Array:
    """`unpair_columns(columns, pairs)`, cut as `columns` are."""
    sharding = jax.typeof(columns).sharding
    if pairs == 1 or not explicit_axes(sharding.mesh):
        return unpair_columns(columns, pairs)
    return _compiled(columns, unpair_columns, pairs, sharding)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _compiled(operand: Any, function: Callable, option: Any, sharding: NamedSharding) -> Any:
    """`function(operand, option)` in a program that sees no explicit axis."""
    own = lambda operand: function(operand, option)  # noqa: E731
    axes = explicit_axes(sharding.mesh)
    return jax.sharding.auto_axes(own, axes=axes, out_sharding=sharding)(operand)
