"""Reverse mode of `moe_ffn`: gate_up's product is computed again, the rest comes from gradients.py.

Only the arguments are kept between the passes. Keeping float32 `[T * top_k, 2 I]` from the forward
pass would spare one product of five, but the one custom call of a layer never writes it to memory,
and it is the largest array of a layer: 200 MB for 4096 tokens of Qwen3-30B-A3B.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.ops.composition import gate_and_up
from jax_marlin.ops.gradients import routed_gradients
from jax_marlin.ops.moe_align_block_size import align_routed_rows, select_moe_block_size
from jax_marlin.ops.moe_matmul import ExpertStack, Routing, routed_matmul


def layer_gradients(
    g: jax.Array,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    halves: Sequence[ExpertStack],
    down: ExpertStack,
    activate: Callable[[jax.Array, jax.Array], jax.Array],
    weights_on_input: bool,
    implementation: str | None,
    where: str,
) -> tuple[jax.Array, None, jax.Array, tuple[Any, ...], Any]:
    """Cotangents of x, ids (None), weights, halves and down, given the result's, `g` `[T, N]`.

    The other arguments are those of `composed_layer`.
    """
    num_experts, (num_tokens, top_k) = down.num_experts, ids.shape
    first, last = (weights.reshape(-1), None) if weights_on_input else (None, weights.reshape(-1))
    moe_block_size = select_moe_block_size(num_tokens, top_k, num_experts)
    routing = Routing(
        *align_routed_rows(ids, moe_block_size, num_experts, implementation=implementation)
    )
    products = [
        routed_matmul(
            x, half, routing,
            moe_block_size=moe_block_size, top_k=top_k, topk_weights=first,
            weights_before_bias=weights_on_input, as_stored=len(halves) == 1,
            preferred_element_type=jnp.float32,
            implementation=implementation, where=where,
        )
        for half in halves
    ]  # fmt: skip

    def hidden_of(*products):
        pair = products if len(products) == 2 else gate_and_up(products[0], halves[0])
        return activate(*pair)  # [R, I]

    hidden, pull_back = jax.vjp(hidden_of, *products)
    rows = ids.reshape(-1)
    d_hidden, d_weights, d_down = routed_gradients(
        jnp.repeat(g, top_k, axis=0), hidden.astype(x.dtype), rows, last, down,
        top_k=1, implementation=implementation,
    )  # fmt: skip
    d_x, d_halves = jnp.zeros(x.shape, jnp.float32), ()
    d_weights = jnp.zeros(ids.size, jnp.float32) if d_weights is None else d_weights
    for d_product, half in zip(pull_back(d_hidden), halves, strict=True):
        d_rows, d_first, d_half = routed_gradients(
            d_product, x, rows, first, half,
            top_k=top_k, weights_before_bias=True, implementation=implementation,
        )  # fmt: skip
        d_x, d_halves = d_x + d_rows, (*d_halves, d_half)
        d_weights = d_weights if d_first is None else d_weights + d_first
    return d_x.astype(x.dtype), None, d_weights.reshape(weights.shape), d_halves, d_down
