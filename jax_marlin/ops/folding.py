"""A batch (`vmap`) folded into one call: of rows into rows, of stacks into one stack of B * E."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from jax_marlin.ops.checks import check_foldable
from jax_marlin.ops.primitive import map_sequentially
from jax_marlin.weights import MarlinExpertStack


def batch_size(operands: Sequence[jax.Array], dims: Sequence[int | None]) -> int:
    """B, the length of the mapped axes."""
    return next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)


def to_front(operand: jax.Array, dim: int | None, size: int) -> jax.Array:
    """`operand` with the batch as its first axis: moved there, or repeated if it has none."""
    if dim is None:
        return jnp.broadcast_to(operand, (size, *operand.shape))
    return jnp.moveaxis(operand, dim, 0)


def fold_leaves(
    leaves: Sequence[jax.Array], dims: Sequence[int | None]
) -> tuple[list[jax.Array], bool] | None:
    """Leaves `[E, ...]` as they are, or batched ones as `[B * E, ...]`, which copies nothing.

    Returns:
        (leaves, whether they were batched), or None where only some are: a single leaf would have
        to be repeated for every element.
    """
    batched = {d is not None for leaf, d in zip(leaves, dims, strict=True) if leaf.size}
    if len(batched) == 2:
        return None
    if True not in batched:
        return list(leaves), False
    fronts = [
        leaf if d is None else jnp.moveaxis(leaf, d, 0)
        for leaf, d in zip(leaves, dims, strict=True)
    ]
    return [a.reshape(-1, *a.shape[2:]) if a.size else a for a in fronts], True


def fold_ids(ids: jax.Array, num_experts: int, batched_experts: bool) -> jax.Array:
    """Expert ids `[B, ...]` as those of the folded stack; ids that name no expert become -1."""
    named = (ids >= 0) & (ids < num_experts)
    if batched_experts:
        first = num_experts * jnp.arange(ids.shape[0], dtype=jnp.int32)
        ids = ids + first.reshape(-1, *(1,) * (ids.ndim - 1))
    return jnp.where(named, ids, -1)


def fold_stack(stack):
    """A stack whose leaves are `[B, E, ...]` as one of B * E experts."""
    folded = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stack)
    if isinstance(folded, MarlinExpertStack):  # each of the B has a permutation of its own
        folded = dataclasses.replace(
            folded, spec=dataclasses.replace(folded.spec, shared_perm=False)
        )
    return folded


def fold_routing(
    slots: jax.Array,
    expert_ids: jax.Array,
    used: jax.Array,
    *,
    num_rows,
    num_experts: int,
    moe_block_size: int,
    batched_experts: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """B routings of `num_rows` rows each as one of B * num_rows, blocks of one expert together.

    Args:
        slots: int32[B, L], ids of each routing's own rows.
        expert_ids: int32[B, ceil(L / moe_block_size)].
        used: int32[B, 1].
        num_rows: T * top_k of one element.
        num_experts: of one element.
        moe_block_size: slots of a block.
        batched_experts: element b's expert e is b * num_experts + e.

    Returns:
        (sorted_token_ids, expert_ids, num_tokens_past_padded) as `moe_matmul` takes them.
    """
    size, num_blocks = expert_ids.shape
    padding = num_blocks * moe_block_size - slots.shape[1]
    slots = jnp.pad(slots, ((0, 0), (0, padding)), constant_values=-1)
    first = num_rows * jnp.arange(size, dtype=jnp.int32)[:, None]
    slots = jnp.where((slots >= 0) & (slots < num_rows), slots + first, -1)
    starts = moe_block_size * jnp.arange(num_blocks, dtype=jnp.int32)[None, :]
    expert_ids = fold_ids(expert_ids, num_experts, batched_experts)
    expert_ids = jnp.where(starts < used, expert_ids, -1).reshape(-1)
    skipped = expert_ids < 0
    order = jnp.argsort(jnp.where(skipped, jnp.iinfo(jnp.int32).max, expert_ids), stable=True)
    slots = slots.reshape(-1, moe_block_size)[order].reshape(-1)
    used = moe_block_size * jnp.sum(~skipped, dtype=jnp.int32)
    return slots, expert_ids[order], used.reshape(1)


def routed_batching(primitive: Primitive, operands, dims, **params):
    """One call: a batch of x or of routings is more rows, a batch of stacks more experts.

    The batching rule of primitives whose operands are x, leaves, three of routing, row weights.
    """
    folded = fold_leaves(operands[1:-4], dims[1:-4])
    if folded is None:
        return map_sequentially(primitive, operands, dims, params)
    leaves, batched_experts = folded
    size, top_k = batch_size(operands, dims), params["top_k"]
    x, slots, expert_ids, used, weights = (
        to_front(operands[i], dims[i], size) for i in (0, -4, -3, -2, -1)
    )
    num_rows = x.shape[1] * top_k
    routing = fold_routing(
        slots, expert_ids, used,
        num_rows=num_rows,
        num_experts=leaves[0].shape[0] // (size if batched_experts else 1),
        moe_block_size=params["moe_block_size"], batched_experts=batched_experts,
    )  # fmt: skip
    check_foldable(x, 2, "x, its mapped axis first,", params["where"])
    x = x.reshape(size * x.shape[1], x.shape[2])
    out = primitive.bind(x, *leaves, *routing, weights.reshape(-1), **params)
    return out.reshape(size, num_rows, out.shape[1]), 0
