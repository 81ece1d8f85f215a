"""Gradients with respect to dense experts, `[E, K, N]`: one float32 `[K, N]` sum at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import xla

from jax_marlin.ops import folding, gradient_sharding_rules
from jax_marlin.ops.moe_align_block_size import align_routed_rows
from jax_marlin.ops.partitioning import needs_devices
from jax_marlin.ops.primitive import register_partitioned, result_aval, set_batching
from jax_marlin.ops.transposed_product import rows_at_once


def weight_gradient(
    x: jax.Array, g: jax.Array, ids: jax.Array, *, num_experts: int, top_k: int, out_dtype: np.dtype
) -> jax.Array:
    """For each expert e, the sum of `outer(x[r // top_k], g[r])` over the rows r with ids[r] = e.

    Args:
        x: float `[T, K]`.
        g: float `[T * top_k, N]`.
        ids: int32 `[T * top_k]`; rows whose id names no expert count nowhere.
        num_experts: E.
        top_k: rows of g to a row of x.
        out_dtype: of the result; sums are float32.

    Returns:
        `[E, K, N]`.
    """
    return _primitive.bind(
        x, g, ids,
        num_experts=num_experts, top_k=top_k, out_dtype=np.dtype(out_dtype), implementation=None,
        devices=needs_devices(),
    )  # fmt: skip


def _default(x, g, ids, *, num_experts, top_k, out_dtype):
    num_rows, shape = g.shape[0], (x.shape[1], g.shape[1])
    if isinstance(num_rows, int) and num_rows == 0:
        return jnp.zeros((num_experts, *shape), out_dtype)
    size = rows_at_once(num_rows, num_experts)
    slots, expert_ids, _ = align_routed_rows(ids[:, None], size, num_experts)
    expert_ids = jnp.where(expert_ids < 0, num_experts, expert_ids)  # ascending, unused ones last

    def one_expert(expert):
        def one_block(block, total):
            own = size * block + jnp.arange(size, dtype=jnp.int32)
            rows = slots.at[own].get(mode="fill", fill_value=num_rows)
            outputs = g.at[rows].get(mode="fill", fill_value=0).astype(jnp.float32)
            inputs = x.at[rows // top_k].get(mode="fill", fill_value=0).astype(jnp.float32)
            return total + jnp.matmul(inputs.T, outputs, precision=lax.Precision.HIGHEST)

        first, last = (
            jnp.searchsorted(expert_ids, expert, side=side).astype(jnp.int32)
            for side in ("left", "right")
        )
        return lax.fori_loop(first, last, one_block, jnp.zeros(shape, jnp.float32)).astype(
            out_dtype
        )

    return lax.map(one_expert, jnp.arange(num_experts, dtype=jnp.int32))


def _shape_rule(x, g, ids, *, num_experts, out_dtype, **_):
    return result_aval((num_experts, x.shape[1], g.shape[1]), out_dtype, (x, g, ids))


def _batching(operands, dims, *, num_experts, **params):
    """Element b's expert e is expert b * E + e of one call."""
    size = folding.batch_size(operands, dims)
    x, g, ids = (folding.to_front(a, d, size) for a, d in zip(operands, dims, strict=True))
    ids = folding.fold_ids(ids, num_experts, True).reshape(-1)
    rows = (a.reshape(-1, a.shape[2]) for a in (x, g))
    out = _primitive.bind(*rows, ids, num_experts=size * num_experts, **params)
    return out.reshape(size, num_experts, *out.shape[1:]), 0


_primitive = Primitive("jax_marlin_weight_gradient")
_primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
register_partitioned(
    _primitive, _shape_rule, _default, _default, lambda *_, **__: False,
    gradient_sharding_rules.weight_gradient(_primitive.bind),
)  # fmt: skip
set_batching(_primitive, _batching)
