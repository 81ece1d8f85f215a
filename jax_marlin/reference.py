"""What the ops mean, in plain float32 JAX: the default lowering where our kernels do not run.

These functions take the operands of their primitive (absent optional operands are empty arrays)
and hold ONE dequantized expert at a time, so peak memory does not grow with experts or tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jax_marlin import layout

_ROWS_AT_ONCE = 256  # of a dense product in float32, beside the dequantized weight


def dequantize_expert(
    qweight: jax.Array,
    scales: jax.Array,
    zero_points: jax.Array,
    expert: jax.Array,
    *,
    bits: int,
    k: int,
    n: int,
    group_size: int,
    first_tile: int = 0,
) -> jax.Array:
    """Dequantizes columns [64 * first_tile, 64 * first_tile + n) of one expert.

    Args:
        qweight: uint32[E, n_tiles, k_tiles, words].
        scales: float[E, n_tiles, G, 64].
        zero_points: like `scales`, or empty for symmetric weights.
        expert: int32 scalar, clamped to [0, E).
        bits: 4 or 8.
        k: rows of the result.
        n: columns of the result.
        group_size: rows that share a scale.
        first_tile: first column tile.

    Returns:
        float32[k, n], rows in packed (group) order.
    """
    tiles = slice(first_tile, first_tile + -(-n // layout.TILE))
    codes = layout.unpack_tiles(of_expert(qweight, expert)[tiles], bits)[:k, :n]

    def per_row(grouped):  # [n_tiles, G, 64] -> [k, n]
        columns = layout.unpack_columns(of_expert(grouped, expert)[tiles])[:, :n]
        return jnp.repeat(columns.astype(jnp.float32), group_size, axis=0)[:k]

    zeros = per_row(zero_points) if zero_points.size else jnp.float32(2 ** (bits - 1))
    return (codes.astype(jnp.float32) - zeros) * per_row(scales)


def matmul(
    x: jax.Array,
    qweight: jax.Array,
    scales: jax.Array,
    zero_points: jax.Array,
    bias: jax.Array,
    expert: jax.Array,
    *,
    bits: int,
    k: int,
    n: int,
    group_size: int,
    first_tile: int,
    out_dtype,
) -> jax.Array:
    """`x[M, k]` times one expert's columns, plus bias (`[E, N]` the stack's, `[n]` the view's)."""
    weight = dequantize_expert(
        qweight, scales, zero_points, expert,
        bits=bits, k=k, n=n, group_size=group_size, first_tile=first_tile,
    )  # fmt: skip
    first = first_tile * layout.TILE
    row = bias if bias.ndim == 1 else of_expert(bias, expert)[first : first + n]

    def some_rows(x):
        out = dot(x, weight)
        return (out + row.astype(jnp.float32)[None, :] if bias.size else out).astype(out_dtype)

    rows = x.shape[0]
    if not isinstance(rows, int) or rows <= _ROWS_AT_ONCE:
        return some_rows(x)

    words = _as_words(_unfolded(x))

    def next_rows(i, out):  # the last step starts early and computes some rows again
        start = jnp.minimum(i * _ROWS_AT_ONCE, rows - _ROWS_AT_ONCE)
        part = some_rows(_as_floats(lax.dynamic_slice_in_dim(words, start, _ROWS_AT_ONCE), x.dtype))
        return lax.dynamic_update_slice_in_dim(out, part, start, 0)

    return lax.fori_loop(0, -(-rows // _ROWS_AT_ONCE), next_rows, jnp.zeros((rows, n), out_dtype))


def moe_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scales: jax.Array,
    zero_points: jax.Array,
    perm: jax.Array,
    *operands: jax.Array,
    bits: int,
    k: int,
    n: int,
    group_size: int,
    **params,
) -> jax.Array:
    """`routed_rows` of packed experts; the operands after perm and the rest are its own."""

    def product_of(expert):
        weight = dequantize_expert(
            qweight, scales, zero_points, expert, bits=bits, k=k, n=n, group_size=group_size
        )

        def product(rows):
            return dot(rows[:, of_expert(perm, expert)] if perm.size else rows, weight)

        return product

    return routed_rows(x, product_of, *operands, num_experts=qweight.shape[0], n=n, **params)


def routed_rows(
    x: jax.Array,
    product_of: Callable[[jax.Array], Callable[[jax.Array], jax.Array]],
    bias: jax.Array,
    sorted_token_ids: jax.Array,
    expert_ids: jax.Array,
    num_tokens_past_padded: jax.Array,
    topk_weights: jax.Array,
    *,
    num_experts: int,
    n: int,
    moe_block_size: int,
    top_k: int,
    weights_before_bias: bool,
    out_dtype,
) -> jax.Array:
    """Block b of `moe_block_size` slots uses expert `expert_ids[b]`; slot s reads `x[s // top_k]`.

    Walks runs of blocks with one expert. `product_of(expert)`, asked once for each run, holds that
    expert's dequantized weight and maps rows of x to float32[rows, n]. Returns `[T * top_k, n]`;
    rows that no slot of a used block names are zero.
    """
    num_rows, num_blocks = x.shape[0] * top_k, expert_ids.shape[0]
    x, x_dtype = _as_words(_unfolded(x)), x.dtype
    out = _as_words(jnp.zeros((num_rows, n), out_dtype))
    if out.size == 0 or num_blocks == 0:
        return _as_floats(out, out_dtype)
    used_blocks = -(-jnp.maximum(num_tokens_past_padded[0], 0) // moe_block_size)
    used_blocks = jnp.minimum(used_blocks, num_blocks).astype(jnp.int32)

    def one_run(state):  # all blocks from `block` on that use the same expert
        block, _ = state
        expert = expert_ids[block]
        product = product_of(expert)

        def one_block(state):
            block, out = state
            own = block * moe_block_size + jnp.arange(moe_block_size, dtype=jnp.int32)
            slots = sorted_token_ids.at[own].get(mode="fill", fill_value=num_rows)
            valid = (slots >= 0) & (slots < num_rows) & (expert >= 0) & (expert < num_experts)
            rows = x.at[slots // top_k].get(mode="clip")  # [moe_block_size, k]
            y = product(_as_floats(rows, x_dtype))
            row_weights = None
            if topk_weights.size:
                row_weights = topk_weights.at[slots].get(mode="clip")[:, None]
            if weights_before_bias and row_weights is not None:
                y = y * row_weights
            if bias.size:
                y = y + of_expert(bias, expert).astype(jnp.float32)[None, :]
            if not weights_before_bias and row_weights is not None:
                y = y * row_weights
            # Padding slots are sent past the end, where the scatter drops them.
            target = jnp.where(valid, slots, num_rows)
            y = _as_words(y.astype(out_dtype))
            return block + 1, out.at[target].set(y, mode="drop")

        def same_expert(state):
            block, _ = state
            return (block < used_blocks) & (expert_ids[block] == expert)

        return lax.while_loop(same_expert, one_block, state)

    start = (jnp.int32(0), out)
    _, out = lax.while_loop(lambda state: state[0] < used_blocks, one_run, start)
    return _as_floats(out, out_dtype)


def _as_words(rows):
    """16-bit floats as integers, which loops move and scatter as they are.

    XLA's CPU backend scatters bfloat16 by way of float32 and hoists conversions out of loops: with
    floats in the carry it converts all of x and of out, and again for every block.
    """
    return lax.bitcast_convert_type(rows, jnp.uint16) if rows.dtype.itemsize == 2 else rows


def _unfolded(rows):
    """Keeps XLA from computing `_as_words` of a constant, which it gets wrong.

    Folding a gather of columns leaves a constant that is not row-major, and folding the bitcast
    then reads its bytes as if it were (jaxlib 0.10.2 to 0.12.0).
    """
    return lax.optimization_barrier(rows) if rows.dtype.itemsize == 2 else rows


def _as_floats(words, dtype):
    return lax.bitcast_convert_type(words, dtype) if words.dtype != dtype else words


def of_expert(leaf, expert):
    """`leaf[expert]` with the index clamped to the expert axis: never out of bounds."""
    expert = jnp.clip(expert, 0, leaf.shape[0] - 1)
    if leaf.dtype == jnp.bfloat16:
        # The CPU backend of jax 0.10 slices bfloat16 as float32, and would widen all of the leaf
        # before any loop over experts, did it not hang together with the loop's own expert.
        leaf, expert = lax.optimization_barrier((leaf, expert))
    return lax.dynamic_index_in_dim(leaf, expert, 0, False)


def dot(rows, weight, contract: int = 0):
    """float32 product of rows with `contract`, an axis of weight: no platform's coarser default.

    Rows take the weight's dtype; of 16-bit ones only the sums are float32.
    """
    return lax.dot_general(
        rows.astype(weight.dtype),
        weight,
        (((1,), (contract,)), ((), ())),
        precision=lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
