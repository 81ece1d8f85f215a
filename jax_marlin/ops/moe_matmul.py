"""moe_matmul: rows routed to experts times an expert stack, in one launch."""

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import xla
from jax.typing import ArrayLike, DTypeLike

from jax_marlin import reference
from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.explicit_mesh import row_on_mesh, unpair_on_mesh
from jax_marlin.ops import checks, ffi_targets, folding, sharding_rules
from jax_marlin.ops.dense_experts import check_dense, dense_moe_matmul
from jax_marlin.ops.expert_numbers import check_own_experts
from jax_marlin.ops.gradients import (
    differentiable,
    routed_gradients,
    trained,
    vary_together,
)
from jax_marlin.ops.moe_align_block_size import expert_of_row
from jax_marlin.ops.partitioning import needs_devices
from jax_marlin.ops.primitive import (
    align_rows,
    has_kernel,
    or_empty,
    register_partitioned,
    result_aval,
    set_batching,
)
from jax_marlin.ops.routing_arguments import Routing, check_routing, flat_weights
from jax_marlin.weights import MarlinExpertStack

ExpertStack: TypeAlias = MarlinExpertStack | DenseExpertStack
TARGET = "jax_marlin_moe_matmul_v1"


def moe_matmul(
    x: ArrayLike,
    stack: ExpertStack,
    sorted_token_ids: checks.Integers,
    expert_ids: checks.Integers,
    num_tokens_past_padded: checks.Integers,
    *,
    moe_block_size: checks.StaticInt,
    top_k: checks.StaticInt,
    topk_weights: ArrayLike | None = None,
) -> jax.Array:
    """Multiplies each routed row by its expert's weight; accumulates in float32.

    Reverse mode gives gradients of x, topk_weights and the bias (and of a `DenseExpertStack`'s
    weights) by one product of the same size, with one dequantized expert in memory at a time. What
    is packed is frozen: scales get zeros, integers float0. Under `jax.vmap` a batch of x, of
    routings or of stacks is one larger call.

    Args:
        x: float[T, K] of the stack's dtype.
        stack: E experts of shape (K, N), packed or a `DenseExpertStack`.
        sorted_token_ids: int32[L]; slot id s reads `x[s // top_k]` and writes row s of the result;
            ids outside [0, T * top_k) are padding.
        expert_ids: int32[B]; expert of each block of `moe_block_size` slots. -1 skips the block;
            on the device, so does any id outside [0, E). Inside `jax.shard_map` they count the
            experts that the device's own stack holds: see `expert_map` of `moe_align_block_size`.
        num_tokens_past_padded: int32[1]; slots in use, a multiple of `moe_block_size`.
        moe_block_size: slots of one block.
        top_k: routed rows of one row of x.
        topk_weights: float[T * top_k] or [T, top_k], multiplies the finished row (bias included).

    Returns:
        float[T * top_k, N] of x's dtype. Rows that no used slot names are zero.

    Raises:
        TypeError: x has another dtype than the stack, or ids are not integers.
        ValueError: a shape does not fit, or a host array holds an expert id outside [-1, E); inside
            `jax.shard_map`, a packed stack's experts vary over an axis that neither ids nor x do.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jax_marlin as jm
        >>> stack = jm.quantize(np.ones((5, 64, 128), np.float32), group_size=32)
        >>> routing = jm.moe_align_block_size(jnp.array([[4, 0], [4, 2], [0, 4]]), 8, 5)
        >>> jm.moe_matmul(jnp.ones((3, 64)), stack, *routing, moe_block_size=8, top_k=2).shape
        (6, 128)
    """
    routing = Routing(sorted_token_ids, expert_ids, num_tokens_past_padded)
    return routed_matmul(
        x, stack, routing,
        moe_block_size=moe_block_size, top_k=top_k, topk_weights=topk_weights, where="moe_matmul",
    )  # fmt: skip


def routed_matmul(
    x: ArrayLike,
    stack: ExpertStack,
    routing: Routing,
    *,
    moe_block_size: checks.StaticInt,
    top_k: checks.StaticInt,
    topk_weights: ArrayLike | None = None,
    weights_before_bias: bool = False,
    zero_output: bool = True,
    as_stored: bool = False,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
    where: str = "routed_matmul",
) -> jax.Array:
    """`moe_matmul` with the switches that the ops built on it need.

    Args:
        x, stack, routing, moe_block_size, top_k, topk_weights: as in `moe_matmul`.
        weights_before_bias: acc * w + bias in place of (acc + bias) * w.
        zero_output: False leaves rows that no used slot names undefined.
        as_stored: the stack is gate|up, whose columns stay as they are paired for several devices,
            and are cut into whole pairs alone.
        preferred_element_type: dtype of the result; None means `x.dtype`.
        implementation: None, "cuda" or "xla".
        where: public op that error messages name.

    Returns:
        float[T * top_k, N].
    """
    if not isinstance(stack, MarlinExpertStack | DenseExpertStack) or stack.is_single:
        is_array = isinstance(stack, np.ndarray | jax.Array)  # whose repr is a page of numbers
        got = type(stack).__name__ if is_array else repr(stack)
        raise TypeError(f"{where}: stack is {got}, expected a MarlinExpertStack of experts")
    if isinstance(stack, DenseExpertStack):
        check_dense(stack, where, implementation)
    else:
        checks.check_leaves(stack, where)
    x = checks.check_x(x, stack.k, stack.dtype, where, rank=2)
    checks.check_implementation(implementation, x.dtype, where)
    moe_block_size = checks.check_positive(moe_block_size, "moe_block_size", where)
    top_k = checks.check_positive(top_k, "top_k", where)
    slots, expert_ids, used = check_routing(routing, stack.num_experts, moe_block_size, where)
    remedy = "moe_align_block_size(..., expert_map=...) with the device's own numbers"
    check_own_experts(stack, x, expert_ids, "expert_ids", remedy, where)
    written, wanted = checks.result_dtypes(x.dtype, preferred_element_type, where)
    row_weights = flat_weights(topk_weights, x.shape[0], top_k, where)
    static = _Static(
        moe_block_size, top_k, bool(weights_before_bias), bool(zero_output), written,
        implementation, where, stack.pairs if as_stored else None,
    )  # fmt: skip
    out = _product(static, *vary_together(x, stack, slots, expert_ids, used, row_weights))
    return (out if as_stored else unpair_on_mesh(out, stack.pairs)).astype(wanted)


class _Static(NamedTuple):
    moe_block_size: int
    top_k: int
    weights_before_bias: bool
    zero_output: bool
    out_dtype: np.dtype
    implementation: str | None
    where: str
    pairs: int | None  # of gate|up columns that stay paired


def _compute(
    static: _Static, x, stack: ExpertStack, slots, expert_ids, used, row_weights
) -> jax.Array:
    """Checked arguments to `[T * top_k, N]`, columns as stored; `row_weights` is empty for ones."""
    if isinstance(stack, DenseExpertStack):
        return dense_moe_matmul(
            x, stack, slots, expert_ids, used, row_weights,
            moe_block_size=static.moe_block_size, top_k=static.top_k,
            weights_before_bias=static.weights_before_bias, out_dtype=static.out_dtype,
            where=static.where, pairs=static.pairs,
        )  # fmt: skip
    spec, perm = stack.held_spec, stack.perm
    if perm is not None and spec.shared_perm:
        # One gather of x for all experts, and none for each routed row.
        x, perm = jnp.take(x, row_on_mesh(perm, 0), axis=-1, mode="clip"), None
    return _primitive.bind(
        x,
        stack.qweight,
        stack.scales,
        or_empty(stack.zero_points, stack.dtype),
        or_empty(perm, jnp.int32),
        or_empty(stack.bias, stack.dtype),
        slots,
        expert_ids,
        used,
        row_weights,
        bits=spec.bits,
        k=spec.k,
        n=spec.n,
        group_size=spec.group_size,
        **static._asdict(),
        devices=needs_devices(),
    )


def _backward(static, operands, g):
    x, stack, slots, expert_ids, used, row_weights = operands
    ids = expert_of_row(
        slots, expert_ids, used, num_rows=g.shape[0], moe_block_size=static.moe_block_size
    )
    d_x, d_weights, d_stack = routed_gradients(
        g, x, ids, row_weights if row_weights.size else None, stack,
        top_k=static.top_k, weights_before_bias=static.weights_before_bias,
        implementation=static.implementation,
    )  # fmt: skip
    return d_x.astype(x.dtype), d_stack, None, None, None, d_weights


def _primals(x, stack, slots, expert_ids, used, row_weights):
    return x, trained(stack), None, None, None, row_weights if row_weights.size else None


_product = differentiable(_compute, _backward, _primals, keep=lambda *operands: operands)


def _shape_rule(x, *operands, n, top_k, out_dtype, **_):
    return result_aval((x.shape[0] * top_k, n), out_dtype, (x, *operands))


def _default(*operands, zero_output, **params):
    del zero_output  # rows that no slot names are always zero here
    return reference.moe_matmul(*operands, **params)


def _custom_call(x, qweight, scales, zero_points, perm, *rest, n, out_dtype, **params):
    x = align_rows(x)
    num_rows, num_slots = x.shape[0] * params["top_k"], rest[1].shape[0]
    scratch_bytes = ffi_targets.scratch_bytes(
        num_slots, params["moe_block_size"], params["k"], n, params["bits"]
    )
    # A permutation of each expert's own makes the handler gather every routed row first.
    gathered = (num_rows, x.shape[1]) if perm.size else (0,)
    results = (
        jax.ShapeDtypeStruct((num_rows, n), out_dtype),
        jax.ShapeDtypeStruct((scratch_bytes,), np.uint8),
        jax.ShapeDtypeStruct(gathered, x.dtype),
    )
    attributes = {name: np.int64(value) for name, value in params.items()}
    call = jax.ffi.ffi_call(TARGET, results)
    return call(x, qweight, scales, zero_points, perm, *rest, **attributes)[0]


_primitive = Primitive(TARGET)
_primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
register_partitioned(
    _primitive,
    _shape_rule,
    _default,
    _custom_call,
    has_kernel,
    sharding_rules.moe_matmul(_primitive.bind),
)
set_batching(_primitive, functools.partial(folding.routed_batching, _primitive))
