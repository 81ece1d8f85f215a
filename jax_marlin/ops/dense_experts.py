"""Routed rows times unquantized experts, in plain JAX: what the ops do with a DenseExpertStack."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin import reference
from jax_marlin.dense_stack import DenseExpertStack


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
) -> jax.Array:
    """`reference.moe_matmul` of a dense stack; operands and result are the same."""

    def product_of(expert):
        weight = reference.of_expert(stack.weight, expert).astype(jnp.float32)
        return lambda rows: reference.dot(rows, weight)

    return reference.routed_rows(
        x,
        product_of,
        jnp.zeros((0,), stack.dtype) if stack.bias is None else stack.bias,
        sorted_token_ids,
        expert_ids,
        num_tokens_past_padded,
        topk_weights,
        num_experts=stack.num_experts,
        n=stack.n_per_expert,
        moe_block_size=moe_block_size,
        top_k=top_k,
        weights_before_bias=weights_before_bias,
        out_dtype=out_dtype,
    )
