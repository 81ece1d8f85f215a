"""The trait methods of `MarlinExpertStack`: row ranges, vLLM's routed rows, column ranges."""

import dataclasses
import operator
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_marlin.layout import TILE
from jax_marlin.linear import MarlinLinear
from jax_marlin.ops import checks
from jax_marlin.ops.expert_numbers import check_own_experts
from jax_marlin.ops.moe_align_block_size import align_routed_rows, select_moe_block_size
from jax_marlin.ops.moe_matmul import Routing, routed_matmul
from jax_marlin.weights import MarlinExpertStack


def gemm_phase_batched(
    stack: MarlinExpertStack,
    x: ArrayLike,
    dispatches: checks.Integers,
    out: ArrayLike | None = None,
) -> jax.Array:
    """out[o : o + m] = x[i : i + m] @ stack[expert] for every dispatch (expert, i, o, m).

    `dispatches` may be computed on the device; no host ever reads it. A row whose input row, output
    row or expert does not exist is skipped. If two dispatches name one output row, which is the
    caller's error, the later one writes it.

    Args:
        stack: E experts `[K, N]`; its bias is added to the rows that are written.
        x: `[rows, K]` of the stack's dtype.
        dispatches: integers `[D, 4]`, each (expert, in_row_offset, out_row_offset, m), offsets and
            m in rows. m = 0 is nothing; any m, repeated experts and distinct offsets are fine.
        out: `[out_rows, N]` of x's dtype: rows that no dispatch names keep its values. None means
            zeros, as many rows as x.

    Returns:
        `[out_rows, N]`, a new array.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: wrong shapes; host dispatches that are out of range or overlap; rows of x or
            dispatches that an explicit mesh cuts; inside `jax.shard_map`, a packed stack's
            experts vary over an axis that neither dispatches nor x do.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jax_marlin as jm
        >>> stack = jm.quantize(np.ones((3, 32, 64), np.float32), group_size=32)
        >>> dispatches = jnp.array([[2, 0, 3, 2], [0, 4, 1, 1]])
        >>> stack.gemm_phase_batched(jnp.ones((5, 32)), dispatches)[:, 0].tolist()
        [0.0, 32.0, 0.0, 32.0, 32.0]
    """
    where = "gemm_phase_batched"
    x = checks.check_x(x, stack.k, stack.dtype, where, rank=2)
    initial = None if out is None else _checked_out(jnp.asarray(out), x, stack)
    out_rows = x.shape[0] if initial is None else initial.shape[0]
    rows = _checked_dispatches(dispatches, stack.num_experts, x.shape[0], out_rows)
    _check_whole("x", x)
    _check_whole("dispatches", rows)
    remedy = "dispatches of the experts that the device's own stack holds"
    check_own_experts(stack, x, rows, "dispatches", remedy, where)
    if x.shape[0] == 0:
        return jnp.zeros((0, stack.n_per_expert), x.dtype) if initial is None else initial

    expert, in_row = _row_sources(rows, stack.num_experts, x.shape[0], out_rows)
    # Each output row is one routed row of its own gathered input: dropped rows come out zero.
    gathered = x.at[in_row].get(mode="fill", fill_value=0)
    moe_block_size = select_moe_block_size(out_rows, 1, stack.num_experts)
    routing = Routing(*align_routed_rows(expert[:, None], moe_block_size, stack.num_experts))
    product = routed_matmul(
        gathered, stack, routing, moe_block_size=moe_block_size, top_k=1, where=where
    )
    return product if initial is None else jnp.where(expert[:, None] >= 0, product, initial)


def _row_sources(
    dispatches: jax.Array, num_experts: int, in_rows, out_rows
) -> tuple[jax.Array, jax.Array]:
    """int32 `[out_rows]` twice: each output row's expert, -1 if not named, and its input row."""
    nothing = jnp.array([[-1, 0, 0, 0]], jnp.int32)  # dispatch 0, for the rows that no other names
    dispatches = jnp.concatenate([nothing, dispatches])
    expert, in_offset, out_offset, m = dispatches.T[:, None, :]  # each [1, 1 + D]
    # int32 differences of far-off values wrap to negative ones, which no test below lets pass.
    within = jnp.arange(out_rows, dtype=jnp.int32)[:, None] - out_offset  # [out_rows, 1 + D]
    source = in_offset + within
    named = (within >= 0) & (within < m) & (source >= 0) & (source < in_rows)
    named &= (expert >= 0) & (expert < num_experts)
    index = jnp.arange(dispatches.shape[0], dtype=jnp.int32)[None]
    chosen = dispatches[jnp.max(jnp.where(named, index, 0), axis=1)]  # the last one that names it
    in_row = chosen[:, 1] + jnp.arange(out_rows, dtype=jnp.int32) - chosen[:, 2]
    return chosen[:, 0], in_row


def gemm_phase_vllm(
    stack: MarlinExpertStack,
    x: ArrayLike,
    sorted_token_ids: checks.Integers,
    expert_ids: checks.Integers,
    num_tokens_past_padded: checks.Integers,
    prob_m: SupportsIndex | None = None,
    *,
    moe_block_size: checks.StaticInt,
    top_k: checks.StaticInt,
) -> jax.Array:
    """One launch over routed rows: slot id s reads x[s // top_k] and writes out[s].

    Args:
        stack: E experts `[K, N]`.
        x: `[rows, K]` of the stack's dtype.
        sorted_token_ids: integers `[L]`; ids outside 0 .. prob_m * top_k - 1 are padding.
        expert_ids: integers `[ceil(L / moe_block_size)]`, the expert of each block; -1 skips it.
        num_tokens_past_padded: integers `[1]`: blocks from there on are not run.
        prob_m: static int, how many rows of x count; None means all.
        moe_block_size: slots of a block.
        top_k: routed rows of each row of x.

    Returns:
        `[prob_m * top_k, N]` of x's dtype; rows that no slot names are zero.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: wrong shapes, a prob_m that x does not have, host expert ids out of range.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jax_marlin as jm
        >>> stack = jm.quantize(np.ones((3, 32, 64), np.float32), group_size=32)
        >>> routing = jm.moe_align_block_size(jnp.array([[2, 0], [0, -1]]), 8, 3)
        >>> out = stack.gemm_phase_vllm(jnp.ones((2, 32)), *routing, moe_block_size=8, top_k=2)
        >>> out[:, 0].tolist()
        [32.0, 32.0, 32.0, 0.0]
    """
    where = "gemm_phase_vllm"
    x = checks.check_x(x, stack.k, stack.dtype, where, rank=2)
    if prob_m is not None:
        prob_m = _static_int(where, "prob_m", prob_m)
        if not 0 <= prob_m <= x.shape[0]:
            raise ValueError(
                f"{where}: prob_m is {prob_m}, expected 0 .. {x.shape[0]}, the rows of x"
            )
        x = x[:prob_m]
    return routed_matmul(
        x,
        stack,
        Routing(sorted_token_ids, expert_ids, num_tokens_past_padded),
        moe_block_size=moe_block_size,
        top_k=top_k,
        where=where,
    )


def make_expert_linear(
    stack: MarlinExpertStack,
    expert_offset: SupportsIndex,
    expert_n: SupportsIndex,
    bias: ArrayLike | None = None,
) -> MarlinLinear:
    """A view of columns [expert_offset, expert_offset + expert_n) of the stack's E * N columns.

    Args:
        stack: E experts `[K, N]`.
        expert_offset: static int; a multiple of 64 from the start of the expert that it falls into.
        expert_n: static int; a multiple of 64, or up to the expert's last column.
        bias: `[expert_n]` of the stack's dtype, in place of the stack's own.

    Returns:
        `MarlinLinear` `[K, expert_n]`; packed weights are shared, not copied.

    Raises:
        TypeError: offsets that are no static integers; bias of another dtype.
        ValueError: columns out of range, of two experts or off the tiles; bias of another shape.

    Example:
        >>> import numpy as np, jax_marlin as jm
        >>> stack = jm.quantize(np.ones((3, 32, 128), np.float32), group_size=32)
        >>> stack.make_expert_linear(128 + 64, 64).shape  # the upper half of expert 1
        (32, 64)
    """
    where = "make_expert_linear"
    start = _static_int(where, "expert_offset", expert_offset)
    width = _static_int(where, "expert_n", expert_n)
    n, num_columns = stack.n_per_expert, stack.num_experts * stack.n_per_expert
    if not 0 <= start < num_columns:
        raise ValueError(
            f"{where}: expert_offset is {start}, expected 0 .. {num_columns - 1}, a column of"
            f" {stack.num_experts} experts with {n} columns each"
        )
    expert, first = divmod(start, n)
    if width < 1 or first + width > n:
        raise ValueError(
            f"{where}: expert_n is {width} from column {first} of expert {expert}, expected"
            f" 1 .. {n - first}: an expert has {n} columns, and a linear cannot span two"
        )
    if first % TILE or (width % TILE and first + width != n):
        raise ValueError(
            f"{where}: columns [{first}, {first + width}) of expert {expert} do not fall on tiles;"
            f" expected a start that is a multiple of {TILE} and a length that is one too, or"
            f" reaches column {n}"
        )
    view = stack[expert][:, first : first + width]
    return (
        view if bias is None else dataclasses.replace(view, bias=_checked_bias(bias, width, stack))
    )


def _checked_bias(bias: ArrayLike, width: int, stack: MarlinExpertStack) -> jax.Array:
    bias = jnp.asarray(bias)
    if bias.shape != (width,):
        raise ValueError(
            f"make_expert_linear: bias has shape {bias.shape}, expected (expert_n,) = ({width},)"
        )
    if bias.dtype != stack.dtype:
        raise TypeError(
            f"make_expert_linear: bias has dtype {bias.dtype}, expected {stack.dtype}, that of the"
            f" stack; use bias.astype(jnp.{stack.dtype})"
        )
    return bias


def _check_whole(name: str, array: jax.Array) -> None:
    """A row of the result can come from any row of x: no device can do with a part of them."""
    if any(jax.typeof(array).sharding.spec[:1]):
        raise ValueError(
            f"gemm_phase_batched: {name} has type {jax.typeof(array)}, expected its rows on every "
            "device; use jax.sharding.reshard, or ragged_dot or moe_matmul, which take a part"
        )


def _checked_out(out: jax.Array, x: jax.Array, stack: MarlinExpertStack) -> jax.Array:
    if out.ndim != 2 or out.shape[1] != stack.n_per_expert:
        raise ValueError(
            f"gemm_phase_batched: out has shape {out.shape}, expected (out_rows, N) with N ="
            f" {stack.n_per_expert}"
        )
    if out.dtype != x.dtype:
        raise TypeError(f"gemm_phase_batched: out has dtype {out.dtype}, expected x's, {x.dtype}")
    return out


def _checked_dispatches(
    dispatches: checks.Integers, num_experts: int, in_rows, out_rows
) -> jax.Array:
    """int32 `[D, 4]`; what the device holds is not looked at, host dispatches must be right."""
    where = "gemm_phase_batched"
    array = dispatches if isinstance(dispatches, jax.Array) else np.asarray(dispatches)
    if array.size == 0 and isinstance(array, np.ndarray):
        array = np.zeros((0, 4), np.int32)  # an empty list has neither dtype nor columns
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{where}: dispatches have dtype {array.dtype}, expected an integer dtype")
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(
            f"{where}: dispatches have shape {array.shape}, expected (D, 4): rows (expert,"
            " in_row_offset, out_row_offset, m)"
        )
    if isinstance(array, jax.Array):
        has, int32 = jnp.iinfo(array.dtype), jnp.iinfo(jnp.int32)
        # Wider integers end at int32's ends: nothing may wrap into range.
        array = jnp.clip(array, max(has.min, int32.min), min(has.max, int32.max))
        return array.astype(jnp.int32)
    previous_end = 0
    for expert, i, o, m in sorted(map(tuple, array.tolist()), key=lambda row: row[2]):
        got = f"{where}: dispatch (expert, in_row_offset, out_row_offset, m) = {(expert, i, o, m)}"
        if m == 0:
            continue
        if not 0 <= expert < num_experts:
            raise ValueError(f"{got} names expert {expert}, expected 0 .. {num_experts - 1}")
        if m < 0 or i < 0 or i + m > in_rows or o < 0 or o + m > out_rows:
            raise ValueError(
                f"{got} leaves the {in_rows} rows of x or the {out_rows} rows of the result"
            )
        if o < previous_end:
            raise ValueError(f"{got} writes rows that another dispatch writes; output rows overlap")
        previous_end = o + m
    return jnp.asarray(array.astype(np.int32))


def _static_int(where: str, name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{where}: {name} is {value!r}, expected a static integer") from error
