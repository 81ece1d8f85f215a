"""Rows times transposed experts, `[R, N]` to `[R, K]`: what gradients with respect to x need."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import xla

from jax_marlin import reference
from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.explicit_mesh import row_on_mesh
from jax_marlin.layout import TILE
from jax_marlin.ops import ffi_targets, folding, gradient_sharding_rules
from jax_marlin.ops.moe_align_block_size import align_routed_rows, select_moe_block_size
from jax_marlin.ops.partitioning import needs_devices
from jax_marlin.ops.primitive import (
    align_rows,
    has_kernel,
    is_zero,
    map_sequentially,
    or_empty,
    register_partitioned,
    result_aval,
    set_batching,
)
from jax_marlin.weights import MarlinExpertStack

TARGET = "jax_marlin_transposed_product_v1"


def transposed_product(
    g: jax.Array,
    ids: jax.Array,
    stack: MarlinExpertStack | DenseExpertStack,
    *,
    out_dtype: np.dtype,
    first_column: int = 0,
    one_expert: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Row r is `g[r] @ W[ids[r]].T`, or zero where `ids[r]` names no expert.

    By default in float32, with one dequantized expert in memory at a time, each once for all of
    its rows, whatever E and R. On CUDA a kernel multiplies by the packed weights themselves: they
    and g are rounded to the compute dtype for the tensor cores, and sums are float32. Dense experts
    are rounded likewise, and take the default's loop.

    Args:
        g: float `[R, N]`, columns as they are stored (in pairs, of a stack that is paired).
        ids: int32 `[R]`.
        stack: E experts `[K, N]`.
        out_dtype: of the result.
        first_column: static, of a packed stack: its column that g's first one is; on a tile.
        one_expert: static; all ids are the same, which says how many rows an expert has.
        implementation: "xla" asks for float32 products on CUDA too.

    Returns:
        `[R, K]`, K in the original order.
    """
    if isinstance(stack, DenseExpertStack):
        leaves, spec, order = (stack.weight,), None, None
    else:
        spec, perm = stack.held_spec, stack.perm
        # As in the forward pass: one gather for all experts, where they share it.
        order = row_on_mesh(perm, 0) if perm is not None and spec.shared_perm else None
        perm = or_empty(None if order is not None else perm, jnp.int32)
        zero_points = or_empty(stack.zero_points, stack.dtype)
        leaves = (stack.qweight, stack.scales, zero_points, perm)
    out = _primitive.bind(
        g, ids, *leaves,
        spec=spec, k=stack.k, first_column=first_column, one_expert=one_expert,
        out_dtype=np.dtype(out_dtype), implementation=implementation, devices=needs_devices(),
    )  # fmt: skip
    return out if order is None else out[:, jnp.argsort(order)]


def rows_at_once(num_rows, num_experts: int) -> int:
    """Rows of one block: a power of two, 8 at least, and 512 of large groups."""
    size = max(select_moe_block_size(num_rows, 1, num_experts), 8)  # a turn of the loop is dear
    size = 128 if size > 64 else size
    while size < 512 and isinstance(num_rows, int) and num_rows >= 4 * size * num_experts:
        size *= 2
    return size


def kernel_block_size(num_rows, num_experts: int) -> int:
    """Slots of a block of the kernel, which has tiles of up to 64 rows.

    Where experts have about as many rows as others, as `select_moe_block_size`; of one alone, which
    cannot have more than expected, what takes all of its rows.
    """
    if num_experts > 1 or not isinstance(num_rows, int):
        return min(select_moe_block_size(num_rows, 1, num_experts), 64)
    return next((size for size in (8, 16, 32) if num_rows <= size), 64)


def _product(g, ids, *leaves, spec, k, first_column, one_expert, out_dtype, weight_dtype):
    del one_expert  # a block of the loop costs more than its padding
    num_experts, n = leaves[0].shape[0], g.shape[1]
    perm = jnp.zeros((0,), jnp.int32) if spec is None else leaves[3]

    def weight_of(expert):  # [k, n], rows in packed order
        if spec is None:
            return reference.of_expert(leaves[0], expert)
        return reference.dequantize_expert(
            leaves[0], leaves[1], leaves[2], expert,
            bits=spec.bits, k=k, n=n, group_size=spec.group_size, first_tile=first_column // TILE,
        )  # fmt: skip

    def product_of(expert):
        weight = weight_of(expert).astype(weight_dtype)

        def product(rows):
            out = reference.dot(rows, weight, contract=1)
            return out[:, jnp.argsort(reference.of_expert(perm, expert))] if perm.size else out

        return product

    block = rows_at_once(g.shape[0], num_experts)
    return reference.routed_rows(
        g, product_of, jnp.zeros((0,), g.dtype),
        *align_routed_rows(ids[:, None], block, num_experts), jnp.zeros((0,), jnp.float32),
        num_experts=num_experts, n=k, moe_block_size=block, top_k=1, weights_before_bias=False,
        out_dtype=out_dtype,
    )  # fmt: skip


def _on_cuda(g, ids, *leaves, spec, k, first_column, one_expert, out_dtype):
    if spec is None:  # no kernel reads dense experts: the loop, on tensor cores
        return _product(
            g, ids, *leaves,
            spec=None, k=k, first_column=0, one_expert=one_expert, out_dtype=out_dtype,
            weight_dtype=leaves[0].dtype,
        )  # fmt: skip
    qweight, scales, zero_points, perm = leaves
    (num_rows, n), num_experts = g.shape, qweight.shape[0]
    block = kernel_block_size(num_rows, 1 if one_expert else num_experts)
    routing = align_routed_rows(ids[:, None], block, num_experts)
    scratch_bytes = ffi_targets.scratch_bytes(
        routing[0].shape[0], block, n, k, spec.bits, transposed=True
    )
    results = (
        jax.ShapeDtypeStruct((num_rows, k), out_dtype),
        jax.ShapeDtypeStruct((scratch_bytes,), np.uint8),
    )
    out, _ = jax.ffi.ffi_call(TARGET, results)(
        align_rows(g.astype(scales.dtype)), qweight, scales, zero_points, *routing,
        jnp.zeros((0,), jnp.float32),
        bits=np.int64(spec.bits), k=np.int64(k), n=np.int64(n),
        group_size=np.int64(spec.group_size), first_tile=np.int64(first_column // TILE),
        moe_block_size=np.int64(block),
    )  # fmt: skip
    if perm.size:  # each expert's own
        own = jnp.argsort(perm, axis=1).at[ids].get(mode="clip")
        out = jnp.take_along_axis(out, own, axis=1, mode="promise_in_bounds")
    return out


def _shape_rule(g, *operands, k, out_dtype, **_):
    return result_aval((g.shape[0], k), out_dtype, (g, *operands))


def _batching(operands, dims, **params):
    """A batch of g is more rows of one call, a batch of stacks more experts."""
    (g, ids, *leaves), (g_dim, ids_dim, *leaf_dims) = operands, dims
    folded = folding.fold_leaves(leaves, leaf_dims)
    if folded is None:
        return map_sequentially(_primitive, operands, dims, params)
    size = folding.batch_size(operands, dims)
    num_experts = folded[0][0].shape[0] // (size if folded[1] else 1)
    g = folding.to_front(g, g_dim, size)
    ids = folding.fold_ids(folding.to_front(ids, ids_dim, size), num_experts, folded[1])
    num_rows = g.shape[1]
    rows = g.reshape(size * num_rows, g.shape[2])
    out = _primitive.bind(rows, ids.reshape(-1), *folded[0], **params)
    return out.reshape(size, num_rows, params["k"]), 0


def _runs_on_cuda(results, g, ids, *leaves, spec, **_):
    weight = leaves[0] if spec is None else leaves[1]
    return has_kernel(results, weight) and not is_zero(g.shape[1])


_primitive = Primitive(TARGET)
_primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
register_partitioned(
    _primitive,
    _shape_rule,
    functools.partial(_product, weight_dtype=jnp.float32),
    _on_cuda,
    _runs_on_cuda,
    gradient_sharding_rules.transposed_product(_primitive.bind),
)
set_batching(_primitive, _batching)
