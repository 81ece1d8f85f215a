"""matmul: dense rows times one quantized weight, `[..., K]` to `[..., N]`."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import xla
from jax.typing import ArrayLike, DTypeLike

from jax_marlin import layout, reference
from jax_marlin.explicit_mesh import row_on_mesh, unpair_on_mesh
from jax_marlin.ops import checks, ffi_targets, folding, sharding_rules
from jax_marlin.ops.gradients import differentiable, frozen, trained, vary_together
from jax_marlin.ops.partitioning import needs_devices
from jax_marlin.ops.primitive import (
    align_rows,
    has_kernel,
    map_sequentially,
    or_empty,
    register_partitioned,
    result_aval,
    set_batching,
)
from jax_marlin.ops.transposed_product import transposed_product
from jax_marlin.weights import MarlinExpertStack, MarlinLinear

TARGET = "jax_marlin_matmul_v1"


def matmul(
    x: ArrayLike,
    w: MarlinLinear | MarlinExpertStack,
    *,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies rows by a quantized weight and adds its bias; accumulates in float32.

    Under `jax.vmap` a batch of x folds into the rows of one call and copies no weights; a batch
    of weights or expert indices runs one call after another.

    Reverse mode gives gradients of x and of the bias, by one product with the transposed
    weight. What is packed is frozen: scales get zeros, integers float0.

    Args:
        x: float[..., K] of the weight's dtype; any number of rows, also none.
        w: a `MarlinLinear` of shape (K, N), or a stack whose leaves lost their expert axis
            (what `jax.tree.map(lambda a: a[e], stack)`, `scan` and `vmap` yield).
        preferred_element_type: dtype of the result; None means `x.dtype`. float32 comes straight
            from the accumulator.
        implementation: None picks and always works; "cuda" or "xla" runs by name or raises.

    Returns:
        float[..., N].

    Raises:
        TypeError: `w` is a whole stack, or x has another dtype than the weight.
        ValueError: the last axis of x is not K long.
        NotImplementedError: `implementation="cuda"` cannot run; the message says why.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jax_marlin as jm
        >>> w = jm.quantize(np.ones((64, 128), np.float32), group_size=32)
        >>> jm.matmul(jnp.ones((3, 64)), w).shape
        (3, 128)
    """
    stack, expert, own_bias, first_tile, n = _view(w)
    checks.check_leaves(stack, "matmul", own_bias)
    if own_bias is not None and own_bias.shape != (n,):
        raise ValueError(
            f"matmul: w's own bias has shape {own_bias.shape}, expected {(n,)}, one for each of "
            "its columns; use None for the stack's, or w[:, a:b], which cuts both"
        )
    spec = stack.held_spec
    x = checks.check_x(x, spec.k, stack.dtype, "matmul")
    checks.check_implementation(implementation, x.dtype, "matmul")
    written, wanted = checks.result_dtypes(x.dtype, preferred_element_type, "matmul")
    if own_bias is not None:
        stack = dataclasses.replace(stack, bias=None)
    leading = x.shape[:-1]
    if x.ndim != 2:
        x = checks.check_foldable(x, len(leading), "x", "matmul")
        x = x.reshape(math.prod(leading), spec.k)
    static = _Static(first_tile * layout.TILE, n, written, implementation)
    out = _product(static, *vary_together(x, stack, own_bias, expert))
    out = unpair_on_mesh(out, spec.pairs)
    out = out if len(leading) == 1 else out.reshape(*leading, n)
    return out.astype(wanted)


class _Static(NamedTuple):
    first: int  # column of the stack
    n: int
    out_dtype: np.dtype
    implementation: str | None


def _compute(static: _Static, x, stack: MarlinExpertStack, own_bias, expert) -> jax.Array:
    """Checked arguments to `[M, n]`, columns as stored; an own bias replaces the stack's."""
    spec = stack.held_spec
    if stack.perm is not None:
        x = jnp.take(x, row_on_mesh(stack.perm, expert), axis=-1, mode="clip")
    return _primitive.bind(
        x,
        stack.qweight,
        stack.scales,
        or_empty(stack.zero_points, stack.dtype),
        or_empty(stack.bias if own_bias is None else own_bias, stack.dtype),
        expert,
        bits=spec.bits,
        k=spec.k,
        n=static.n,
        group_size=spec.group_size,
        first_tile=static.first // layout.TILE,
        out_dtype=static.out_dtype,
        implementation=static.implementation,
        devices=needs_devices(),
    )


def _backward(static, weights, g):
    """Every row has the same expert; biases get the sum of g's rows."""
    stack, own_bias, expert = weights
    expert = jnp.clip(expert, 0, stack.num_experts - 1)
    d_x = transposed_product(
        g, jnp.broadcast_to(expert, g.shape[:1]), stack,
        out_dtype=stack.dtype, first_column=static.first, one_expert=True,
        implementation=static.implementation,
    )  # fmt: skip
    total = jnp.sum(g, axis=0, dtype=jnp.float32).astype(stack.dtype)
    d_stack = frozen(stack)
    if stack.bias is not None:
        d_bias = lax.dynamic_update_slice(
            jnp.zeros_like(stack.bias), total[None], (expert, jnp.int32(static.first))
        )
        d_stack = dataclasses.replace(d_stack, bias=d_bias)
    return d_x, d_stack, None if own_bias is None else total, None


def _primals(x, stack, own_bias, expert):
    return x, trained(stack), own_bias, None


_product = differentiable(_compute, _backward, _primals, keep=lambda x, *weights: weights)


def _view(w):
    """(stack with an expert axis, expert, own bias, first column tile, columns) of a weight."""
    if isinstance(w, MarlinExpertStack) and w.is_single:
        w = w.as_linear()
    if isinstance(w, MarlinLinear):
        start, stop = w.held_columns
        return w.stack, w.expert, w.bias, start // layout.TILE, stop - start
    if isinstance(w, MarlinExpertStack):
        raise TypeError(
            f"matmul: w is a stack of {w.num_experts} experts, expected one weight; use w[e], "
            "or moe_matmul, ragged_dot or moe_ffn for routed rows"
        )
    raise TypeError(f"matmul: w is {type(w).__name__}, expected MarlinLinear (see jm.quantize)")


def _shape_rule(x, *weight_operands, n, out_dtype, **_):
    return result_aval((x.shape[0], n), out_dtype, (x, *weight_operands))


def _custom_call(
    x, qweight, scales, zero_points, bias, expert,
    *, bits, k, n, group_size, first_tile, out_dtype,
):  # fmt: skip
    rows = x.shape[0]
    scratch_bytes = ffi_targets.scratch_bytes(rows, 0, k, n, bits)
    results = (
        jax.ShapeDtypeStruct((rows, n), out_dtype),
        jax.ShapeDtypeStruct((scratch_bytes,), np.uint8),
    )
    out, _ = jax.ffi.ffi_call(TARGET, results)(
        align_rows(x), qweight, scales, zero_points, bias, expert,
        bits=np.int64(bits), k=np.int64(k), group_size=np.int64(group_size),
        first_tile=np.int64(first_tile),
    )  # fmt: skip
    return out


def _batching(operands, dims, **params):
    """A batch of x is more rows of one call; batched weights run one call after another."""
    x, *weights = operands
    x_dim, *weight_dims = dims
    if any(d is not None for d in weight_dims):
        weights, weight_dims = _fold_stacks(weights, weight_dims)
        return map_sequentially(_primitive, (x, *weights), (x_dim, *weight_dims), params)
    x = jnp.moveaxis(x, x_dim, 0)  # [B, M, K]
    checks.check_foldable(x, 2, "x, its mapped axis first,", "matmul")
    out = _primitive.bind(x.reshape(-1, x.shape[2]), *weights, **params)
    return out.reshape(*x.shape[:2], params["n"]), 0


def _fold_stacks(weights, dims):
    """Batched leaves [B, E, ...] become one stack [B * E, ...], and only the expert is mapped.

    Slicing the leaves themselves for every step would copy packed weights.
    """
    own_bias = weights[3].ndim == (1 if dims[3] is None else 2)  # and not a leaf of the stack
    end = 3 if own_bias else 4
    folded = folding.fold_leaves(weights[:end], dims[:end])
    if folded is None or not folded[1]:
        return weights, dims
    leaves, batch = folded[0], weights[0].shape[dims[0]]
    expert = folding.to_front(weights[-1], dims[-1], batch)
    num_experts = leaves[0].shape[0] // batch
    expert = jnp.clip(expert, 0, num_experts - 1)  # or it would name a neighbour's
    expert = expert + num_experts * jnp.arange(batch, dtype=jnp.int32)
    # Absent leaves, which are empty, stay mapped.
    mapped = [
        None if leaf.size or dim is None else 0
        for leaf, dim in zip(leaves, dims[:end], strict=True)
    ]
    return [*leaves, *weights[end:-1], expert], [*mapped, *dims[end:-1], 0]


_primitive = Primitive(TARGET)
_primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
register_partitioned(
    _primitive,
    _shape_rule,
    reference.matmul,
    _custom_call,
    has_kernel,
    sharding_rules.matmul(_primitive.bind),
)
set_batching(_primitive, _batching)
