"""Routed rows times unquantized experts, in plain JAX: what the ops do with a DenseExpertStack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import xla

from jax_marlin import reference
from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.ops import folding, sharding_rules
from jax_marlin.ops.partitioning import needs_devices
from jax_marlin.ops.primitive import (
    or_empty,
    register_partitioned,
    result_aval,
    set_batching,
)


def check_dense(stack: DenseExpertStack, where: str, implementation: str | None = None) -> None:
    """Refuses leaves that `jax.tree.map` has reshaped or cast, and a kernel that does not exist."""
    weight, bias = stack.weight, stack.bias
    if weight.ndim != 3:
        raise ValueError(
            f"{where}: the stack's weight has shape {weight.shape}, expected 3 axes (E, K, N); use "
            "vmap or scan over further leading axes"
        )
    if bias is not None and bias.shape != (weight.shape[0], weight.shape[2]):
        raise ValueError(
            f"{where}: the stack's bias has shape {bias.shape}, expected (E, N) = "
            f"{(weight.shape[0], weight.shape[2])}"
        )
    if implementation == "cuda":
        raise NotImplementedError(
            f"{where}: implementation='cuda' reads packed weights, got a DenseExpertStack; use "
            "implementation=None, or pack its weights with jax_marlin.quantize"
        )


def dense_moe_matmul(
    x: jax.Array,
    stack: DenseExpertStack,
    sorted_token_ids: jax.Array,
    expert_ids: jax.Array,
    num_tokens_past_padded: jax.Array,
    topk_weights: jax.Array,
    *,
    moe_block_size: int,
    top_k: int,
    weights_before_bias: bool,
    out_dtype: np.dtype,
    where: str,
    pairs: int | None,
) -> jax.Array:
    """`reference.moe_matmul` of a dense stack; operands and result are the same.

    `where` is the public op that error messages name; `pairs` is of gate|up columns that stay
    paired, else None.
    """
    return _primitive.bind(
        x, stack.weight, or_empty(stack.bias, stack.dtype),
        sorted_token_ids, expert_ids, num_tokens_past_padded, topk_weights,
        moe_block_size=moe_block_size, top_k=top_k, weights_before_bias=weights_before_bias,
        out_dtype=out_dtype, where=where, pairs=pairs, implementation=None, devices=needs_devices(),
    )  # fmt: skip


def _shape_rule(x, weight, *operands, top_k, out_dtype, **_):
    return result_aval((x.shape[0] * top_k, weight.shape[2]), out_dtype, (x, weight, *operands))


def _default(x, weight, *operands, **params):
    def product_of(expert):
        own = reference.of_expert(weight, expert).astype(jnp.float32)
        return lambda rows: reference.dot(rows, own)

    return reference.routed_rows(
        x, product_of, *operands, num_experts=weight.shape[0], n=weight.shape[2], **params
    )


# A primitive, though without a kernel, so that shards and manual axes are treated as everywhere.
_primitive = Primitive("jax_marlin_dense_moe_matmul")
_primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
register_partitioned(
    _primitive, _shape_rule, _default, _default, lambda *_, **__: False,
    sharding_rules.dense_moe_matmul(_primitive.bind),
)  # fmt: skip
set_batching(_primitive, functools.partial(folding.routed_batching, _primitive))
