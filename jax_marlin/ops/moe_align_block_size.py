"""moe_align_block_size: sorts routed rows by expert and pads each expert to whole blocks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import min_dim
from jax.extend.core import Primitive
from jax.interpreters import xla
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_marlin.ops import checks
from jax_marlin.ops.primitive import (
    map_sequentially,
    register_lowerings,
    result_aval,
    set_batching,
)

TARGET = "jax_marlin_moe_align_block_size_v1"
_INT32_MAX = 2**31 - 1
MAX_KERNEL_EXPERTS = 8192  # counters of one thread block, as in the handler


def moe_align_block_size(
    topk_ids: checks.Integers,
    moe_block_size: checks.StaticInt,
    num_experts: checks.StaticInt,
    expert_map: checks.Integers | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Groups the R = T * top_k routed rows by expert, in blocks of `moe_block_size` slots.

    Row r = token * top_k + slot. Each expert gets its rows in ascending order, then padding (the
    value R) up to a whole block. Ids that are negative, out of range or mapped to a negative number
    are dropped. Same inputs, same result, on every backend; sizes and tails are vLLM's
    (`csrc/moe/moe_align_sum_kernels.cu`).

    Args:
        topk_ids: `[T, top_k]` integers, the experts of each token; T may be 0. What an explicit
            mesh has cut is gathered: one table holds the rows of all devices.
        moe_block_size: slots of one block, >= 1; `moe_matmul` takes the same number.
        num_experts: E, how many experts `topk_ids` counts; any number.
        expert_map: `[E]` integers, the local id of each expert or -1, where a device holds only
            some.

    Returns:
        `sorted_token_ids` int32 `[L]`, L = min(R * moe_block_size, R + E * (moe_block_size - 1)),
        unused slots R; `expert_ids` int32 `[ceil(L / moe_block_size)]`, the (local) expert of each
        block, unused blocks -1; `num_tokens_past_padded` int32 `[1]`, how many slots are in use.

    Raises:
        TypeError: topk_ids or expert_map are not integers.
        ValueError: wrong shapes or sizes; ids of a host array outside -1 .. num_experts - 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_marlin.ops.moe_align_block_size import moe_align_block_size
        >>> ids = jnp.array([[2, 0], [2, 1], [0, 2]])
        >>> slots, experts, used = moe_align_block_size(ids, 2, 3)
        >>> slots[:8].tolist(), experts.tolist(), used.tolist()
        ([1, 4, 3, 6, 0, 2, 5, 6], [0, 1, 2, 2, -1], [8])
    """
    where = "moe_align_block_size"
    num_experts = checks.check_positive(num_experts, "num_experts", where)
    moe_block_size = checks.check_positive(moe_block_size, "moe_block_size", where)
    ids = as_expert_ids(topk_ids, num_experts, where)
    local_ids = None
    if expert_map is not None:
        if np.shape(expert_map) != (num_experts,):
            raise ValueError(
                f"{where}: expert_map has shape {np.shape(expert_map)}, expected (num_experts,) ="
                f" ({num_experts},), one local id for each expert that topk_ids can name"
            )
        local_ids = as_expert_ids(expert_map, _INT32_MAX, where, name="expert_map", ndim=1)
    return align_routed_rows(ids, moe_block_size, num_experts, local_ids)


def align_routed_rows(
    topk_ids: jax.Array,
    moe_block_size: int,
    num_experts: int,
    expert_map: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for checked int32 arrays (`as_expert_ids`); what the other ops call."""
    check_slots(topk_ids.shape, moe_block_size, num_experts)
    if expert_map is None:
        expert_map = jnp.zeros((0,), jnp.int32)
    return tuple(
        _primitive.bind(
            _of_all_devices(topk_ids),
            _of_all_devices(expert_map),
            moe_block_size=moe_block_size,
            num_experts=num_experts,
            implementation=implementation,
        )
    )


def _of_all_devices(ids: jax.Array) -> jax.Array:
    """Whole on every device of an explicit mesh; under automatic ones JAX does so by itself."""
    mesh = jax.typeof(ids).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return ids
    return jax.sharding.reshard(ids, NamedSharding(mesh, PartitionSpec()))


def check_slots(
    topk_shape, moe_block_size: int, num_experts: int, where: str = "moe_align_block_size"
) -> None:
    """Refuses routings whose slots int32 cannot count."""
    num_slots, _ = aligned_sizes(topk_shape, moe_block_size, num_experts)
    if isinstance(num_slots, int) and num_slots > _INT32_MAX:
        raise ValueError(
            f"{where}: topk_ids of shape {tuple(topk_shape)}, {num_experts} experts and"
            f" moe_block_size {moe_block_size} need {num_slots} slots, more than int32 counts;"
            " split T"
        )


def as_expert_ids(
    ids: checks.Integers, num_experts: int, where: str, *, name: str = "topk_ids", ndim: int = 2
) -> jax.Array:
    """`ids` as int32; out of range, ids on the device are dropped later and host ids raise."""
    dtype = ids.dtype if isinstance(ids, jax.Array) else np.asarray(ids).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{where}: {name} has dtype {dtype}, expected an integer dtype (int32)")
    if np.ndim(ids) != ndim:
        expected = "(T, top_k)" if ndim == 2 else "(num_experts,)"
        raise ValueError(f"{where}: {name} has shape {np.shape(ids)}, expected {expected}")
    if isinstance(ids, jax.Array):
        if dtype.itemsize > 4:  # int64 under jax_enable_x64: no id may wrap into range
            ids = jnp.where((ids >= 0) & (ids < num_experts), ids, -1)
        return ids.astype(jnp.int32)
    host = np.asarray(ids)
    if host.size and (int(host.min()) < -1 or int(host.max()) >= num_experts):
        worst = int(host.min()) if int(host.min()) < -1 else int(host.max())
        raise ValueError(
            f"{where}: {name} holds {worst}, expected -1 (dropped) or 0 .. {num_experts - 1}"
        )
    return jnp.asarray(host.astype(np.int32))


def expert_of_row(
    slots: jax.Array, expert_ids: jax.Array, used: jax.Array, *, num_rows, moe_block_size: int
) -> jax.Array:
    """int32 `[num_rows]`: the expert of each row, -1 where no used slot of the routing names it."""
    block = jnp.arange(slots.shape[0], dtype=jnp.int32) // moe_block_size
    named = (slots >= 0) & (slots < num_rows) & (block * moe_block_size < used)
    nobody = jnp.full((num_rows,), -1, jnp.int32)
    rows = jnp.where(named, slots, num_rows)
    return nobody.at[rows].set(expert_ids.at[block].get(mode="clip"), mode="drop")


def select_moe_block_size(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Slots of a block: 8, of which an average expert fills 70 %, or the smallest of 16, 32 and 64
    of which it fills 90 %.

    Or 4, where so many suffice for nearly all experts: less of x to keep beside the weights. Where
    experts have more, 96, or that of 128 and 144 of which fewer blocks hold what all but a sixth of
    them have: a few rows in a block of their own cost as much as half a block.

    A function of static shapes only, and meant for Hopper, where 96 and 144 are one tile; elsewhere
    they are two and three of 64 rows. A symbolic number of tokens (`jax.export`) gets 64.

    >>> [select_moe_block_size(tokens, 8, 128) for tokens in (1, 64, 512, 1024, 1536, 2048, 4096)]
    [4, 8, 64, 96, 128, 144, 144]
    """
    if not isinstance(num_tokens, int):
        return 64
    if 4 * num_tokens * top_k <= 5 * num_experts:
        return 4
    for moe_block_size, tenths in ((8, 7), (16, 9), (32, 9), (64, 9)):
        if 10 * num_tokens * top_k <= tenths * moe_block_size * num_experts:
            return moe_block_size
    average = num_tokens * top_k / max(num_experts, 1)
    most = average + math.sqrt(average)  # one standard deviation more, where tokens choose freely
    return 96 if most <= 96 else min((128, 144), key=lambda size: math.ceil(most / size))


def aligned_sizes(topk_shape, moe_block_size: int, num_experts: int):
    """(L, number of blocks): the worst case over all routings. Dimensions may be symbolic."""
    rows = topk_shape[0] * topk_shape[1]
    occupied = min_dim(rows, num_experts)  # each occupied expert wastes < one block
    num_slots = rows + occupied * (moe_block_size - 1)
    return num_slots, -(-num_slots // moe_block_size)


# The primitive takes topk_ids int32[T, top_k] and expert_map int32[E], empty if there is none.


def _shape_rule(topk_ids, expert_map, *, moe_block_size, num_experts, **_):
    num_slots, num_blocks = aligned_sizes(topk_ids.shape, moe_block_size, num_experts)
    operands = (topk_ids, expert_map)
    return [result_aval((size,), jnp.int32, operands) for size in (num_slots, num_blocks, 1)]


def _has_kernel(results, topk_ids, expert_map, *, num_experts, **_):
    """A call without rows launches nothing; the kernel counts all experts in shared memory."""
    num_slots = results[0].shape[0]
    return num_experts <= MAX_KERNEL_EXPERTS and (not isinstance(num_slots, int) or num_slots > 0)


def _default(topk_ids, expert_map, *, moe_block_size, num_experts):
    """What the op means, in int32 jnp: one stable sort, then every row's slot by arithmetic."""
    num_slots, num_blocks = aligned_sizes(topk_ids.shape, moe_block_size, num_experts)
    rows = topk_ids.shape[0] * topk_ids.shape[1]
    ids = topk_ids.reshape(rows)
    kept = (ids >= 0) & (ids < num_experts)
    if expert_map.shape[0]:
        kept &= expert_map.at[ids].get(mode="clip") >= 0
    expert = jnp.where(kept, ids, num_experts)  # dropped rows sort last
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)

    counts = jnp.zeros(num_experts, jnp.int32).at[expert].add(1, mode="drop")
    padded = (counts + (moe_block_size - 1)) // moe_block_size * moe_block_size
    block_ends = jnp.cumsum(padded, dtype=jnp.int32)
    # Row i in sorted order moves by the padding of all experts before its own.
    shift = (block_ends - padded) - (jnp.cumsum(counts, dtype=jnp.int32) - counts)
    sorted_expert = expert[order]
    slot = jnp.arange(rows, dtype=jnp.int32) + shift.at[sorted_expert].get(mode="clip")
    slot = jnp.where(sorted_expert < num_experts, slot, num_slots)
    sorted_token_ids = jnp.full((num_slots,), rows, jnp.int32).at[slot].set(order, mode="drop")

    starts = jnp.arange(num_blocks, dtype=jnp.int32) * moe_block_size
    block_expert = jnp.searchsorted(block_ends, starts, side="right").astype(jnp.int32)
    local = expert_map.at[block_expert].get(mode="clip") if expert_map.shape[0] else block_expert
    used = block_ends[-1:]
    return sorted_token_ids, jnp.where(starts < used, local, -1), used


def _custom_call(topk_ids, expert_map, *, moe_block_size, num_experts):
    num_slots, num_blocks = aligned_sizes(topk_ids.shape, moe_block_size, num_experts)
    results = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (num_slots, num_blocks, 1)]
    return jax.ffi.ffi_call(TARGET, results)(
        topk_ids,
        expert_map,
        moe_block_size=np.int64(moe_block_size),
        num_experts=np.int64(num_experts),
    )


def _batching(operands, dims, **params):
    """One routing after the other: each has its own blocks."""
    return map_sequentially(_primitive, operands, dims, params)


_primitive = Primitive(TARGET)
_primitive.multiple_results = True
_primitive.def_impl(
    lambda *operands, **params: xla.apply_primitive(_primitive, *operands, **params)
)
_primitive.def_abstract_eval(_shape_rule)
register_lowerings(_primitive, _default, _custom_call, _has_kernel)
set_batching(_primitive, _batching)
