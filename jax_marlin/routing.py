"""Routing: router logits to the weights and ids of each token's experts, on the device."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_marlin.top_k import top_k as largest

_SCORINGS = ("softmax", "sigmoid")


def route(
    logits: ArrayLike,
    top_k: SupportsIndex,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: ArrayLike | Sequence[float] | None = None,
    num_groups: SupportsIndex = 1,
    top_groups: SupportsIndex | None = None,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Picks `top_k` experts for each token; everything is computed in float32.

    Qwen3-MoE and Mixtral are the defaults; Qwen2-MoE sets `renormalize=False`. gpt-oss (softmax
    over the chosen logits) is the default too, because a renormalized softmax is that.
    DeepSeek-V3, GLM-4.x, Kimi-K2 and MiniMax-M2 use `scoring="sigmoid"` with a `correction_bias`,
    DeepSeek-V2 and V3 groups.

    Args:
        logits: `[..., E]` float16, bfloat16 or float32, one row a token.
        top_k: experts for each token, 1 <= top_k <= E.
        scoring: "softmax" over all experts, or "sigmoid" of each logit alone.
        renormalize: divide the chosen weights by their sum.
        correction_bias: `[E]`; experts are chosen by score + bias, and weighed by the score alone.
        num_groups: the experts form this many equal, contiguous groups.
        top_groups: only experts of this many best groups may be chosen. A group's rank is the sum
            of its two best biased scores if there is a `correction_bias` (DeepSeek-V3), else its
            best score (DeepSeek-V2). Needed when `num_groups` > 1.
        scale: factor on the weights, applied last.

    Returns:
        `topk_weights` float32 `[..., top_k]` and `topk_ids` int32 `[..., top_k]`, best expert
        first; of two equal scores the lower expert wins.

    Raises:
        TypeError: logits or correction_bias are not floating point.
        ValueError: a size, a name or a combination that cannot be.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_marlin.routing import route
        >>> topk_weights, topk_ids = route(jnp.array([[0.0, 3.0, -1.0, 3.0]]), top_k=2)
        >>> topk_ids.tolist(), topk_weights.tolist()
        ([[1, 3]], [[0.5, 0.5]])
    """
    logits = jnp.asarray(logits)
    _check_logits(logits)
    num_experts = logits.shape[-1]
    top_k = _checked_top_k(top_k, num_experts)
    bias = (
        None
        if correction_bias is None
        else _checked_bias(jnp.asarray(correction_bias), num_experts)
    )
    groups = _checked_groups(num_groups, top_groups, num_experts, top_k)

    logits = logits.astype(jnp.float32)
    if scoring == "softmax" and renormalize and bias is None and groups is None:
        # The others' share cancels out: a softmax over the chosen logits alone is the same.
        chosen, topk_ids = largest(logits, top_k)
        scores = jax.nn.softmax(chosen, axis=-1) * jnp.asarray(scale, jnp.float32)
        return scores, topk_ids.astype(jnp.int32)
    if scoring == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
    elif scoring == "sigmoid":
        scores = jax.nn.sigmoid(logits)
    else:
        raise ValueError(f"route: scoring is {scoring!r}, expected one of {_SCORINGS}")

    choice = scores if bias is None else scores + jnp.broadcast_to(bias, scores.shape)
    if groups is not None:
        choice = _keep_best_groups(choice, *groups, by_best_two=bias is not None)
    _, topk_ids = largest(choice, top_k)  # among equals the lower index comes first
    topk_weights = jnp.take_along_axis(scores, topk_ids, axis=-1)
    if renormalize:
        # A sigmoid row can underflow to all zeros; the floor keeps that 0 and changes no other sum.
        total = jnp.sum(topk_weights, axis=-1, keepdims=True)
        topk_weights = topk_weights / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    topk_weights = topk_weights * jnp.asarray(scale, jnp.float32)
    return topk_weights, topk_ids.astype(jnp.int32)


def _keep_best_groups(
    choice: jax.Array, num_groups: int, top_groups: int, *, by_best_two: bool
) -> jax.Array:
    """`choice` `[..., E]` with the experts outside the `top_groups` best groups at -inf."""
    size = choice.shape[-1] // num_groups
    grouped = choice.reshape(*choice.shape[:-1], num_groups, size)
    if by_best_two:
        group_scores = jnp.sum(jax.lax.top_k(grouped, min(2, size))[0], axis=-1)
    else:
        group_scores = jnp.max(grouped, axis=-1)
    _, best = jax.lax.top_k(group_scores, top_groups)
    kept = jnp.any(jax.nn.one_hot(best, num_groups, dtype=jnp.bool_), axis=-2)
    # An expert of a kept group stays above every other one, even where its own bias is -inf.
    grouped = jnp.maximum(grouped, jnp.finfo(jnp.float32).min)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


def _check_logits(logits: jax.Array) -> None:
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"route: logits have dtype {logits.dtype}, expected a floating-point dtype")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"route: logits have shape {logits.shape}, expected (..., number of experts >= 1)"
        )


def _checked_top_k(top_k: SupportsIndex, num_experts: int) -> int:
    top_k = _static_int("top_k", top_k)
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"route: top_k is {top_k}, expected 1 <= top_k <= {num_experts}, the number of experts"
            " (the last axis of logits)"
        )
    return top_k


def _checked_bias(bias: jax.Array, num_experts: int) -> jax.Array:
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(
            f"route: correction_bias has dtype {bias.dtype}, expected a floating-point dtype"
        )
    if bias.shape != (num_experts,):
        raise ValueError(
            f"route: correction_bias has shape {bias.shape}, expected (experts,) = ({num_experts},)"
        )
    return bias.astype(jnp.float32)


def _checked_groups(
    num_groups: SupportsIndex, top_groups: SupportsIndex | None, num_experts: int, top_k: int
) -> tuple[int, int] | None:
    """(num_groups, top_groups), or None when no expert is excluded."""
    num_groups = _static_int("num_groups", num_groups)
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"route: num_groups is {num_groups}, expected a divisor of {num_experts}, the"
            " number of experts"
        )
    if top_groups is None:
        if num_groups > 1:
            raise ValueError(
                f"route: num_groups is {num_groups} and top_groups is None; how many of the"
                " groups may be used?"
            )
        return None
    top_groups = _static_int("top_groups", top_groups)
    if not 1 <= top_groups <= num_groups:
        raise ValueError(
            f"route: top_groups is {top_groups}, expected 1 <= top_groups <= num_groups ="
            f" {num_groups}"
        )
    reachable = top_groups * (num_experts // num_groups)
    if top_k > reachable:
        raise ValueError(
            f"route: top_k is {top_k}, but {top_groups} of {num_groups} groups hold only"
            f" {reachable} of the {num_experts} experts; raise top_groups"
        )
    return None if top_groups == num_groups else (num_groups, top_groups)


def _static_int(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"route: {name} is {value!r}, expected a Python integer (it sets the output's shape)"
        ) from error
