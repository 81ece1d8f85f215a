"""A mixture-of-experts layer composed of single ops: what `moe_ffn` does where one call cannot."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jax_marlin.ops.moe_align_block_size import align_routed_rows, select_moe_block_size
from jax_marlin.ops.moe_matmul import ExpertStack, Routing, routed_matmul


def composed_layer(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    halves: Sequence[ExpertStack],
    down: ExpertStack,
    activate: Callable[[jax.Array, jax.Array], jax.Array],
    weights_on_input: bool,
    implementation: str | None,
    where: str,
) -> jax.Array:
    """`moe_ffn` after its checks; any of the stacks may be packed, any dense.

    Args:
        x: `[T, H]`.
        ids: int32 `[T, top_k]`; those outside the experts contribute nothing.
        weights: float32 `[T, top_k]`.
        halves: gate|up, or gate and up.
        down: `[E, I, N]`.
        activate: (gate, up) float32 `[R, I]` -> float32 `[R, I]`.
        weights_on_input: weigh gate_up's input in place of down's output.
        implementation: None or "xla", for what is packed and for the alignment.
        where: public op that error messages name.

    Returns:
        `[T, N]`, x's dtype.
    """
    num_experts, (num_tokens, top_k) = down.num_experts, ids.shape
    moe_block_size = select_moe_block_size(num_tokens, top_k, num_experts)
    routing = Routing(
        *align_routed_rows(ids, moe_block_size, num_experts, implementation=implementation)
    )
    row_weights = weights.reshape(-1)

    def product(rows, stack, name, top_k, row_weights, weights_before_bias=False):
        return routed_matmul(
            rows, stack, routing,
            moe_block_size=moe_block_size, top_k=top_k, topk_weights=row_weights,
            weights_before_bias=weights_before_bias,
            as_stored=name == "gate_up",
            zero_output=False,  # rows of dropped ids are masked below
            preferred_element_type=jnp.float32,
            implementation=implementation, where=f"{where}, in its product with {name}",
        )  # fmt: skip

    # (w x) W + b = w (x W) + b: on the input, the weight comes before the bias.
    first, last = (row_weights, None) if weights_on_input else (None, row_weights)
    names = ("gate_up",) if len(halves) == 1 else ("gate", "up")
    products = [
        product(x, half, name, top_k, first, weights_on_input)
        for half, name in zip(halves, names, strict=True)
    ]
    gate, up = products if len(products) == 2 else gate_and_up(products[0], halves[0])  # [R, I]
    hidden = activate(gate, up).astype(x.dtype)
    out = product(hidden, down, "down", 1, last)  # float32 [R, N]
    out = out.reshape(num_tokens, top_k, out.shape[-1])
    routed = (ids >= 0) & (ids < num_experts)
    total = jnp.zeros((num_tokens, out.shape[-1]), jnp.float32)
    for slot in range(top_k):  # in this order, so that the rounding is the same in every run
        total += jnp.where(routed[:, slot, None], out[:, slot], 0.0)
    return total.astype(x.dtype)


def gate_and_up(columns: jax.Array, gate_up: ExpertStack) -> tuple[jax.Array, jax.Array]:
    """gate and up `[R, I]` of gate|up columns `[R, 2I]`, paired for several devices or not.

    The blocks are the major part of I before and after, so that a mesh axis over them may stay.
    """
    pairs = gate_up.pairs
    blocks = columns.reshape(columns.shape[0], pairs, 2, columns.shape[1] // (2 * pairs))
    gate, up = blocks[:, :, 0], blocks[:, :, 1]
    shape = (columns.shape[0], gate_up.n_per_expert // 2)
    return gate.reshape(shape), up.reshape(shape)
