"""The arguments that route rows to experts: `moe_matmul`'s three arrays and the router weights."""

from typing import NamedTuple

import jax.numpy as jnp

from jax_marlin.ops import checks


class Routing(NamedTuple):
    """Which rows go to which expert, as `moe_align_block_size` returns it.

    Block b holds slots [b * moe_block_size, (b + 1) * moe_block_size) and uses one expert. With
    R = T * top_k routed rows, slot id s reads `x[s // top_k]` and writes row s of the result.
    """

    sorted_token_ids: checks.Integers  # int32[L], ids outside [0, R) are padding
    expert_ids: checks.Integers  # int32[B], -1 skips the block
    num_tokens_past_padded: checks.Integers  # int32[1], slots past it are not used


def check_routing(routing, num_experts, moe_block_size, where):
    """The three routing arrays as int32, with sizes that fit one another."""
    checks.check_host_expert_ids(routing.expert_ids, num_experts, where)
    slots, expert_ids, used = (
        checks.check_ids(ids, name, where)
        for name, ids in zip(Routing._fields, routing, strict=True)
    )
    if used.shape != (1,):
        raise ValueError(f"{where}: num_tokens_past_padded has shape {used.shape}, expected (1,)")
    num_blocks = -(-slots.shape[0] // moe_block_size)
    if expert_ids.shape[0] != num_blocks:
        raise ValueError(
            f"{where}: expert_ids has shape {expert_ids.shape}, expected ({num_blocks},): one for "
            f"each {moe_block_size} of the {slots.shape[0]} sorted_token_ids; was "
            "moe_align_block_size called with another moe_block_size?"
        )
    return slots, expert_ids, used


def flat_weights(topk_weights, num_tokens, top_k, where):
    """Router weights as float32[R], or empty."""
    if topk_weights is None:
        return jnp.zeros((0,), jnp.float32)
    weights = jnp.asarray(topk_weights)
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(
            f"{where}: topk_weights has dtype {weights.dtype}, expected a float dtype; "
            "are topk_ids and topk_weights swapped?"
        )
    if weights.shape not in ((num_tokens * top_k,), (num_tokens, top_k)):
        raise ValueError(
            f"{where}: topk_weights has shape {weights.shape}, expected (T, top_k) = "
            f"({num_tokens}, {top_k}), or flat ({num_tokens * top_k},)"
        )
    checks.check_foldable(weights, weights.ndim, "topk_weights", where)
    return weights.reshape(num_tokens * top_k).astype(jnp.float32)
