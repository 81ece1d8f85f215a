"""`moe_ffn` of one device's part of the experts or columns, inside `jax.shard_map`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.ops import token_exchange
from jax_marlin.ops.moe_align_block_size import as_expert_ids
from jax_marlin.ops.sharding_rules import PAIR, own_ids
from jax_marlin.sharding import bias_on_first

_WHERE = "moe_ffn"


def layer_over_devices(
    layer: Callable[..., jax.Array],
    x: Any,
    topk_ids: Any,
    topk_weights: Any,
    gate_up: Any,
    down: Any,
    *,
    expert_axis: str | None,
    tensor_axis: str | None,
    exchange: str | None,
) -> jax.Array:
    """`layer` (a `moe_ffn` of what this device holds) on all devices, their results added up.

    Partial results are rounded to x's dtype by each device and added in float32.

    Raises:
        ValueError: an axis that the operands do not vary over as they must, by the operand's name.
    """
    x, topk_weights = jnp.asarray(x), jnp.asarray(topk_weights)
    topk_ids = jnp.asarray(topk_ids)
    tokens = {"x": x, "topk_ids": topk_ids, "topk_weights": topk_weights}
    halves = tuple(gate_up) if isinstance(gate_up, tuple | list) else (gate_up,)
    stacks = {"gate_up": halves[0], "down": down}
    for name, axis in (("expert_axis", expert_axis), ("tensor_axis", tensor_axis)):
        if axis is not None:
            _check_cut(name, axis, stacks)
    if exchange not in (None, *token_exchange.EXCHANGES):
        raise ValueError(
            f"{_WHERE}: exchange is {exchange!r}, expected None or one of "
            f"{token_exchange.EXCHANGES}"
        )
    if tensor_axis is not None:
        _check_whole(tensor_axis, tokens)
        _check_paired(tensor_axis, halves)
        down = bias_on_first(down, tensor_axis)
    if expert_axis is None:
        return _summed(layer(x, topk_ids, topk_weights, gate_up, down), (tensor_axis,), x.dtype)

    experts, devices = down.num_experts, jax.lax.axis_size(expert_axis)
    lead, rows = x.shape[:-1], (-1, topk_ids.shape[-1])
    ids = as_expert_ids(topk_ids.reshape(rows), experts * devices, _WHERE)

    def own_experts(x, ids, weights):
        return layer(x, own_ids({"e": (expert_axis,)}, ids, experts), weights, gate_up, down)

    varying = {name: expert_axis in _varying(array) for name, array in tokens.items()}
    if not any(varying.values()):  # every device has all tokens: one sum over both axes
        axes = (expert_axis,) if tensor_axis is None else (expert_axis, tensor_axis)
        return _summed(own_experts(x, ids.reshape(topk_ids.shape), topk_weights), axes, x.dtype)
    if not all(varying.values()):
        raise ValueError(
            f"{_WHERE}: {', '.join(n for n, v in varying.items() if v)} varies over expert_axis "
            f"{expert_axis!r} and {', '.join(n for n, v in varying.items() if not v)} does not; "
            "give all three the same tokens of each device"
        )
    flat = (
        x.reshape(-1, x.shape[-1]),
        ids,
        topk_weights.astype(jnp.float32).reshape(rows),
    )
    exchange = exchange or token_exchange.select_exchange(
        flat[0].shape[0] * devices, rows[1], devices
    )
    if exchange == "all_gather":
        out = token_exchange.gathered(own_experts, *flat, expert_axis)
    else:
        out = token_exchange.routed(own_experts, *flat, expert_axis, experts)
    out = out if tensor_axis is None else jax.lax.psum(out, tensor_axis)
    return out.astype(x.dtype).reshape(*lead, out.shape[-1])


def _varying(array: Any) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _summed(out: jax.Array, axes: tuple, dtype) -> jax.Array:
    return jax.lax.psum(out.astype(jnp.float32), axes).astype(dtype)


def _check_cut(name: str, axis: str, stacks: dict[str, Any]) -> None:
    for stack_name, stack in stacks.items():
        weight = stack.weight if isinstance(stack, DenseExpertStack) else stack.qweight
        if axis not in _varying(weight):
            raise ValueError(
                f"{_WHERE}: {stack_name} is the same on all of {name} {axis!r}; call "
                "inside jax.shard_map, with in_specs of jax_marlin.partition_specs and with "
                "varying-axis checks (check_vma, the default): they tell what each device holds"
            )


def _check_whole(axis: str, tokens: dict[str, Any]) -> None:
    for name, array in tokens.items():
        if axis in _varying(array):
            raise ValueError(
                f"{_WHERE}: {name} varies over tensor_axis {axis!r}, whose devices share each "
                "token's work; give it in_specs without that axis"
            )


def _check_paired(axis: str, halves: tuple) -> None:
    first = halves[0]
    unpaired = isinstance(first, DenseExpertStack) and first.pair_width is None
    if len(halves) == 1 and unpaired and jax.lax.axis_size(axis) > 1:
        raise ValueError(
            f"{_WHERE}: gate_up is cut over tensor_axis {axis!r}, its columns are not paired, and "
            f"{PAIR}"
        )
