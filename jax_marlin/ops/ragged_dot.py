"""ragged_dot: rows sorted by group times packed experts, as `jax.lax.ragged_dot` does it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.ops import checks
from jax_marlin.ops.dense_experts import check_dense
from jax_marlin.ops.expert_numbers import check_own_experts
from jax_marlin.ops.moe_align_block_size import align_routed_rows, select_moe_block_size
from jax_marlin.ops.moe_matmul import ExpertStack, Routing, routed_matmul

_WHERE = "ragged_dot"


def ragged_dot(
    x: ArrayLike,
    stack: ExpertStack,
    group_sizes: checks.Integers,
    *,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: checks.Integers | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot(x, stack.dequantize(), group_sizes)` without ever unpacking the stack.

    The first group_sizes[0] rows of x meet expert 0, the next group_sizes[1] rows expert 1, and so
    on; a bias of the stack is added to those rows. Rows past sum(group_sizes) are zero. Sizes on
    the device are never trusted: a negative one counts as 0 and a sum past M ends at M.

    Reverse mode gives gradients of x and of the bias, as in `moe_matmul`; under `jax.vmap` a batch
    of x, of sizes or of stacks is one larger call.

    Args:
        x: `[M, K]` of the stack's dtype.
        stack: E packed experts `[K, N]`, or a `DenseExpertStack`.
        group_sizes: `[E]` integers; with a `group_offset`, `[G]` for any G.
        precision: None, a name or a `jax.lax.Precision` (or a pair), as `jax.lax.dot` takes it.
            It is checked and changes nothing: accumulation is always float32.
        preferred_element_type: dtype of the result; None is x's.
        group_offset: integer scalar or `[1]`: the stack's expert e is group group_offset + e. For a
            stack that holds some of the G groups; rows of the other groups are zero. Inside
            `jax.shard_map` a stack cut by expert is one: `jax.lax.axis_index(axis) * E`.
        implementation: None chooses; "cuda" or "xla" run or raise.

    Returns:
        `[M, N]`.

    Raises:
        TypeError: a dtype that does not fit; x of another dtype than the stack.
        ValueError: wrong shapes; host group sizes that are negative or exceed M; inside
            `jax.shard_map`, a packed stack's experts vary over an axis that neither sizes,
            offset nor x do.
        NotImplementedError: `implementation="cuda"` cannot run, or precision is a dot algorithm.

    Example:
        >>> import jax.numpy as jnp
        >>> import jax_marlin as jm
        >>> stack = jm.quantize(jnp.ones((3, 32, 64)), group_size=32)
        >>> jm.ragged_dot(jnp.ones((5, 32)), stack, jnp.array([2, 0, 1]))[:, 0].tolist()
        [32.0, 32.0, 32.0, 0.0, 0.0]
    """
    _check_precision(precision)
    if not isinstance(stack, ExpertStack) or stack.is_single:
        raise TypeError(
            f"{_WHERE}: stack is {type(stack).__name__}, expected a MarlinExpertStack with an"
            " expert axis (see jm.load_gptq_stacked)"
        )
    x = checks.check_x(x, stack.k, stack.dtype, _WHERE, rank=2)
    if isinstance(stack, DenseExpertStack):
        check_dense(stack, _WHERE, implementation)
    checks.check_implementation(implementation, x.dtype, _WHERE)
    num_rows, num_experts = x.shape[0], stack.num_experts
    sizes = _checked_sizes(group_sizes, num_rows, None if group_offset is not None else num_experts)
    expert = _group_of_row(sizes, num_rows)
    if group_offset is not None:
        expert = _shifted(expert, _checked_offset(group_offset))
    remedy = "group_offset=jax.lax.axis_index(axis) * stack.num_experts"
    check_own_experts(stack, x, expert, "group_sizes", remedy, _WHERE)

    moe_block_size = select_moe_block_size(num_rows, 1, num_experts)
    routing = Routing(
        *align_routed_rows(
            expert[:, None], moe_block_size, num_experts, implementation=implementation
        )
    )
    return routed_matmul(
        x,
        stack,
        routing,
        moe_block_size=moe_block_size,
        top_k=1,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
        where=_WHERE,
    )


def _group_of_row(sizes: jax.Array, num_rows) -> jax.Array:
    """int32 `[M]`: the group of each row, -1 past the last group. `sizes` `[G]` in 0 .. M."""
    # Saturating at M, the running sum cannot overflow int32 whatever the sizes are.
    ends = jax.lax.associative_scan(lambda a, b: jnp.minimum(a + b, num_rows), sizes)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    # By comparison with all ends, one kernel: a search is a loop, which breaks up command buffers.
    group = jnp.searchsorted(ends, rows, side="right", method="compare_all").astype(jnp.int32)
    return jnp.where(group < sizes.shape[0], group, -1)


def _shifted(group: jax.Array, offset: jax.Array) -> jax.Array:
    """group - offset where that is a group from the offset on, else -1."""
    return jnp.where((group >= 0) & (group >= offset), group - offset, -1)


def _checked_sizes(group_sizes: checks.Integers, num_rows, num_experts: int | None) -> jax.Array:
    """int32 `[G]`, each in 0 .. M; `num_experts` is None where any number of groups fits."""
    if not isinstance(group_sizes, jax.Array):
        group_sizes = np.asarray(group_sizes)
    dtype, shape = group_sizes.dtype, group_sizes.shape
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{_WHERE}: group_sizes has dtype {dtype}, expected an integer dtype")
    if len(shape) != 1 or shape[0] < 1 or num_experts not in (None, shape[0]):
        expected = "(groups,)" if num_experts is None else f"(num_experts,) = ({num_experts},)"
        raise ValueError(f"{_WHERE}: group_sizes has shape {shape}, expected {expected}")
    if isinstance(group_sizes, np.ndarray):
        least, total = int(group_sizes.min()), sum(int(size) for size in group_sizes)
        if least < 0:
            raise ValueError(f"{_WHERE}: group_sizes holds {least}, expected sizes >= 0")
        if isinstance(num_rows, int) and total > num_rows:
            raise ValueError(
                f"{_WHERE}: group_sizes sums to {total}, expected at most {num_rows}, x's rows"
            )
        return jnp.asarray(group_sizes.astype(np.int32))
    sizes: jax.Array = group_sizes
    sharding = jax.typeof(sizes).sharding
    if sharding.spec != PartitionSpec(None):
        # Typed as cut, by an explicit mesh: a few numbers, of which each device needs all.
        sizes = jax.sharding.reshard(sizes, NamedSharding(sharding.mesh, PartitionSpec(None)))
    if dtype.itemsize < 4:
        sizes = sizes.astype(jnp.int32)  # M may exceed an int8
    return jnp.minimum(jnp.maximum(sizes, 0), num_rows).astype(jnp.int32)


def _checked_offset(group_offset: checks.Integers) -> jax.Array:
    """int32 scalar; negative offsets count as 0."""
    if not isinstance(group_offset, jax.Array):
        group_offset = np.asarray(group_offset)
        if jnp.issubdtype(group_offset.dtype, jnp.integer) and (group_offset < 0).any():
            raise ValueError(f"{_WHERE}: group_offset is {group_offset}, expected at least 0")
    if not jnp.issubdtype(group_offset.dtype, jnp.integer):
        raise TypeError(
            f"{_WHERE}: group_offset has dtype {group_offset.dtype}, expected an integer dtype"
        )
    if group_offset.shape not in ((), (1,)):
        raise ValueError(
            f"{_WHERE}: group_offset has shape {group_offset.shape}, expected () or (1,)"
        )
    offset = jnp.clip(
        jnp.asarray(group_offset), 0, 2**31 - 1 if group_offset.dtype.itemsize >= 4 else None
    )
    return offset.astype(jnp.int32).reshape(())


def _check_precision(precision) -> None:
    """Accepts what names a precision; a dot algorithm would promise other arithmetic than ours."""
    if isinstance(precision, jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset):
        raise NotImplementedError(
            f"{_WHERE}: precision is {precision}; dot algorithms cannot be chosen here, use None"
            " or a jax.lax.Precision"
        )
    for one in precision if isinstance(precision, tuple) else (precision,):
        try:
            jax.lax.Precision(one)
        except ValueError as error:
            raise ValueError(
                f"{_WHERE}: precision is {precision!r}, expected None, 'default', 'high',"
                " 'highest', a jax.lax.Precision or a pair of these"
            ) from error
