"""The layer of `moe_ffn` as one primitive: one custom call on CUDA, composed of ops elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import xla

from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.ops import ffi_targets, sharding_rules
from jax_marlin.ops.activations import ACTIVATIONS, KERNEL_ACTIVATIONS
from jax_marlin.ops.composition import composed_layer
from jax_marlin.ops.moe_align_block_size import (
    MAX_KERNEL_EXPERTS,
    aligned_sizes,
    check_slots,
    select_moe_block_size,
)
from jax_marlin.ops.partitioning import needs_devices
from jax_marlin.ops.primitive import (
    align_rows,
    has_kernel,
    or_empty,
    register_partitioned,
    result_aval,
)
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.weights import MarlinExpertStack

TARGET = "jax_marlin_moe_ffn_v1"
# Moe block sizes from which on memory and tensor cores, not launches, are what a layer waits for.
_NARROW_ROWS = 64  # rows before their sum are bfloat16, each rounded once, as their sum is
_BY_SLOT = 256  # x and hidden lie in the order of slots
# Columns of gate_up that repay bringing x there: the kernels' kColumnsForSlots.
_SORTED_X_COLUMNS = 4096
_FRAGMENT = 16  # a block of the kernel pairs 16 columns of gate with the same 16 of up


def can_fuse(halves: tuple, down) -> bool:
    """Whether one call takes these stacks: packed, gate and up in one, columns whole fragments."""
    if len(halves) != 1 or any(isinstance(s, DenseExpertStack) for s in (*halves, down)):
        return False
    return down.k % _FRAGMENT == 0 and down.num_experts <= MAX_KERNEL_EXPERTS


def fused_layer(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: MarlinExpertStack,
    down: MarlinExpertStack,
    activation: str,
    weights_on_input: bool,
    implementation: str | None,
) -> jax.Array:
    """`composed_layer` of stacks that `can_fuse`.

    Args:
        x: `[T, H]`.
        ids: int32 `[T, top_k]`; those outside the experts contribute nothing.
        weights: float32 `[T, top_k]`.
        gate_up: `[E, H, 2I]`.
        down: `[E, I, N]`.
        activation: a name in `ACTIVATIONS`.
        weights_on_input: weigh gate_up's input in place of down's output.
        implementation: None or "cuda".

    Returns:
        `[T, N]`, x's dtype.

    Raises:
        ValueError: more slots than int32 counts.
    """
    num_experts = down.num_experts
    num_tokens, top_k = ids.shape
    moe_block_size = _block_size(num_tokens, top_k, num_experts, gate_up.held_spec)
    check_slots(ids.shape, moe_block_size, num_experts, "moe_ffn")
    return _primitive.bind(
        x, ids, weights, *_leaves(gate_up), *_leaves(down),
        gate_up_spec=gate_up.held_spec, down_spec=down.held_spec, activation=activation,
        weights_on_input=bool(weights_on_input), implementation=implementation,
        devices=needs_devices(),
    )  # fmt: skip


def _block_size(num_tokens: int, top_k: int, num_experts: int, gate_up: QuantSpec) -> int:
    """As of any routed product; or 256, which copies bring together if x is in the order of slots.

    An average expert fills two: the last one is mostly padding.
    """
    routes = num_tokens * top_k
    if isinstance(num_tokens, int) and gate_up.n >= _SORTED_X_COLUMNS:
        if routes >= 2 * _BY_SLOT * num_experts:
            return _BY_SLOT
    return select_moe_block_size(num_tokens, top_k, num_experts)


def _leaves(stack: MarlinExpertStack) -> tuple[jax.Array, ...]:
    return (
        stack.qweight,
        stack.scales,
        or_empty(stack.zero_points, stack.dtype),
        or_empty(stack.perm, jnp.int32),
        or_empty(stack.bias, stack.dtype),
    )


def _stack(leaves, spec) -> MarlinExpertStack:
    qweight, scales, *optional = leaves
    zero_points, perm, bias = (leaf if leaf.size else None for leaf in optional)
    return MarlinExpertStack(qweight, scales, zero_points, perm, bias, spec)


def _shape_rule(x, *operands, down_spec, **_):
    return result_aval((x.shape[0], down_spec.n), x.dtype, (x, *operands))


def _default(
    x, ids, weights, *leaves, gate_up_spec, down_spec, activation, weights_on_input
):  # fmt: skip
    return composed_layer(
        x, ids, weights, (_stack(leaves[:5], gate_up_spec),), _stack(leaves[5:], down_spec),
        ACTIVATIONS[activation], weights_on_input, None, "moe_ffn",
    )  # fmt: skip


def _has_kernel(results, x, ids, *_, gate_up_spec, **__):
    return has_kernel(results, x) and ids.shape[1] > 0 and gate_up_spec.pairs == 1


def _custom_call(
    x, ids, weights, *leaves, gate_up_spec, down_spec, activation, weights_on_input
):  # fmt: skip
    x = align_rows(x)
    num_tokens, top_k = ids.shape
    num_experts, routes = leaves[0].shape[0], num_tokens * top_k
    moe_block_size = _block_size(num_tokens, top_k, num_experts, gate_up_spec)
    num_slots, num_blocks = aligned_sizes(ids.shape, moe_block_size, num_experts)
    scratch_bytes = ffi_targets.scratch_bytes(
        num_slots, moe_block_size, down_spec.k, down_spec.n, down_spec.bits
    )
    # Not float16: a row may be larger than that holds while the sum is not.
    narrow = moe_block_size >= _NARROW_ROWS and x.dtype == jnp.bfloat16
    # Copies find rows of a block side by side where they lie in the order of slots, padding between
    # them. Act-order moves its rows anyway.
    by_slot = moe_block_size == _BY_SLOT
    row_dtype = x.dtype if narrow else np.dtype(np.float32)
    num_rows = routes
    if by_slot:
        # x in the order of slots takes the place of these rows until they are written.
        row_bytes = down_spec.n * row_dtype.itemsize
        with_room = max(routes, -(-num_slots * x.shape[1] * x.dtype.itemsize // row_bytes))
        num_rows = with_room if with_room < 2**31 else routes
    results = [
        ((num_tokens, down_spec.n), x.dtype),
        ((num_slots if by_slot and not leaves[8].size else routes, down_spec.k), x.dtype),  # hidden
        # Weighted rows, unless down sums them.
        ((num_rows, down_spec.n), row_dtype),
        ((routes, x.shape[1]) if leaves[3].size else (0,), x.dtype),  # x in act-order
        ((routes, down_spec.k) if leaves[8].size else (0,), x.dtype),  # hidden in act-order
        ((num_slots,), np.int32),  # sorted_token_ids
        ((num_blocks,), np.int32),  # expert_ids
        ((1,), np.int32),  # num_tokens_past_padded
        ((scratch_bytes,), np.uint8),
    ]
    attributes = {
        "gate_up_bits": gate_up_spec.bits,
        "gate_up_group_size": gate_up_spec.group_size,
        "down_bits": down_spec.bits,
        "down_group_size": down_spec.group_size,
        "k": gate_up_spec.k,
        "intermediate": down_spec.k,
        "moe_block_size": moe_block_size,
        "activation": KERNEL_ACTIVATIONS[activation],
        "weights_on_input": weights_on_input,
    }
    call = jax.ffi.ffi_call(TARGET, [jax.ShapeDtypeStruct(*result) for result in results])
    return call(
        x, ids, weights, *leaves, **{name: np.int64(value) for name, value in attributes.items()}
    )[0]


# No batching rule: `moe_ffn`'s custom_vmap stands outside and folds a batch into tokens.
_primitive = Primitive(TARGET)
_primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
register_partitioned(
    _primitive,
    _shape_rule,
    _default,
    _custom_call,
    _has_kernel,
    sharding_rules.moe_ffn(_primitive.bind),
)
