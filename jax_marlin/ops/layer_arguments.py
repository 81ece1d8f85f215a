"""The arguments of `moe_ffn`: stacks that fit one another, and the routes of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.ops import checks
from jax_marlin.ops.dense_experts import check_dense
from jax_marlin.ops.moe_align_block_size import as_expert_ids
from jax_marlin.ops.moe_matmul import ExpertStack
from jax_marlin.ops.sharding_rules import PAIR
from jax_marlin.weights import MarlinExpertStack

_WHERE = "moe_ffn"


def check_stacks(halves: tuple, down: ExpertStack, implementation: str | None) -> None:
    names = {1: ("gate_up",), 2: ("gate", "up")}.get(len(halves))
    if names is None:
        raise ValueError(
            f"{_WHERE}: gate_up holds {len(halves)} stacks, expected one or the pair (gate, up)"
        )
    for name, stack in zip((*names, "down"), (*halves, down), strict=True):
        if isinstance(stack, DenseExpertStack):
            check_dense(stack, _WHERE, implementation)
        elif not isinstance(stack, MarlinExpertStack) or stack.is_single:
            raise TypeError(
                f"{_WHERE}: {name} is {type(stack).__name__}, expected a MarlinExpertStack with an"
                " expert axis (see jm.load_gptq_stacked)"
            )
        else:
            checks.check_leaves(stack, _WHERE)
        if name != "gate_up" and stack.pair_width is not None:
            raise ValueError(
                f"{_WHERE}: {name}'s columns are paired as those of gate|up are, expected their "
                "own order; leave out gate_up=True of jax_marlin.shard where gate and up are two "
                "stacks, and shard down by rows"
            )
    letters, width = ("I", down.k) if len(halves) == 2 else ("2I", 2 * down.k)
    expected = (down.num_experts, halves[0].k, width)
    for name, half in zip(names, halves, strict=True):
        if half.shape != expected:
            raise ValueError(
                f"{_WHERE}: {name} has shape {half.shape}, expected (E, H, {letters}) = {expected}"
                f" beside down (E, I, N) = {down.shape}"
            )
        if name == "gate_up":
            _check_pairs(half)
        if half.dtype != down.dtype:
            raise TypeError(
                f"{_WHERE}: {name} computes in {half.dtype} and down in {down.dtype}; use"
                f" {name}.astype(jnp.{down.dtype})"
            )


def _check_pairs(gate_up: ExpertStack) -> None:
    """Refuses a shard of gate|up columns that is no whole number of pairs."""
    n, width = gate_up.n_per_expert, gate_up.pair_width
    whole = gate_up.spec.n if isinstance(gate_up, MarlinExpertStack) else n
    if n % (whole if width is None else width):
        raise ValueError(
            f"{_WHERE}: gate_up holds {n} of its {whole} columns, which are no whole pairs, and "
            f"{PAIR}"
        )


def checked_routes(
    token_shape: tuple[int, ...],
    topk_ids: checks.Integers,
    topk_weights: ArrayLike,
    num_experts: int,
) -> tuple[jax.Array, jax.Array]:
    """(ids int32, weights float32), each `[T, top_k]`; host ids are checked, device ids are not."""
    ids = topk_ids if isinstance(topk_ids, jax.Array) else np.asarray(topk_ids)
    weights = jnp.asarray(topk_weights)
    for name, array, kind in (
        ("topk_ids", ids, jnp.integer),
        ("topk_weights", weights, jnp.floating),
    ):
        if not jnp.issubdtype(array.dtype, kind):
            raise TypeError(
                f"{_WHERE}: {name} has dtype {array.dtype}, expected {kind.__name__}; are topk_ids"
                " and topk_weights swapped? (route returns topk_weights, topk_ids)"
            )
    if ids.ndim == 0 or ids.shape[:-1] != token_shape or ids.shape[-1] == 0:
        raise ValueError(
            f"{_WHERE}: topk_ids has shape {ids.shape}, expected (..., top_k) with x's leading axes"
            f" {token_shape} and top_k >= 1"
        )
    if weights.shape != ids.shape:
        raise ValueError(
            f"{_WHERE}: topk_weights has shape {weights.shape}, expected that of topk_ids,"
            f" {ids.shape}"
        )
    for name, array in (("topk_ids", ids), ("topk_weights", weights)):
        if isinstance(array, jax.Array):
            checks.check_foldable(array, array.ndim, name, _WHERE)
    rows = (-1, ids.shape[-1])
    ids = as_expert_ids(ids.reshape(rows), num_experts, _WHERE)
    return ids, weights.astype(jnp.float32).reshape(rows)
