"""The k largest of a row, best first, without a sort where rows are few and short."""

import jax
import jax.numpy as jnp

_MOST_COMPARISONS = 1 << 20  # in all rows together


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`, by counting for each element how many come before it.

    On a GPU XLA sorts a copy of the rows, in four kernels; the count is one and so is what follows.
    A decode step with one expert layer after another feels the difference.

    Args:
        values: float32 `[..., E]`.
        k: 1 <= k <= E.

    Returns:
        The k largest values and their indices int32, both `[..., k]`; of two equal ones the lower
        index comes first, and NaN before everything. Of a value that is zero or subnormal the sign
        or the value may be lost, the order never.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_marlin.top_k import top_k
        >>> [a.tolist() for a in top_k(jnp.array([[0.0, 3.0, -1.0, 3.0]]), 3)]
        [[[3.0, 3.0, 0.0]], [[1, 3, 0]]]
    """
    if not all(isinstance(size, int) for size in values.shape):  # symbolic, for jax.export
        return jax.lax.top_k(values, k)
    size = values.shape[-1]
    if values.size * size > _MOST_COMPARISONS:
        return jax.lax.top_k(values, k)
    order = _order(jax.lax.stop_gradient(values))
    index = jnp.arange(size, dtype=jnp.int32)
    mine, other = order[..., :, None], order[..., None, :]
    before = (other > mine) | ((other == mine) & _pairwise(index[None, :] < index[:, None], mine))
    rank = jnp.sum(before, axis=-1, dtype=jnp.int32)  # [..., E], each of 0 .. E - 1 once
    slots = jnp.arange(k, dtype=jnp.int32)
    chosen = rank[..., None, :] == _pairwise(slots[:, None], rank[..., None, :])  # [..., k, E]
    zero = jnp.zeros((), values.dtype)
    # One term of each sum is not zero.
    return (
        jnp.sum(jnp.where(chosen, values[..., None, :], zero), axis=-1),
        jnp.sum(jnp.where(chosen, _pairwise(index[None, :], chosen), 0), axis=-1, dtype=jnp.int32),
    )


def _order(values: jax.Array) -> jax.Array:
    """int32 that compare as `jax.lax.top_k` does: -0 below 0, NaN of either sign above all."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    # The bits of negative numbers grow downwards: turn all but the sign.
    signed = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    return jnp.where(jnp.isnan(values), jnp.int32(0x7FFFFFFF), signed)


def _pairwise(matrix: jax.Array, like: jax.Array) -> jax.Array:
    """`matrix` with the leading axes of `like`."""
    return matrix.reshape((1,) * (like.ndim - 2) + matrix.shape)
