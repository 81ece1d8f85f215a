"""Argument checks of all ops: each error names function, argument, got, expected, remedy."""

import numbers
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_marlin.linear import as_dtype
from jax_marlin.ops import ffi_targets

KERNEL_DTYPES = (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))

# Ids and sizes: device arrays, which are never read, or host values, lists too, which are checked.
Integers: TypeAlias = ArrayLike | Sequence[int] | Sequence[Sequence[int]]
StaticInt: TypeAlias = int | np.integer  # what `check_positive` takes

_COMPUTE_DTYPES = (*KERNEL_DTYPES, jnp.dtype(jnp.float32))


def check_x(x, k: int, weight_dtype, where: str, rank: int | None = None) -> jax.Array:
    """`x` as an array whose last axis is `k` long, of exactly the weight's compute dtype."""
    if x is None:
        raise TypeError(f"{where}: x is None, expected an array of {jnp.dtype(weight_dtype)}")
    x = jnp.asarray(x)
    if x.ndim == 0 or (rank is not None and x.ndim != rank) or x.shape[-1] != k:
        expected = f"[..., {k}]" if rank is None else f"[T, {k}]"
        raise ValueError(f"{where}: x has shape {x.shape}, expected {expected}")
    if jnp.dtype(weight_dtype) not in _COMPUTE_DTYPES:
        names = ", ".join(str(d) for d in _COMPUTE_DTYPES)
        raise TypeError(
            f"{where}: the weight's compute dtype is {jnp.dtype(weight_dtype)}, expected one of "
            f"{names}; use w.astype(...)"
        )
    if x.dtype != weight_dtype:
        other = f"w.astype(jnp.{x.dtype}) or " if x.dtype in _COMPUTE_DTYPES else ""
        raise TypeError(
            f"{where}: x has dtype {x.dtype} but the weight computes in {jnp.dtype(weight_dtype)}; "
            f"use {other}x.astype(jnp.{jnp.dtype(weight_dtype)})"
        )
    return x


def check_foldable(array: jax.Array, axes: int, name: str, where: str) -> jax.Array:
    """`array`, whose first `axes` axes become one: what an explicit mesh cuts must stand first."""
    sizes = zip(array.shape[:axes], jax.typeof(array).sharding.spec, strict=False)
    cuts = [axis for size, axis in sizes if size != 1]
    behind = [axis for i, axis in enumerate(cuts) if axis is not None and None in cuts[:i]]
    if behind:
        raise ValueError(
            f"{where}: {name} has type {jax.typeof(array)}, whose first {axes} axes are folded "
            "into one, expected a cut from the first axis on; use jax.sharding.reshard, or vmap "
            f"over the axis that {behind[0]} cuts"
        )
    return array


def check_leaves(stack, where: str, own_bias=None) -> None:
    """Refuses leaves that `jax.tree.map` has reshaped or cast, before they fail deep inside.

    `own_bias` is the bias that a view has in place of the stack's.
    """
    qweight, perm = stack.qweight, stack.perm
    if qweight.ndim != 4:
        raise ValueError(
            f"{where}: the stack's qweight has shape {qweight.shape}, expected 4 axes "
            "(E, N / 64, K / 64, words); use vmap or scan over further leading axes"
        )
    if qweight.dtype != jnp.uint32 or (perm is not None and perm.dtype != jnp.int32):
        raise TypeError(
            f"{where}: the stack's qweight is {qweight.dtype}, expected uint32 (perm: int32); "
            "change the compute dtype with stack.astype(...), not leaf by leaf"
        )
    _check_shard(stack, stack.bias if own_bias is None else own_bias, where)


def _check_shard(stack, bias, where: str) -> None:
    """Refuses leaves that were not cut together, and a bias that `psum` would add many times."""
    spec = stack.held_spec
    experts, n_tiles = stack.qweight.shape[:2]
    of_groups = (experts, n_tiles, spec.num_groups, 64)
    _check_leaf(stack, "scales", of_groups, where)
    _check_leaf(stack, "zero_points", of_groups, where)
    if stack.spec.k_parts * spec.k % stack.spec.k:
        raise ValueError(
            f"{where}: the stack's leaves hold {spec.k} of {stack.spec.k} rows, no equal part of "
            "whole tiles and groups; cut weights by jax_marlin.partition_specs"
        )
    if stack.perm is not None and spec.k != stack.spec.k:
        raise ValueError(
            f"{where}: a shard of {spec.k} of {stack.spec.k} rows in act-order needs the whole x; "
            "cut experts or columns instead, or use fold_act_order"
        )
    _check_leaf(stack, "perm", (experts, spec.k), where)
    _check_leaf(stack, "bias", (experts, spec.n), where)
    if bias is not None and spec.k != stack.spec.k:
        along = jax.typeof(stack.qweight).manual_axis_type.varying
        if not along or not along <= jax.typeof(bias).manual_axis_type.varying:
            raise ValueError(
                f"{where}: a shard of {spec.k} of {stack.spec.k} rows has a bias, which the sum "
                "over devices would add once for each; use jax_marlin.bias_on_first(w, axis), or "
                "moe_ffn(..., tensor_axis=axis)"
            )


def _check_leaf(stack, name: str, expected: tuple[int, ...], where: str) -> None:
    """Refuses a leaf of another shape than the packed codes ask for; None is absent."""
    leaf = getattr(stack, name)
    if leaf is not None and leaf.shape != expected:
        have = "has" if name in ("perm", "bias") else "have"
        raise ValueError(
            f"{where}: the stack's {name} {have} shape {leaf.shape}, expected {expected} "
            f"beside qweight {stack.qweight.shape}; cut weights by jax_marlin.partition_specs, and "
            "replace a leaf by one of its own shape"
        )


def check_implementation(implementation: str | None, dtype, where: str) -> None:
    """Refuses an unknown name, and "cuda" where it is already known that it cannot run."""
    if implementation not in (None, "cuda", "xla"):
        raise ValueError(
            f"{where}: implementation is {implementation!r}, expected None, 'cuda' or 'xla'"
        )
    if implementation != "cuda":
        return
    if jnp.dtype(dtype) not in KERNEL_DTYPES:
        raise NotImplementedError(
            f"{where}: implementation='cuda' computes in float16 or bfloat16, the weight in "
            f"{jnp.dtype(dtype)}; use w.astype(...) or implementation=None"
        )
    reason = ffi_targets.cuda_unavailable_reason()
    if reason is not None:
        raise NotImplementedError(f"{where}: implementation='cuda' cannot run: {reason}")


def result_dtypes(x_dtype, preferred_element_type, where: str) -> tuple[np.dtype, np.dtype]:
    """(dtype the op writes, dtype the caller gets): x's dtype and float32 are written directly."""
    wanted = as_dtype(
        x_dtype if preferred_element_type is None else preferred_element_type,
        "preferred_element_type", "a floating-point dtype", where,
    )  # fmt: skip
    if not jnp.issubdtype(wanted, jnp.floating):
        raise TypeError(
            f"{where}: preferred_element_type is {wanted}, expected a floating-point dtype"
        )
    written = jnp.dtype(x_dtype) if wanted == x_dtype else jnp.dtype(jnp.float32)
    return written, wanted


def check_positive(value, name: str, where: str) -> int:
    """`value` as a Python int of at least 1 (block sizes and top_k are static)."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {name} is {value!r}, expected a static int of at least 1")
    return int(value)


def check_ids(ids, name: str, where: str) -> jax.Array:
    """Integer ids as int32, rank 1."""
    host = not isinstance(ids, jax.Array)
    array = np.asarray(ids) if host else ids
    if array.size == 0 and host:
        array = array.astype(np.int32)  # an empty list has no dtype of its own
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{where}: {name} has dtype {array.dtype}, expected integers")
    if array.ndim != 1:
        raise ValueError(f"{where}: {name} has shape {array.shape}, expected one axis")
    # Wide ids are clipped, not cut: none may wrap into the range of ids that mean something.
    has, int32 = jnp.iinfo(array.dtype), jnp.iinfo(jnp.int32)
    if has.min < int32.min or has.max > int32.max:
        array = array.clip(max(has.min, int32.min), min(has.max, int32.max))
    return jnp.asarray(array, jnp.int32)


def check_host_expert_ids(expert_ids, num_experts: int, where: str) -> None:
    """Raises on host ids outside [-1, num_experts); kernels skip such ids of a device array."""
    if not isinstance(expert_ids, np.ndarray | list | tuple):
        return
    ids = np.asarray(expert_ids)
    bad = ids[(ids < -1) | (ids >= num_experts)]
    if bad.size:
        raise ValueError(
            f"{where}: expert_ids contains {bad.flat[0]}, expected -1 (skip) to {num_experts - 1}"
        )
